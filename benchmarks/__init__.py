"""Benchmarks: compare `migrated` with QEMU's own migration, iperf3 and a bare fault handler.

See ``python -m benchmarks --help`` and docs/benchmarks.md.
"""
