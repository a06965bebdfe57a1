"""A domain that libvirt manages migrates to another libvirt and back; virsh tells the truth about it on both."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from migrated.guests.libvirt import connection
from migrated.guests.libvirt.config import LibvirtSourceConfig
from migrated.guests.libvirt.source import LibvirtSource
from migrated.guests.qemu.state import HeaderDecoder
from migrated.privileged import open_files
from migrated.settings import Timeouts
from tests.libvirt.conftest import Domains
from tests.rig.guest import MIB
from tests.rig.host import PROGRAM
from tests.rig.libvirt_host import LibvirtHost, domain_xml
from tests.rig.moving_domain import MovingDomain

pytestmark = [
    pytest.mark.root,
    pytest.mark.hugepages,
    pytest.mark.guest,
    pytest.mark.timeout(300),  # on a busy machine; usually seconds
    pytest.mark.asyncio(loop_scope="module"),
]


async def inspect(domain: str, uri: str) -> dict[str, Any]:
    """What `migrated inspect` says of a domain."""
    process = await asyncio.create_subprocess_exec(
        *(*PROGRAM, "inspect", domain, "--uri", uri, "--json"), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    answer: dict[str, Any] = json.loads(out)
    return answer


async def guests(domain: MovingDomain) -> dict[str, dict[str, Any]]:
    """What `migrated guests` says on the domain's host, by the guests' names."""
    await domain.here.source()
    process = await asyncio.create_subprocess_exec(
        *(*PROGRAM, "guests", "--json", "--agent", str(domain.here.directory / "source")),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    answer: dict[str, Any] = json.loads(out)
    assert answer["problems"] == []
    return {guest["name"]: guest for guest in answer["guests"]}


@pytest.mark.timeout(900)  # ten migrations
async def test_a_domain_on_default_memory_makes_five_round_trips_in_every_mode(domains: Domains) -> None:
    """Default memory there, huge pages here, and so on; all of it is verified after each migration."""
    async with domains(persistent=True) as domain:
        await domain.libvirt.virsh("autostart", domain.name)
        assert await domain.states() == ("running", "none")

        inspected = await inspect(domain.name, domain.libvirt.uri)
        assert {"pc.ram", "pc.bios"} <= {row["file"] for row in inspected["memory"] if row["movable"]}
        assert [inspected["pid"]] == domain.pids

        there = await domain.move(mode="hybrid", downtime_limit_ms=2000)
        assert there.target["page_size"] == 2 * MIB
        assert there.source["total_bytes"] > domain.memory_bytes  # firmware and ACPI tables too
        assert await domain.states() == ("running", "shut off")
        # It is defined where it runs, and does not start by itself where it was.
        info = await domain.libvirt.virsh("dominfo", domain.name)
        assert "Persistent:     yes" in info
        assert "Autostart:      enable" in info
        assert "Autostart:      disable" in await domain.other_libvirt.virsh("dominfo", domain.name)
        assert await domain.libvirt.virsh("desc", "--title", domain.name) == f"the title of {domain.name}"
        assert "kept" in await domain.libvirt.virsh("metadata", domain.name, "urn:migrated:test")

        back = await domain.move(mode="precopy", downtime_limit_ms=2000)
        assert (back.target["page_size"], back.source["stale_pages"]) == (4096, 0)
        there = await domain.move(mode="postcopy")
        assert there.source["stale_pages"] > 0
        await domain.move(mode="postcopy")
        for mode in ("hybrid", "postcopy", "precopy"):
            for page_size in (2 * MIB, 4096):
                moved = await domain.move(mode=mode, downtime_limit_ms=2000)
                assert moved.target["page_size"] == page_size
        assert await domain.states() == ("running", "shut off")
        assert "Autostart:      enable" in await domain.libvirt.virsh("dominfo", domain.name)


async def test_a_transient_domain_stays_transient_and_a_paused_one_paused(domains: Domains) -> None:
    video = "<video><model type='vga'/></video>"
    async with domains(persistent=False, devices=video) as domain:
        await domain.move(downtime_limit_ms=2000)
        assert await domain.states() == ("running", "none")
        assert "Persistent:     no" in await domain.libvirt.virsh("dominfo", domain.name)

        before = await domain.console.stats()
        await domain.libvirt.virsh("suspend", domain.name)
        await domain.arrive(await domain.begin())
        assert await domain.states() == ("paused", "none")
        await domain.libvirt.virsh("resume", domain.name)
        await domain.assert_sound(before)


async def test_memory_that_libvirt_would_preallocate_is_not_held_twice(domains: Domains) -> None:
    backing = "<source type='memfd'/><access mode='shared'/><allocation mode='immediate'/>"
    async with domains(memory=backing) as domain:
        await domain.move(downtime_limit_ms=2000)
        assert "immediate" not in await domain.libvirt.virsh("dumpxml", domain.name)
        assert "immediate" in await domain.libvirt.virsh("dumpxml", "--inactive", domain.name)
        await domain.move(downtime_limit_ms=2000)


async def test_what_differs_on_the_target_is_replaced_and_the_hook_is_asked(
    domains: Domains, libvirts: tuple[LibvirtHost, ...]
) -> None:
    common = libvirts[0].directory.parent
    hook = common / "hook"

    def have_the_hook_run(command: str) -> None:
        text = common / "hook.new"
        text.write_text(f"#!/bin/sh\nexec {command}\n")
        text.chmod(0o755)
        text.rename(hook)

    have_the_hook_run("cat")
    here, there = f"{common}/boot/", f"{common}/boot-of-b/"
    target = {"replace": {"paths": {here: there, there: here}}, "xml_hook": str(hook)}
    async with domains(target=target) as domain:
        Path(there.rstrip("/")).symlink_to(here)  # noqa: ASYNC240 - at once
        for command, code, problem in (
            ("sh -c 'echo the inventory is down >&2; exit 1'", "xml-hook", "the inventory is down"),
            ("sed s/acpi/apic/", "guest-start", "feature 'acpi'"),  # libvirt's own check of the guest's ABI
        ):
            have_the_hook_run(command)
            record = await domain.fail()
            assert record["error"]["code"] == code, record["error"]
            assert problem in record["error"]["message"]
            assert await domain.states() == ("running", "none")

        have_the_hook_run("sed 's/the title of/the new title of/'")
        await domain.move(downtime_limit_ms=2000, undefine_source=True)
        assert await domain.states() == ("running", "none")
        for options in ((), ("--inactive",)):
            xml = await domain.libvirt.virsh("dumpxml", domain.name, *options)
            assert f"<kernel>{there}kernel</kernel>" in xml
            assert "<title>the new title of" in xml

        have_the_hook_run("cat")
        await domain.move(downtime_limit_ms=2000, persistent="no", undefine_source=True)
        assert f"<kernel>{here}kernel</kernel>" in await domain.libvirt.virsh("dumpxml", domain.name)
        assert await domain.states() == ("running", "none")
        assert "Persistent:     no" in await domain.libvirt.virsh("dominfo", domain.name)
        await domain.move(downtime_limit_ms=2000, persistent="yes")
        assert "Persistent:     yes" in await domain.libvirt.virsh("dominfo", domain.name)


class Collected:
    """Takes the state that a source sends."""

    def __init__(self) -> None:
        self.data = b""

    async def read(self) -> bytes:
        return b""

    async def write(self, data: bytes) -> None:
        self.data += data

    async def close_write(self) -> None:
        pass


async def test_a_libvirt_that_passes_no_descriptors_is_no_obstacle(
    domains: Domains, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One before 8.2.  Either way the state comes out, and nothing is left in QEMU when the domain runs on."""
    async with domains() as domain:
        headers = []
        for passes in (True, False):
            if not passes:
                monkeypatch.delattr(connection.binding("vm")[1], "qemuMonitorCommandWithFiles")
            before = await domain.console.stats()
            guest = LibvirtSource(domain.name, LibvirtSourceConfig(uri=domain.libvirt.uri), Timeouts())
            try:
                memory = await guest.open()
                assert [memory.pid] == domain.pids
                held = len(open_files(memory.pid))
                channel = Collected()
                await guest.pause(channel)
                await guest.send_state(channel)
                await guest.resume()
                assert len(open_files(memory.pid)) == held
            finally:
                await guest.close()
            decoder = HeaderDecoder()
            assert decoder.feed(channel.data)
            assert decoder.rest
            headers.append(decoder.header)
            await domain.assert_sound(before)
        assert headers[0] == headers[1]


