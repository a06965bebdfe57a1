"""Derive a target's ``[guests.NAME]`` table from the command line of a running QEMU (``inspect --target-config``).

Options keep their order and their text.  What the agent provides is replaced or left out, and stays visible in a ``#
was:`` comment.  What only the operator of the target can know is kept and marked ``# check:``.  Nothing is dropped
without a comment.

The driver pairs the memory of the two sides by the names of QEMU's RAM blocks.  A backend's block is named after the
backend's id, the default RAM after the machine type (``pc.ram``), so default RAM becomes a backend of that id.  Up to
machine version 3.1 the block of a memory-backend-file (or -memfd) is called ``/objects/ID`` and that of a
memory-backend-ram ``ID``; replacing one by the other needs ``x-use-canonical-path-for-ramblock-id=off`` there, as
libvirt does it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from migrated.errors import GuestError, GuestRefusedError, UsageError
from migrated.guests.qemu import memory as qemu_memory
from migrated.guests.qemu.host_parts import doubts
from migrated.guests.qemu.options import Option, Properties, format_size, parse_options, parse_size
from migrated.guests.qemu.qmp import Monitor
from migrated.settings import GUEST_NAME

_DEFAULT_MEMORY_BYTES = 128 << 20
_DEFAULT_PAGE_BYTES = 2 << 20
_CANONICAL = "x-use-canonical-path-for-ramblock-id"

#: Backends whose memory the agent can provide, and their properties: kept, or replaced by the agent's.
_BACKENDS = frozenset({"memory-backend-ram", "memory-backend-memfd", "memory-backend-file", "memory-backend-shm"})
_KEPT = frozenset({"qom-type", "id", "size", "merge", "dump", "align", _CANONICAL})
_REPLACED = frozenset(
    {"share", "mem-path", "hugetlb", "hugetlbsize", "seal", "discard-data", "reserve"}
    | {"prealloc", "prealloc-threads", "prealloc-context"}
)

#: Options whose value is properties, and the key that their first property may leave out.
# fmt: off
_KEYED = {
    "M": "type", "accel": "accel", "acpitable": "", "add-fd": "", "audiodev": "driver", "blockdev": "driver",
    "chardev": "backend", "device": "driver", "display": "type", "drive": "", "fsdev": "fsdriver", "fw_cfg": "name",
    "m": "size", "machine": "type", "mon": "chardev", "net": "type", "netdev": "type", "nic": "type", "numa": "type",
    "object": "qom-type", "overcommit": "", "plugin": "file", "smbios": "", "spice": "", "tpmdev": "type",
    "virtfs": "fsdriver", "vnc": "vnc",
}
# fmt: on
_VERSIONED = re.compile(r"-(\d+)\.(\d+)(?:\.\d+)?$")
_SERVER = "server=on,wait=off"


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """How a QEMU process was started."""

    pid: int
    arguments: tuple[str, ...]  # the program first
    program: str  # the file that runs
    directory: str
    uid: int


@dataclasses.dataclass(frozen=True, slots=True)
class Answers:
    """What the running QEMU reports over QMP and its command line does not show."""

    version: str
    machine: str  # not an alias
    default_ram: str  # name of the machine type's own RAM block; empty if QEMU does not report it (before 5.2)
    backends: frozenset[str]
    blocks: frozenset[str]  # RAM blocks, without /objects/


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Arguments that belong together, with comments: what the source had instead, and what to check."""

    words: tuple[str, ...]
    was: str = ""
    checks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TargetTable:
    """A target's ``[guests.NAME]`` table.  ``checks``: what to check that belongs to no single argument."""

    name: str
    page_size: str
    lines: tuple[Line, ...]
    origin: str
    checks: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """Return the command as the agent parses it."""
        return [word for line in self.lines for word in line.words]

    @property
    def every_check(self) -> list[str]:
        """Return all checks, in the order of the text."""
        return [*self.checks, *(check for line in self.lines for check in line.checks)]

    def __str__(self) -> str:
        return "".join(f"{line}\n" for line in self._text())

    def _text(self) -> Iterator[str]:
        yield _comment("", self.origin)
        yield from (_comment("check: ", check) for check in self.checks)
        yield f"[guests.{_toml_key(self.name)}]"
        yield 'driver = "qemu"'
        yield f'page_size = "{self.page_size}"  # may differ from the source\'s; "4K" needs no huge pages'
        yield "command = ["
        for line in self.lines:
            if line.was:
                yield "    " + _comment("was: ", line.was)
            yield from ("    " + _comment("check: ", check) for check in line.checks)
            if line.words:
                yield "    " + ", ".join(_toml_string(word) for word in line.words) + ","
        yield "]"


