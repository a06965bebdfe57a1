"""The domains that run under a libvirt, whether or not they can be migrated."""

from __future__ import annotations

import dataclasses
from typing import Any

from migrated.guests.libvirt.connection import Connection


@dataclasses.dataclass(frozen=True, slots=True)
class RunningDomain:
    """An active domain, as libvirt describes it."""

    uri: str
    name: str
    state: str
    memory_bytes: int


async def running_domains(uri: str, *, limit_seconds: float) -> list[RunningDomain]:
    """List the active domains.  Takes no domain's job lock.  Raises as `Connection.connect` and `Connection.call`."""
    connection = await Connection.connect("", uri, limit_seconds=limit_seconds)
    try:
        return await connection.call("listing the domains", _list, connection, limit_seconds=limit_seconds)
    finally:
        await connection.close()


def _list(connection: Connection) -> list[RunningDomain]:
    libvirt = connection.libvirt
    found = []
    for domain in connection.handle.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        try:
            state, _ = domain.state()
            size = domain.maxMemory() << 10
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                continue  # a transient domain that has ended meanwhile
            raise
        found.append(RunningDomain(connection.uri, domain.name(), _state_name(libvirt, state), size))
    return found


def _state_name(libvirt: Any, state: int) -> str:
    names = {
        libvirt.VIR_DOMAIN_RUNNING: "running",
        libvirt.VIR_DOMAIN_BLOCKED: "running",
        libvirt.VIR_DOMAIN_PAUSED: "paused",
        libvirt.VIR_DOMAIN_SHUTDOWN: "shutdown",
        libvirt.VIR_DOMAIN_CRASHED: "crashed",
        libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended",
    }
    return names.get(state, "unknown")
