"""Figures: `migrated` beside QEMU's own migration, iperf3 and a bare fault handler.  ``python -m benchmarks --help``."""
