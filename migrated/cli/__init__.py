"""The command line."""

from __future__ import annotations


def main() -> int:
    """Run ``migrated``; the exit code.  What the verbs need is imported here, so that importing this package costs nothing."""
    from migrated.cli.command import run

    return run()
