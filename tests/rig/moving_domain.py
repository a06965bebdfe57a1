"""A self-checking domain that moves between two libvirts, each with agents of its own."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from migrated.demo.console import GuestConsole
from tests.rig.guest import MIB, OnTheMove
from tests.rig.host import Host
from tests.rig.libvirt_host import LibvirtHost, domain_xml
from tests.rig.traces import end_processes

NAME = "vm"
MEMORY_BYTES = 128 * MIB


class MovingDomain(OnTheMove):
    """The domain, on ``hosts[at]`` and ``libvirts[at]`` now.  Made by `moving_domain`."""

    def __init__(self, hosts: tuple[Host, Host], libvirts: tuple[LibvirtHost, ...], directory: Path) -> None:
        super().__init__(NAME, hosts, directory, MEMORY_BYTES)
        self.libvirts = libvirts
        self._console = GuestConsole(NAME)

    @property
    def console(self) -> GuestConsole:
        return self._console

    @property
    def next_console(self) -> Path:
        return self.libvirts[1 - self.at].console

    @property
    def libvirt(self) -> LibvirtHost:
        """The one that has it."""
        return self.libvirts[self.at]

    @property
    def other_libvirt(self) -> LibvirtHost:
        """The one it would move to."""
        return self.libvirts[1 - self.at]

    async def states(self) -> tuple[str, str]:
        """What virsh says of it, here and there."""
        return await self.libvirt.state(NAME), await self.other_libvirt.state(NAME)

    async def start(self, xml: str, *, persistent: bool) -> None:
        """Boot it."""
        await self.libvirt.start_domain(xml, persistent=persistent)
        await self.console.attach(self.libvirt.console)
        await self.console.wait_booted(120)

    async def stop(self) -> None:
        """End the agents, and the domain on whichever libvirt it is."""
        try:
            await self.stop_agents()
            await self.console.close()
        finally:
            for libvirt in self.libvirts:
                await libvirt.forget(NAME)
            end_processes(self.directory)
        self.assert_no_complaints()


@contextlib.asynccontextmanager
async def moving_domain(
    libvirts: tuple[LibvirtHost, ...],
    directory: Path,
    *,
    page_size: tuple[str, str] = ("4K", "2M"),
    config: dict[str, Any] | None = None,
    target: dict[str, Any] | None = None,
    persistent: bool = True,
    **domain: Any,
) -> AsyncIterator[MovingDomain]:
    """A booted domain on the first of two libvirts, with agents in ``directory``.

    ``page_size`` on the first and on the second host; ``config``: sections for all agents; ``target``: keys of ``[libvirt]`` on
    both targets; ``domain``: arguments of `domain_xml`.
    """
    load = {"size": "60%", "rate": 1000, "pattern": "hot", **domain}
    hosts = []
    for name, libvirt, size in zip("ab", libvirts, page_size, strict=True):
        source = {"uri": libvirt.uri, "domains": [NAME]}
        accept = {"uri": libvirt.uri, "accept": [NAME], "page_size": size, **(target or {})}
        hosts.append(Host(directory, name, config=config, source={"libvirt": source}, target={"libvirt": accept}))
    moving = MovingDomain((hosts[0], hosts[1]), libvirts, libvirts[0].directory.parent)
    try:
        xml = domain_xml(libvirts[0].directory.parent, NAME, MEMORY_BYTES, **load)
        await moving.start(xml, persistent=persistent)
        yield moving
    finally:
        await moving.stop()
