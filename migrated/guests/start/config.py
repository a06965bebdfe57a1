"""The keys that say as whom and where the process of an incoming guest runs."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import Field

from migrated.errors import ConfigError
from migrated.settings import MemoryTable, Text

_NUMA: Final = re.compile(r"(bind|interleave|preferred|local)(?::(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*))?", re.ASCII)
_SLICE: Final = re.compile(r"[A-Za-z0-9:_.\\-]{1,240}\.slice", re.ASCII)


def nodes(policy: str) -> list[int]:
    """Return the numbers of the nodes that a NUMA policy names: 0, 1 and 3 for ``bind:0-1,3``."""
    found: set[int] = set()
    for part in filter(None, policy.partition(":")[2].split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return sorted(found)


def _numa_policy(text: str) -> str:
    if not text:
        return text
    match = _NUMA.fullmatch(text)
    if match is None or (match[1] == "local") != (match[2] is None):
        raise ConfigError(f"{text!r} is not a NUMA policy")
    # The kernel has at most 1024 nodes; the comparison comes before any range is made.
    if any(int(number) >= 1024 for number in re.findall(r"\d+", text)) or (match[2] and not nodes(text)):
        raise ConfigError(f"{text!r} names nodes that cannot exist")
    if match[1] == "preferred" and len(nodes(text)) != 1:
        raise ConfigError(f"{text!r}: one node can be preferred")
    return text


def _slice(text: str) -> str:
    if _SLICE.fullmatch(text) is None:
        raise ConfigError(f"{text!r} is not the name of a slice")
    return text


class StartedTable(MemoryTable):
    """A guest whose process the agent starts."""

    user: str = Field(
        default="",
        max_length=64,
        description='the user that the guest runs as, without any capability; `""`: the agent\'s own',
    )
    group: str = Field(default="", max_length=64, description="its group; by default the user's own. Needs `user`")
    groups: list[str] = Field(default=[], description="more groups, such as `kvm`. Needs `user`")
    slice: Annotated[str, Text(_slice, "slice", "the name of a slice unit")] = Field(
        default="machine.slice", description="the slice of the guest's own unit, if systemd runs the agent"
    )
    nice: int = Field(default=0, ge=-20, le=19, description="niceness of the guest's process")
    numa_policy: Annotated[
        str, Text(_numa_policy, "policy", 'bind:NODES, interleave:NODES, preferred:NODE, local, or ""')
    ] = Field(
        default="",
        description="where the process's own memory is allocated; the agent allocates the memory of the guest",
    )
