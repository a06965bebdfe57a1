"""``migrated check`` and ``migrated inspect``: what this host and a process on it can do; no agent is needed for either."""

from __future__ import annotations

import asyncio
import dataclasses
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from migrated.cli import failure, rendering
from migrated.cli.migrations import json_flag, print_json
from migrated.config import KINDS, default_path, load
from migrated.errors import ConfigError, GuestError
from migrated.guests.libvirt.config import DEFAULT_URI
from migrated.units import format_size

if TYPE_CHECKING:
    from migrated.config import Role
    from migrated.guests.libvirt.confinement import Confinement
    from migrated.guests.qemu.target_table import Answers
    from migrated.memory.defects import Finding
    from migrated.memory.inspection import MemoryFile
    from migrated.memory.maps import Area
    from migrated.memory.probe import Requirement
    from migrated.memory.regions import SourceMemory


@click.command()
@click.option("--role", type=click.Choice(["source", "target"]), help="Only what this agent needs.")
@click.option("--hanging", is_flag=True, help="Also try what on some kernels leaves a process that only a reboot ends.")
@json_flag
def check(*, role: str | None, hanging: bool, as_json: bool) -> int:
    """Say whether this host can do it: each failing need with its fix, each kernel defect with the guests it concerns."""
    from migrated.guests.libvirt import confinement
    from migrated.memory import defects, probe  # loads the C core

    every = [*probe.requirements(), *confinement.requirements()]
    needs = [need for need in every if role is None or need.role in ("both", role)]
    needs += [need for name in KINDS if role in (None, name) for need in _certificate(name)]
    found = [finding for finding in defects.findings(hanging=hanging) if role is None or finding.role == role]
    ok = all(need.ok for need in needs if need.needed)
    if as_json:
        print_json(
            {
                "ok": ok,
                "kernel": platform.release(),
                "requirements": [dataclasses.asdict(need) for need in needs],
                "kernel_defects": [dataclasses.asdict(finding) for finding in found],
            }
        )
    else:
        _print_needs(needs)
        _print_findings(found)
    return failure.DONE if ok else failure.FAILED


def _certificate(role: Role) -> list[Requirement]:
    """Whether the agent of a role, if this host has a configuration for it, can prove who it is."""
    from migrated.link.credentials import Credentials
    from migrated.memory.probe import Requirement

    def need(found: str, fix: str = "", *, needed: bool = True) -> list[Requirement]:
        return [Requirement(f"certificate of the {role} agent", role, needed, not fix, found, fix)]

    if not default_path(role).exists():
        return []
    try:
        settings = load(None, role)
        if settings.tls_files is None:
            return need("none: tls.insecure")
        credentials = Credentials(settings.tls_files, role=role, peers=settings.tls.peers, where=settings.path)
    except ConfigError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        return need("missing" if missing else "unusable", f"{error.message}; {error.hint}")
    expires = time.strftime("%Y-%m-%d", time.gmtime(credentials.expires_at))
    problems = "; ".join(credentials.problems())
    return need(
        f"{'valid until' if credentials.valid else 'not valid:'} {expires}", problems, needed=not credentials.valid
    )


def _print_needs(needs: list[Requirement]) -> None:
    table = rendering.plain_table("", "NEED", "FOR", "FOUND")
    for need in needs:
        table.add_row(_mark(need), need.name, need.role, need.found)
    out = rendering.console()
    out.print(table)
    for need in needs:
        if not need.ok:
            kind = "fix" if need.needed else "for more"
            out.print(f"{kind}: {need.name}: {need.fix}", markup=False, soft_wrap=True)


def _mark(need: Requirement) -> str:
    if need.ok:
        return "[green]ok[/green]"
    return "[red]FAILS[/red]" if need.needed else "[yellow]without[/yellow]"


_STATES = {
    "absent": "[green]ok[/green]",
    "handled": "[green]handled[/green]",
    "excludes": "[red]EXCLUDES[/red]",
    "untested": "[yellow]unknown[/yellow]",
}


def _print_findings(found: list[Finding]) -> None:
    table = rendering.plain_table("", "KERNEL", "FOR", "FOUND")
    for finding in found:
        table.add_row(
            _STATES[finding.state], rendering.literal(finding.name), finding.role, rendering.literal(finding.found)
        )
    out = rendering.console()
    out.print()
    out.print(table)
    for finding in found:
        if finding.effect:
            out.print(f"{finding.name}: {finding.effect}", markup=False, soft_wrap=True)


@click.command()
@click.argument("guest", metavar="PID|DOMAIN")
@click.option("--target-config", is_flag=True, help="Print the guest's table for the target's configuration.")
@click.option("--name", default="", help="The guest's name in that table (default: as QEMU's -name says).")
@click.option("--qmp", type=click.Path(), help="QEMU's QMP socket: ask it what /proc does not say.")
@click.option("--uri", default=DEFAULT_URI, show_default=True, help="Where libvirt's DOMAIN is.")
@json_flag
def inspect(*, guest: str, target_config: bool, name: str, qmp: str | None, uri: str, as_json: bool) -> int:
    """Say which memory of a process or of libvirt's DOMAIN can be migrated, or print a target's configuration for it."""
    if not guest.isdecimal():
        if target_config or name or qmp is not None:
            raise click.UsageError(
                "a domain needs no table and no QMP socket: --target-config, --name and --qmp are for a PID"
            )
        return _print_domain(guest, uri, as_json=as_json)
    pid = int(guest)
    if target_config:
        return _print_target_config(pid, name, qmp, as_json=as_json)
    if name:
        raise click.UsageError("--name names the guest of --target-config")
    return _print_memory(pid, qmp, as_json=as_json)


