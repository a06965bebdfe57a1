"""The records of migrations that are over, on disk: what `list --all` still shows after the agent was started again.

One JSON object a line, the oldest first, added to when a migration ends; of lines with the same id the last one counts.
Losing it loses history and nothing else, so nothing here ever stands in the way of a migration: a line that cannot be
read is reported and skipped, a file that cannot be written is reported.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

import msgspec
import structlog

from migrated.agent.record import Record

NAME = "records.jsonl"
#: Of any line; a record has a few KiB.
MAX_LINE_BYTES = 1 << 20

log = structlog.get_logger("migrated.agent.archive")


class Archive:
    """At most ``keep`` records; the file is written anew, whole, when it holds twice as many lines."""

    def __init__(self, path: Path, *, keep: int) -> None:
        self._path = path
        self._keep = keep
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._lines = 0
        self._whole = True  # the file ends with the end of a line

    def load(self) -> list[Record]:
        """What an agent before us has left, oldest first."""
        try:
            with self._path.open("rb") as file:
                while line := file.readline(MAX_LINE_BYTES):
                    self._lines += 1
                    self._whole = line.endswith(b"\n")
                    if line.strip():
                        self._take(line)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("records of former migrations cannot be read", path=str(self._path), error=error.strerror)
        return list(self._records.values())

    def _take(self, line: bytes) -> None:
        try:
            record = msgspec.json.decode(line, type=Record)
            if not record.ended:
                raise ValueError(f"migration {record.id} is {record.state} in it, which is no end")
        except ValueError as error:
            log.warning(
                "a record is not understood and skipped", path=str(self._path), line=self._lines, error=str(error)
            )
            return
        self._remember(record)

    def _remember(self, record: Record) -> None:
        self._records.pop(record.id, None)
        self._records[record.id] = record
        while len(self._records) > self._keep:
            self._records.popitem(last=False)

    def add(self, record: Record) -> None:
        """A migration that has ended.  Blocks."""
        self._remember(record)
        line = msgspec.json.encode(record) + b"\n"
        try:
            if self._lines >= 2 * self._keep:
                self._write_anew()
            else:
                with self._open(self._path, os.O_APPEND) as file:
                    file.write(line if self._whole else b"\n" + line)
                self._whole = True
                self._lines += 1
        except OSError as error:
            self._whole = False  # part of the line may be there
            log.warning("the record of a migration is not kept", path=str(self._path), error=error.strerror)

    def _write_anew(self) -> None:
        scratch = self._path.with_suffix(".new")
        with self._open(scratch, os.O_TRUNC) as file:
            file.writelines(msgspec.json.encode(record) + b"\n" for record in self._records.values())
        scratch.replace(self._path)
        self._lines, self._whole = len(self._records), True

    @staticmethod
    def _open(path: Path, flag: int) -> BinaryIO:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600), "wb")
