"""The `process` driver's configuration tables, for guests that co-operate.

Each table tells one side how it meets its guest: where the guest connects, or how to start it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from migrated.guests.start.config import StartedTable
from migrated.settings import Command, MemoryTable, OptionalSocketPath, SocketPath


class ProcessSourceConfig(MemoryTable):
    """``[guests.NAME]`` of a source: where the guest connects, and which pages its memory uses."""

    driver: Literal["process"] = "process"
    socket: SocketPath = Field(description="where the guest connects")


class ProcessTargetConfig(StartedTable):
    """``[guests.NAME]`` of a target: how to start the guest."""

    driver: Literal["process"] = "process"
    command: Command = Field(
        description="the guest's program and its arguments; MIGRATED_SOCKET is added to its environment"
    )
    next_socket: OptionalSocketPath = Field(
        default="",
        description="the socket of a source agent on this host, to which the guest connects once all its memory has arrived, "
        "so that it can be migrated again",
    )