def read_running(pid: int) -> Running:
    """Read how a process was started.

    Raises GuestError ``guest-gone`` or ``no-rights``, GuestRefusedError ``not-qemu``.
    """
    folder = Path("/proc") / str(pid)
    try:
        raw = (folder / "cmdline").read_bytes()
        program = str((folder / "exe").readlink()).removesuffix(" (deleted)")
        directory = str((folder / "cwd").readlink())
        uid = folder.stat().st_uid
    except (FileNotFoundError, ProcessLookupError) as error:
        raise GuestError(f"process {pid} has ended", code="guest-gone") from error
    except PermissionError as error:
        raise GuestError(
            f"cannot look at process {pid}: {error.strerror}",
            code="no-rights",
            hint="run as root, or as the user the process runs as",
        ) from error
    arguments = tuple(os.fsdecode(word) for word in raw.removesuffix(b"\0").split(b"\0"))
    if not any(_is_qemu(name) for name in (program, arguments[0])):
        raise GuestRefusedError(
            f"process {pid} ({program}) is not a QEMU",
            code="not-qemu",
            hint="give the process id of qemu-system-…, not of a wrapper around it",
        )
    return Running(pid, arguments, program, directory, uid)


def _is_qemu(program: str) -> bool:
    return re.search(r"qemu|kvm", Path(program).name) is not None


async def ask(monitor: Monitor) -> Answers:
    """Ask a running QEMU.  Raises as `Monitor.execute`."""
    machine = await qemu_memory.machine_type(monitor)
    known = await monitor.execute("query-machines")
    return Answers(
        version=".".join(map(str, await qemu_memory.version(monitor))),
        machine=machine,
        default_ram=next((str(entry.get("default-ram-id", "")) for entry in known if entry["name"] == machine), ""),
        backends=frozenset(str(entry["id"]) for entry in await monitor.execute("query-memdev") if "id" in entry),
        blocks=frozenset(block.name for block in await qemu_memory.ram_blocks(monitor)),
    )


def target_table(running: Running, *, name: str = "", qmp: str = "", answers: Answers | None = None) -> TargetTable:
    """Return the table for a guest called ``name`` (default: the name in QEMU's ``-name``).

    ``qmp``: the socket that migrated uses on the source.  Raises UsageError if ``name`` cannot be a guest's name.
    """
    return _Derivation(running, qmp, answers).table(name)