@contextlib.asynccontextmanager
async def another_domain(domain: MovingDomain, name: str, devices: str) -> AsyncIterator[None]:
    """A second domain beside ``domain``, which never runs."""
    xml = domain_xml(domain.directory, name, 64 * MIB, devices=devices).replace("console.sock", f"{name}.sock")
    path = domain.libvirt.directory / f"{name}.xml"
    path.write_text(xml)
    await domain.libvirt.virsh("create", "--paused", str(path))
    try:
        yield
    finally:
        await domain.libvirt.forget(name)


async def test_guests_lists_what_can_be_migrated_and_why_the_rest_cannot(domains: Domains) -> None:
    async with domains() as domain:
        shared = "<shmem name='window'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem>"
        tables = domain.here.source_guests
        tables["shop"] = {"driver": "libvirt", "uri": domain.libvirt.uri, "domain": "shared"}
        tables["gone"] = {"driver": "libvirt", "uri": domain.libvirt.uri}
        tables["off"] = {"driver": "qemu", "qmp": str(domain.directory / "nobody.qmp")}
        async with another_domain(domain, "shared", shared), another_domain(domain, "stranger", ""):
            before = await domain.console.stats()
            listed = await guests(domain)
            assert set(listed) == {domain.name, "shop", "gone", "off", "stranger"}
            fine, refused = listed[domain.name], listed["shop"]
            assert (fine["state"], fine["memory_bytes"], fine["migratable"]) == ("running", domain.memory_bytes, True)
            assert fine["error"] is None
            assert (refused["driver"], refused["memory_bytes"]) == ("libvirt", 64 * MIB)
            assert "memory shared with others" in refused["error"]["message"]
            codes = {name: guest["error"]["code"] for name, guest in listed.items() if not guest["migratable"]}
            assert codes == {
                "shop": "unsupported-device",
                "gone": "no-domain",
                "off": "qmp-unreachable",
                "stranger": "unknown-guest",
            }
            await domain.assert_sound(before)
        migration = await domain.begin(mode="hybrid", max_bandwidth="1MB")
        source = await domain.here.source()
        assert (await source.wait(migration, "precopy"))["state"] == "precopy"
        busy = (await guests(domain))[domain.name]
        assert (busy["state"], busy["error"]["code"]) == ("precopy", "guest-migrating")
        await source.request("POST", f"/v1/migrations/{migration}/set", {"max_bandwidth": "0"})
        await domain.arrive(migration)
        await domain.assert_sound(before)
