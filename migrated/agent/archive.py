"""The records of finished migrations on disk, so that `list --all` still shows them after a restart.

Losing the archive loses history and nothing else, so a failure here is logged and never stops a migration.
The file holds one JSON object per line, oldest first.  A migration appends its line when it ends; of several lines with
the same id the last one counts.  Lines that cannot be decoded are skipped.
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
#: Limit of a line; a record takes a few KiB.
MAX_LINE_BYTES = 1 << 20

log = structlog.get_logger("migrated.agent.archive")


class Archive:
    """Keep at most ``keep`` records; rewrite the whole file once it holds twice as many lines."""

    def __init__(self, path: Path, *, keep: int) -> None:
        self._path = path
        self._keep = keep
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._lines = 0
        self._whole = True  # the last line of the file is complete

    def load(self) -> list[Record]:
        """Return the records of previous agents, oldest first."""
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
            log.warning("cannot read the records of earlier migrations", path=str(self._path), error=error.strerror)
        return list(self._records.values())

    def _take(self, line: bytes) -> None:
        try:
            record = msgspec.json.decode(line, type=Record)
            if not record.ended:
                raise ValueError(f"migration {record.id} is {record.state}, which is not a final state")
        except ValueError as error:
            log.warning(
                "skipping a record that cannot be decoded", path=str(self._path), line=self._lines, error=str(error)
            )
            return
        self._remember(record)

    def _remember(self, record: Record) -> None:
        self._records.pop(record.id, None)
        self._records[record.id] = record
        while len(self._records) > self._keep:
            self._records.popitem(last=False)

    def add(self, record: Record) -> None:
        """Add the record of a migration that has ended.  Blocks."""
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
            self._whole = False  # part of the line may have been written
            log.warning("cannot archive the record of a migration", path=str(self._path), error=error.strerror)

    def _write_anew(self) -> None:
        scratch = self._path.with_suffix(".new")
        with self._open(scratch, os.O_TRUNC) as file:
            file.writelines(msgspec.json.encode(record) + b"\n" for record in self._records.values())
        scratch.replace(self._path)
        self._lines, self._whole = len(self._records), True

    @staticmethod
    def _open(path: Path, flag: int) -> BinaryIO:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | flag, 0o600), "wb")
