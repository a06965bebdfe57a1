"""What an agent keeps of a migration beside its record: figures over time, the last page map, log lines.

All of it is for display.  Losing it loses plots and nothing else, so a failure here is logged and never stops a
migration.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from migrated.agent.series import Series
from migrated.log_lines import Line, Lines, lines_of
from migrated.memory.page_map import PageMap

if TYPE_CHECKING:
    from migrated.agent.record import Record
    from migrated.memory.engine import SourceEngine, TargetEngine

#: The directory of the files below the state directory.
NAME: Final = "histories"
#: Histories on disk: those of the migrations that ended last.
MAX_FILES: Final = 50
#: Cells of a page map, whatever the size of the guest.
MAP_CELLS: Final = 2048
#: A page map is made at most this often, and never takes more than a tenth of one processor.
MAP_SECONDS: Final = 0.5

log = structlog.get_logger("migrated.agent.history")


class Kept(msgspec.Struct):
    """A history as it is stored and sent."""

    series: Series = msgspec.field(default_factory=Series)
    page_map: PageMap | None = None
    log: list[Line] = msgspec.field(default_factory=list)


class History:
    """The history of a migration that this agent runs."""

    def __init__(self, migration_id: str) -> None:
        self.series = Series()
        self.lines = lines_of(migration_id)
        self.stored = False  # on disk, and no longer here
        self._map: PageMap | None = None
        self._map_due = 0.0
        self._looking = asyncio.Lock()

    def sample(self, record: Record, *, always: bool = False) -> None:
        """Take a sample of the record's figures."""
        self.series.add(record, always=always)

    async def page_map(self, engine: SourceEngine | TargetEngine | None, *, now: bool = False) -> PageMap | None:
        """Return the page map as it is, or was a moment ago; the last one if the engine is gone; None before the first."""
        async with self._looking:
            began = time.monotonic()
            if engine is not None and engine.alive and (now or began >= self._map_due):
                self._map = await engine.page_map(MAP_CELLS) or self._map
                ended = time.monotonic()
                self._map_due = ended + max(MAP_SECONDS, 10 * (ended - began))
            return self._map

    def kept(self) -> Kept:
        """Return everything as it is now."""
        return Kept(series=self.series, page_map=self._map, log=list(self.lines))

    def take(self) -> Kept:
        """Return everything to be stored, and keep nothing: an agent remembers many ended migrations."""
        kept, self.stored = self.kept(), True
        self.series, self.lines, self._map = Series(), Lines(), None
        return kept


class Histories:
    """Files of the histories of ended migrations, one for each, the newest `MAX_FILES`.  Methods block."""

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / NAME

    def save(self, migration_id: str, kept: Kept) -> None:
        """Write one, and remove the oldest ones beyond the limit."""
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
            scratch = self._directory / f"{migration_id}.new"
            scratch.write_bytes(msgspec.json.encode(kept))
            scratch.replace(self._path(migration_id))
            files = sorted(self._directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in files[: max(0, len(files) - MAX_FILES)]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.warning("cannot store the history of a migration", migration=migration_id, error=error.strerror)

    def load(self, migration_id: str) -> Kept:
        """Return one, empty if it is not there or cannot be decoded."""
        try:
            return msgspec.json.decode(self._path(migration_id).read_bytes(), type=Kept)
        except FileNotFoundError:
            return Kept()
        except (OSError, ValueError) as error:
            log.warning("cannot read the history of a migration", migration=migration_id, error=str(error))
            return Kept()

    def _path(self, migration_id: str) -> Path:
        return self._directory / f"{migration_id}.json"