class _Derivation:
    """One pass over the options; what it finds decides what is added at the end."""

    def __init__(self, running: Running, qmp: str, answers: Answers | None) -> None:
        self._running = running
        self._answers = answers
        self._options = parse_options(running.arguments[1:])
        self._properties = [
            Properties(option.value, _KEYED[option.name]) if option.name in _KEYED and option.value else None
            for option in self._options
        ]
        self._sizes: list[int | None] = []
        self._uses_default_ram = self._find_default_ram()
        self._monitor = self._find_monitor(qmp)
        self._rules: dict[str, Callable[[int, Option], Line]] = {
            **dict.fromkeys(("incoming", "S", "daemonize"), self._by_agent),
            **dict.fromkeys(("snapshot", "loadvm"), self._refused),
            **dict.fromkeys(("mem-path", "mem-prealloc"), self._memory_option),
            **dict.fromkeys(("machine", "M"), self._machine),
            **dict.fromkeys(("qmp", "qmp-pretty"), self._qmp),
            "object": self._object,
            "chardev": self._chardev,
        }

    # ------------------------------------------------------------ what the options mean together

    def _all(self, *names: str) -> Iterator[Properties]:
        for option, properties in zip(self._options, self._properties, strict=True):
            if option.name in names and properties is not None:
                yield properties

    @property
    def _machine_type(self) -> str:
        """Return the machine type as given, perhaps an alias; empty for QEMU's default."""
        if self._answers is not None:
            return self._answers.machine
        return next((p.get("type") for p in reversed([*self._all("machine", "M")]) if "type" in p), "")

    @property
    def _old_block_names(self) -> bool:
        match = _VERSIONED.search(self._machine_type)
        return match is not None and (int(match[1]), int(match[2])) < (4, 0)

    def _used_backends(self) -> set[str]:
        """Return the backends that the command line refers to, or that have a RAM block according to QEMU."""
        used = {
            value
            for properties in self._properties
            if properties is not None
            for key, value in properties.items()
            if key == "memory-backend" or key.endswith("memdev")
        }
        if self._answers is not None:
            used |= self._answers.blocks & self._answers.backends
        return used

    def _find_default_ram(self) -> bool:
        """Whether QEMU makes the guest's RAM itself, without a backend in the command line."""
        if self._answers is not None and self._answers.blocks and self._default_ram() not in self._answers.blocks:
            return False
        named = any("memory-backend" in properties for properties in self._all("machine", "M"))
        return not named and not any("memdev" in properties for properties in self._all("numa"))

    def _memory_bytes(self) -> int | None:
        size: int | None = _DEFAULT_MEMORY_BYTES
        for properties in self._all("m"):
            if "size" in properties:
                size = parse_size(properties.get("size"), "m")
        return size

    def _default_ram(self) -> str:
        """Return the name of the machine type's own RAM block; empty if unknown."""
        if self._answers is not None and self._answers.default_ram:
            return self._answers.default_ram
        kind = self._machine_type
        if kind == "microvm":
            return "microvm.ram"
        x86 = re.search(r"(x86_64|i386|kvm)$", Path(self._running.program).name) is not None
        return "pc.ram" if re.match(r"(pc|q35|isapc)\b", kind) or (not kind and x86) else ""

    def _find_monitor(self, qmp: str) -> int:
        """Return the index of the QMP socket that the agent takes over; -1: none, the agent adds one."""
        control = {p.get("chardev") for p in self._all("mon") if p.get("mode") == "control"}
        candidates: dict[int, str] = {}
        for index, (option, properties) in enumerate(zip(self._options, self._properties, strict=True)):
            value = option.value or ""
            if option.name in {"qmp", "qmp-pretty"} and value.startswith("unix:"):
                candidates[index] = value.removeprefix("unix:").partition(",")[0]
            elif option.name == "chardev" and properties is not None and properties.get("id") in control:
                candidates |= {index: properties.get("path")} if "path" in properties or "fd" in properties else {}
        return next((index for index, path in candidates.items() if self._same(path, qmp)), next(iter(candidates), -1))

    def _same(self, path: str, qmp: str) -> bool:
        """Whether both name one socket; ``path`` may be relative to where QEMU was started."""
        return bool(path and qmp) and os.path.realpath(Path(self._running.directory, path)) == os.path.realpath(qmp)

    # ------------------------------------------------------------ the table

    def table(self, name: str) -> TargetTable:
        lines = [Line((self._program(),))]
        for index, option in enumerate(self._options):
            lines.append(self._rules.get(option.name, self._kept)(index, option))
        lines += self._added()
        lines = [self._readable(line) for line in lines]
        whole = all(size is None or size % _DEFAULT_PAGE_BYTES == 0 for size in self._sizes)
        running = self._running
        version = f", version {self._answers.version}" if self._answers is not None else ""
        origin = f"From process {running.pid} ({running.program}{version}). Go through every line marked check:"
        return TargetTable(self._name(name), "2M" if whole else "4K", tuple(lines), origin, tuple(self._general()))

    def _name(self, wanted: str) -> str:
        if wanted:
            if GUEST_NAME.fullmatch(wanted) is None:
                raise UsageError(
                    f"{wanted!r} cannot be a guest's name",
                    hint="allowed: up to 64 letters, digits, '.', '_' and '-', the first a letter or digit",
                )
            return wanted
        given = [option.value for option in self._options if option.name == "name" and option.value]
        own = Properties(given[-1], "guest").get("guest") if given else ""
        fitting = re.sub(r"[^A-Za-z0-9._-]+", "-", own).lstrip("._-")[:64]
        return fitting or "guest"

    def _program(self) -> str:
        given = self._running.arguments[0]
        findable = "/" not in given or given.startswith("/")
        return given if findable and _is_qemu(given) else self._running.program

    def _general(self) -> Iterator[str]:
        answers, names = self._answers, {option.name for option in self._options}
        if answers is None:
            yield "devices and memory that were plugged in or out since the start are not in the command line"
        else:
            known = {p.get("id") for p in self._all("object")} | {self._default_ram()}
            for backend in sorted(answers.backends - known):
                yield f"memory backend {backend} is not in the command line: add its -object, and its -device if it has one"
            yield "devices that were plugged in or out since the start are not in the command line"
        if self._running.uid:
            yield f"the source runs it as user {self._running.uid}, the agent as its own user"
        if not names & {"display", "nographic", "vnc", "spice", "sdl", "curses"}:
            yield "no -display, -nographic, -vnc or -spice: QEMU opens a window or a VNC port, as its build has it"
        if not names & {"machine", "M"} and answers is None:
            yield "no -machine: the default machine type depends on the QEMU version; name it"

    def _added(self) -> Iterator[Line]:
        """Yield the options that make QEMU's own RAM a backend of the agent's."""
        machine = self._machine_type if self._answers is not None and not any(self._all("machine", "M")) else ""
        if self._uses_default_ram:
            block, size = self._default_ram(), self._memory_bytes()
            checks = []
            if not block:
                block = "ram"
                checks.append("ram: must be the name that `info ramblock` shows for the guest's RAM (--qmp finds it)")
            if size is None:
                checks.append("size: must be what -m says")
            self._sizes.append(size)
            backend = Properties("memory-backend-file", "qom-type")
            backend.set("id", block)
            backend.set("size", format_size(size or _DEFAULT_MEMORY_BYTES))
            self._provide(backend, block)
            if self._old_block_names:
                backend.set(_CANONICAL, value=False)
            yield Line(("-object", str(backend)), was="QEMU's own memory, from -m", checks=tuple(checks))
            if not any(self._all("machine", "M")):
                machine += f"{',' if machine else ''}memory-backend={block}"
        if machine:
            yield Line(("-machine", machine), was="(no -machine)")

    @staticmethod
    def _provide(backend: Properties, name: str) -> None:
        """Have the agent provide the backend's memory."""
        backend.set("share", value=True)
        backend.set("mem-path", f"{{memory:{name}}}")

    def _readable(self, line: Line) -> Line:
        """Mark what TOML cannot carry, and what the agent would take for a placeholder of its own."""
        checks = list(line.checks)
        words = tuple(word.encode(errors="surrogateescape").decode(errors="replace") for word in line.words)
        if words != line.words:
            checks.append("bytes that are not UTF-8 were replaced")
        return dataclasses.replace(line, words=words, checks=tuple(checks))

    # ------------------------------------------------------------ one option

    @staticmethod
    def _text(option: Option) -> str:
        return " ".join(option.words)

    def _by_agent(self, _index: int, option: Option) -> Line:
        return Line((), was=f"{self._text(option)} (the agent adds what an incoming QEMU needs)")

    def _refused(self, _index: int, option: Option) -> Line:
        return Line((), was=self._text(option), checks=(f"{option.flag} does not fit a guest that arrives: left out",))

    def _memory_option(self, _index: int, option: Option) -> Line:
        return Line((), was=f"{self._text(option)} (the agent provides the memory)")

    def _machine(self, index: int, option: Option) -> Line:
        properties = self._properties[index]
        if properties is None:
            return self._kept(index, option)
        before, checks = str(properties), []
        last = [i for i, other in enumerate(self._options) if other.name in {"machine", "M"}][-1] == index
        if "type" in properties or last:
            if self._answers is not None:
                if properties.get("type") != self._answers.machine:
                    properties.set("type", self._answers.machine)
            elif not (kind := properties.get("type")):
                checks.append("no machine type: the default depends on the QEMU version; name it (--qmp finds it)")
            elif _VERSIONED.search(kind) is None and kind not in {"microvm", "isapc", "none"}:
                checks.append(
                    f"{kind}: an alias, which another QEMU version takes for another machine type: "
                    "name the version that the source runs (--qmp finds it)"
                )
        if last and self._uses_default_ram:
            properties.set("memory-backend", self._default_ram() or "ram")
        changed = str(properties) != before
        return Line((option.flag, str(properties)), was=self._text(option) if changed else "", checks=tuple(checks))

    def _object(self, index: int, option: Option) -> Line:
        backend = self._properties[index]
        if backend is None or not (kind := backend.get("qom-type")).startswith("memory-backend"):
            return self._kept(index, option)
        name = backend.get("id")
        if kind not in _BACKENDS:
            return Line(option.words, checks=(f"memory of kind {kind} cannot be provided by the agent",))
        if name not in self._used_backends():
            return Line(
                option.words,
                checks=(
                    f"nothing in the command line uses {name}; if a device does, its memory must be {{memory:{name}}}",
                ),
            )
        self._sizes.append(parse_size(backend.get("size")))
        checks = [
            f"{key}={value} was left out: it is about the source's host or file"
            for key, value in backend.items()
            if key.partition(".")[0] not in _KEPT | _REPLACED
        ]
        if parse_size(backend.get("hugetlbsize", "0")) == 1 << 30:
            checks.append("the source has it on pages of 1 GiB: choose page_size accordingly")
        if kind == "memory-backend-ram" and self._old_block_names and _CANONICAL not in backend:
            backend.set(_CANONICAL, value=False)
        for key in {key.partition(".")[0] for key, _ in backend.items()} - _KEPT:
            backend.remove(key)
        backend.set("qom-type", "memory-backend-file")
        self._provide(backend, name)
        return Line((option.flag, str(backend)), was=self._text(option), checks=tuple(checks))

    def _qmp(self, index: int, option: Option) -> Line:
        if index != self._monitor:
            return self._kept(index, option)
        return Line((option.flag, f"unix:{{qmp}},{_SERVER}"), was=self._text(option))

    def _chardev(self, index: int, option: Option) -> Line:
        properties = self._properties[index]
        if index != self._monitor or properties is None:
            return self._kept(index, option)
        properties.remove("fd")
        properties.set("path", "{qmp}")
        return Line((option.flag, str(properties)), was=self._text(option))

    def _kept(self, index: int, option: Option) -> Line:
        kind = _KEYED.get(option.name, "")
        checks = [*doubts(option, self._properties[index], kind, self._running.directory)]
        placeholders = re.findall(r"\{(?:qmp|memory:[^{}]*)\}", option.value or "")
        checks += [f"{text} is text of the source, which the agent would replace" for text in placeholders]
        return Line(option.words, checks=tuple(dict.fromkeys(checks)))


# ---------------------------------------------------------------- TOML


def _comment(kind: str, text: str) -> str:
    """Return a comment of one line, whatever is in ``text``."""
    clean = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return f"# {kind}{clean}"


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_string(name)


def _toml_string(text: str) -> str:
    """Return a literal string where that is easier to read (JSON), else a basic one."""
    if '"' in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in escaped) + '"'
