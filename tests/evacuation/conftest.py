"""The example guest, as in tests/integration."""

from __future__ import annotations

from tests.integration.conftest import program

__all__ = ["program"]
