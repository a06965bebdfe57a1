"""Live-migrate a running guest's memory between hosts, outside the VMM, over huge pages."""

from __future__ import annotations

__version__ = "0.1.0"
