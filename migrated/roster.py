"""The migrations of one agent: those under way and the last ones that ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from migrated.errors import ConflictError, NotFoundError
from migrated.migration import Migration
from migrated.record import Record

M = TypeVar("M", bound=Migration)


class Roster(Generic[M]):
    """Ordered by start; forgets the oldest ended ones beyond ``keep``."""

    def __init__(self, *, keep: int) -> None:
        self._migrations: dict[str, M] = {}
        self._keep = keep

    def add(self, migration: M) -> None:
        """A new one."""
        self._migrations[migration.id] = migration
        ended = [known for known in self._migrations.values() if known.record.ended]
        for old in ended[: max(0, len(ended) - self._keep)]:
            del self._migrations[old.id]

    def __iter__(self) -> Iterator[M]:
        return iter(list(self._migrations.values()))

    @property
    def active(self) -> list[M]:
        """Those not ended."""
        return [migration for migration in self if not migration.record.ended]

    def of_guest(self, guest: str) -> M | None:
        """The one under way for this guest."""
        return next((migration for migration in self.active if migration.record.guest == guest), None)

    def find(self, wanted: str) -> M:
        """By id, a unique prefix of it, or the guest's name (its newest).  NotFoundError, ConflictError."""
        if wanted in self._migrations:
            return self._migrations[wanted]
        of_guest = [migration for migration in self if migration.record.guest == wanted]
        if of_guest:
            return of_guest[-1]
        matching = [migration for key, migration in self._migrations.items() if wanted and key.startswith(wanted)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            ids = ", ".join(migration.id for migration in matching)
            raise ConflictError(f"{wanted!r} fits several migrations: {ids}", hint="give more of the id")
        raise NotFoundError(f"no migration {wanted!r}", hint="`migrated list --all` shows what there is")

    def records(self, *, ended: bool) -> list[Record]:
        """Fresh records, oldest first."""
        chosen = [migration for migration in self if ended or not migration.record.ended]
        for migration in chosen:
            if not migration.record.ended:
                migration.refresh()
        return [migration.record for migration in chosen]