def _print_target_config(pid: int, name: str, qmp: str | None, *, as_json: bool) -> int:
    from migrated.guests.qemu import target_table as qemu_target_table

    running = qemu_target_table.read_running(pid)
    answers = asyncio.run(_ask(pid, name, qmp)) if qmp is not None else None
    table = qemu_target_table.target_table(running, name=name, qmp=qmp or "", answers=answers)
    if as_json:
        print_json({"name": table.name, "target_config": str(table), "checks": table.every_check})
    else:
        print(table, end="")
    return failure.DONE


async def _ask(pid: int, name: str, qmp: str) -> Answers:
    """Raises GuestError as `Monitor.connect` and `_check_peer` do."""
    from migrated.guests.qemu import target_table as qemu_target_table
    from migrated.guests.qemu.qmp import Monitor

    monitor = await Monitor.connect(name or str(pid), Path(qmp))
    try:
        _check_peer(pid, qmp, monitor.peer_pid())
        return await qemu_target_table.ask(monitor)
    finally:
        await monitor.close()


def _check_peer(pid: int, qmp: str, peer: int) -> None:
    """Raises GuestError ``wrong-qmp`` if another process than ``pid`` listens there."""
    if peer != pid:
        raise GuestError(
            f"{qmp} is the QMP socket of process {peer}, not of process {pid}",
            code="wrong-qmp",
            hint="give the QMP socket of the QEMU that is inspected",
        )


async def _open_guest(pid: int, qmp: str) -> SourceMemory:
    """What the source's driver finds.  Raises GuestRefusedError with its reason if it cannot migrate the guest."""
    from migrated.guests.qemu.config import QemuSourceConfig
    from migrated.guests.qemu.source import QemuSource
    from migrated.settings import Timeouts

    guest = QemuSource(str(pid), QemuSourceConfig(qmp=qmp), Timeouts())
    try:
        memory = await guest.open()
        _check_peer(pid, qmp, memory.pid)
        return memory
    finally:
        await guest.close()


def _print_memory(pid: int, qmp: str | None, *, as_json: bool) -> int:
    from migrated.memory import inspection, maps

    if qmp is None:
        rows = [_row(one) for one in inspection.inspect(pid)]
    else:
        memory = asyncio.run(_open_guest(pid, str(Path(qmp).absolute())))
        areas = maps.areas(pid)
        rows = [_region_row(memory, index, areas) for index in range(len(memory.regions))]
    return _print_process(pid, rows, as_json=as_json)


def _print_domain(name: str, uri: str, *, as_json: bool) -> int:
    from migrated.guests.libvirt import confinement
    from migrated.memory import maps

    memory = asyncio.run(_open_domain(name, uri))
    areas = maps.areas(memory.pid)
    rows = [_region_row(memory, index, areas) for index in range(len(memory.regions))]
    return _print_process(memory.pid, rows, as_json=as_json, confined=confinement.of_process(memory.pid))


async def _open_domain(name: str, uri: str) -> SourceMemory:
    """What the source's driver finds.  Raises GuestRefusedError with its reason if it cannot migrate the domain."""
    from migrated.guests.libvirt.config import LibvirtSourceConfig
    from migrated.guests.libvirt.source import LibvirtSource
    from migrated.settings import Timeouts

    guest = LibvirtSource(name, LibvirtSourceConfig(uri=uri), Timeouts())
    try:
        return await guest.open()
    finally:
        await guest.close()


def _print_process(pid: int, rows: list[dict[str, Any]], *, as_json: bool, confined: Confinement | None = None) -> int:
    from migrated.memory import maps

    movable = any(row["movable"] for row in rows)
    if as_json:
        more = {"confinement": dataclasses.asdict(confined)} if confined is not None else {}
        print_json({"pid": pid, "command": maps.command(pid), "movable": movable, "memory": rows, **more})
    else:
        print(f"{maps.command(pid)} (process {pid})")
        _print_rows(rows)
        if confined is not None:
            print(
                f"{confined.module} confines it ({confined.label}), and may deny what a migration does: {confined.fix}"
            )
    return failure.DONE if movable else failure.FAILED


def _region_row(memory: SourceMemory, index: int, areas: list[Area]) -> dict[str, Any]:
    region = memory.regions[index]
    address = next(mapping.address for mapping in memory.mappings if mapping.region == index)
    return {
        "file": region.name,
        "size_bytes": region.size_bytes,
        "page_bytes": region.page_bytes,
        "shared": any(area.shared for area in areas if area.start <= address < area.end),
        "movable": True,
        "reason": "",
    }


def _row(memory: MemoryFile) -> dict[str, Any]:
    return {
        "file": memory.path or "(private memory)",
        "size_bytes": memory.size_bytes,
        "page_bytes": memory.page_bytes,
        "shared": memory.shared,
        "movable": not memory.problem,
        "reason": memory.problem,
    }


def _print_rows(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("no memory that could be a guest's")
        return
    table = rendering.plain_table("MOVABLE", "SIZE", "PAGES", "SHARED", "MEMORY", "REASON")
    for row in rows:
        table.add_row(
            "[green]yes[/green]" if row["movable"] else "[red]no[/red]",
            format_size(row["size_bytes"]),
            format_size(row["page_bytes"]),
            "yes" if row["shared"] else "no",
            rendering.literal(row["file"]),
            rendering.literal(row["reason"] or "-"),
        )
    rendering.console().print(table)
