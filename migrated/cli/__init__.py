"""The command line: its commands, and how it prints records and errors.  `main` is the entry point of ``migrated``."""

from __future__ import annotations


def main() -> int:
    """Run ``migrated``; return the exit code.  Imports are local, so importing this package is cheap."""
    from migrated.cli.command import run

    return run()
