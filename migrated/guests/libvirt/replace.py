"""What differs between two hosts in a domain's XML: paths, networks, processors.

The target's configuration names each value and what stands in its place here.  Only the elements and attributes listed in this
module are looked at, and a value is replaced only if it is exactly the one named, or lies in the directory named.
"""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Annotated, Final

from pydantic import AfterValidator, Field, field_validator

from migrated.settings import Table, refuse

#: The kernel's limit of processors and of nodes is lower.
_MAX_NUMBER: Final = 1 << 16
_SET = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a value is: an attribute of the elements at ``path``, or their text if ``attribute`` is empty."""

    path: str
    attribute: str = ""

    def __str__(self) -> str:
        """As in the XML: ``devices/emulator``, ``devices/interface/source@network``."""
        return f"{self.path}@{self.attribute}" if self.attribute else self.path


_PATHS = (
    *(_Place("devices/disk//source", name) for name in ("file", "dev", "dir")),
    _Place("devices/filesystem/source", "dir"),
    *(_Place(f"devices/{kind}/source", "path") for kind in ("serial", "parallel", "console", "channel")),
    *(_Place(f"os/{name}") for name in ("loader", "nvram", "kernel", "initrd", "dtb")),
    _Place("os/nvram", "template"),
    _Place("os/nvram/source", "file"),
    _Place("devices/emulator"),
)
_NETWORKS = (_Place("devices/interface/source", "network"), _Place("devices/graphics/listen", "network"))
_BRIDGES = (_Place("devices/interface/source", "bridge"),)
_LINKS = (_Place("devices/interface[@type='direct']/source", "dev"),)
_CPUS = (
    _Place("vcpu", "cpuset"),
    *(_Place(f"cputune/{name}", "cpuset") for name in ("vcpupin", "emulatorpin", "iothreadpin")),
)
_NODES = (_Place("numatune/memory", "nodeset"), _Place("numatune/memnode", "nodeset"))


def _numbers(text: str) -> list[int]:
    """The members of a set such as ``0-3,8``, in the order written.  Raises ValueError."""
    if _SET.fullmatch(text) is None:
        raise ValueError(f"{text!r} is not a set of processors or nodes")
    found: dict[int, None] = {}
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        begin, end = int(first), int(last or first)
        if not begin <= end < _MAX_NUMBER:
            raise ValueError(f"{piece!r} is not a range")
        before = len(found)
        found.update(dict.fromkeys(range(begin, end + 1)))
        if len(found) != before + end + 1 - begin:
            raise ValueError(f"{text!r} names a number twice")
    return list(found)


def _written(numbers: set[int]) -> str:
    """A set as libvirt writes it."""
    pieces: list[list[int]] = []
    for number in sorted(numbers):
        if pieces and pieces[-1][-1] == number - 1:
            pieces[-1] = [pieces[-1][0], number]
        else:
            pieces.append([number])
    return ",".join("-".join(map(str, piece)) for piece in pieces)


def _one_by_one(table: dict[str, str]) -> dict[int, int]:
    """Each number of the keys, and the one in the same place of its value.  Raises ValueError."""
    found: dict[int, int] = {}
    for key, value in table.items():
        theirs, ours = _numbers(key), _numbers(value)
        if len(theirs) != len(ours):
            raise ValueError(f"{key!r} has {len(theirs)} members and {value!r} has {len(ours)}")
        if twice := found.keys() & set(theirs):
            raise ValueError(f"{min(twice)} is named twice")
        found.update(zip(theirs, ours, strict=True))
    return found


def _check_sets(table: dict[str, str]) -> dict[str, str]:
    try:
        _one_by_one(table)
    except ValueError as error:
        refuse(str(error), 'write sets of equal size, and each number of the source once: { "0-3,8" = "4-7,12" }')
    return table


def _check_names(table: dict[str, str]) -> dict[str, str]:
    if not all(key and value for key, value in table.items()):
        refuse("a name is empty", "name what the source has, and what takes its place here")
    return table


Names = Annotated[dict[str, str], AfterValidator(_check_names)]
Sets = Annotated[dict[str, str], AfterValidator(_check_sets)]


class Replacements(Table):
    """``replace``: on the left what the XML of a domain says, on the right what stands there on this host."""

    paths: dict[str, str] = Field(
        default={},
        description="absolute paths of disks, file systems, firmware, kernels, character devices and the emulator; "
        "a directory ends with `/` and stands for all that is below it",
    )
    networks: Names = Field(default={}, description="libvirt's networks")
    bridges: Names = Field(default={}, description="bridges of the host")
    links: Names = Field(
        default={}, description="network devices of the host that an interface uses directly (macvtap)"
    )
    cpus: Sets = Field(
        default={},
        description="processors that the domain is pinned to, as sets of equal size: the first of one becomes the first of the other",
    )
    nodes: Sets = Field(default={}, description="NUMA nodes that memory is bound to, as sets of equal size")

    @field_validator("paths")
    @classmethod
    def _absolute(cls, table: dict[str, str]) -> dict[str, str]:
        for key, value in table.items():
            if not (key.startswith("/") and value.startswith("/")):
                refuse(f"{key!r} or {value!r} is not absolute", "give absolute paths")
            if key.endswith("/") != value.endswith("/"):
                refuse(f"only one of {key!r} and {value!r} is a directory", "end both with '/', or neither")
        return table

    def apply(self, text: str) -> tuple[str, list[str]]:
        """The XML with all replacements, and a line for each.  Raises ET.ParseError.  ``text`` itself if nothing matches."""
        root = ET.fromstring(text)  # noqa: S314 - its size is bounded; expat refuses entities that grow
        cpus, nodes = _one_by_one(self.cpus), _one_by_one(self.nodes)
        work: list[tuple[tuple[_Place, ...], Callable[[str], str]]] = [
            (_PATHS, self._path),
            (_NETWORKS, lambda name: self.networks.get(name, name)),
            (_BRIDGES, lambda name: self.bridges.get(name, name)),
            (_LINKS, lambda name: self.links.get(name, name)),
            (_CPUS, lambda members: _mapped(members, cpus)),
            (_NODES, lambda members: _mapped(members, nodes)),
        ]
        done = [line for places, change in work for place in places for line in _replace(root, place, change)]
        return (ET.tostring(root, encoding="unicode") if done else text), done

    def _path(self, path: str) -> str:
        """The path on this host: the longest directory named wins, and a whole path over all of them."""
        if path in self.paths:
            return self.paths[path]
        directories = [name for name in self.paths if name.endswith("/") and path.startswith(name)]
        longest = max(directories, key=len, default="")
        return self.paths[longest] + path[len(longest) :] if longest else path


def _replace(root: ET.Element, place: _Place, change: Callable[[str], str]) -> list[str]:
    done = []
    for element in root.findall(place.path):
        before = element.get(place.attribute) if place.attribute else element.text
        after = change(before) if before else before
        if not before or not after or after == before:
            continue
        if place.attribute:
            element.set(place.attribute, after)
        else:
            element.text = after
        done.append(f"{place}: {before} → {after}")
    return done


def _mapped(members: str, table: dict[int, int]) -> str:
    """The members as they are on this host.  Those that are no set are left to libvirt, which refuses them."""
    try:
        before = set(_numbers(members))
    except ValueError:
        return members
    after = {table.get(number, number) for number in before}
    return members if after == before else _written(after)
