"""``python -m migrated``."""

from __future__ import annotations

import sys

from migrated.cli import main

if __name__ == "__main__":
    sys.exit(main())
