"""A program of the operator's that changes the XML of an arriving domain: XML on its standard input, XML on its output.

It runs before the target reserves or starts anything, as a user of its own, without the agent's rights and environment, and
only for a limited time.  What it may change is what libvirt's check of the guest's ABI lets pass: libvirt compares its result
with the XML that the source sent.
"""

from __future__ import annotations

import os
import pwd
import xml.etree.ElementTree as ET
from typing import Final

from migrated import programs
from migrated.errors import GuestRefusedError
from migrated.guests.libvirt.config import MAX_XML_BYTES

#: libvirt compares these too; here the error names the hook.
_KEPT: Final = ("name", "uuid", "memory", "currentMemory", "maxMemory", "vcpu")
_COMPLAINT_BYTES: Final = 1000


class XmlHook:
    """``xml_hook`` of the target's configuration, for one guest."""

    def __init__(self, guest: str, program: str, user: str, *, limit_seconds: float) -> None:
        self._guest = guest
        self._program = program
        self._user = user
        self._limit_seconds = limit_seconds

    async def change(self, text: str, kind: str) -> str:
        """Return what the program makes of the XML; ``kind``: ``domain`` (as it arrives) or ``definition``.

        Its arguments are the guest's name and ``kind``.  Raises GuestRefusedError ``xml-hook``.
        """
        command = [*self._without_rights(), self._program, self._guest, kind]
        try:
            ended = await programs.run(
                command, text.encode(), limit_seconds=self._limit_seconds, output_bytes=MAX_XML_BYTES + 1
            )
        except TimeoutError as error:
            raise self._refusal(f"did not end within {self._limit_seconds:g} s", "") from error
        complaint = ended.complaint[:_COMPLAINT_BYTES].decode(errors="replace").strip()
        if ended.status != 0:
            raise self._refusal(f"ended with status {ended.status}", complaint)
        try:
            self._check(text, ended.output)
        except ValueError as error:
            raise self._refusal(str(error), complaint) from error
        return ended.output.decode()

    def _without_rights(self) -> list[str]:
        """What the command begins with.  The kernel ends the program if this agent dies."""
        command = ["setpriv", "--no-new-privs", "--pdeathsig", "kill", "--inh-caps=-all", "--ambient-caps=-all"]
        if os.geteuid() != 0:
            return [*command, "--"]
        try:
            user = pwd.getpwnam(self._user)
        except KeyError as error:
            raise self._refusal(f"cannot run: there is no user {self._user}", "") from error
        return [
            *command,
            "--bounding-set=-all",
            f"--reuid={user.pw_uid}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
            "--",
        ]

    def _check(self, before: str, after: bytes) -> None:
        """Raise ValueError if this is no XML of the same domain."""
        if len(after) > MAX_XML_BYTES:
            raise ValueError(f"wrote more than {MAX_XML_BYTES} bytes")
        try:
            old, new = ET.fromstring(before), ET.fromstring(after.decode())  # noqa: S314 - bounded; expat refuses entities that grow
        except (ET.ParseError, UnicodeDecodeError) as error:
            raise ValueError(f"wrote something else than XML: {error}") from error
        if new.tag != "domain":
            raise ValueError(f"wrote no domain but <{new.tag}>")
        for name in _KEPT:
            if _value(old, name) != _value(new, name):
                raise ValueError(f"changed <{name}>, which must stay as it is")

    def _refusal(self, problem: str, complaint: str) -> GuestRefusedError:
        problem = f"{problem}: {complaint}" if complaint else problem
        return GuestRefusedError(
            f"guest {self._guest}: xml_hook {self._program} {problem}",
            code="xml-hook",
            hint=f"run it by hand as user {self._user}: it reads a domain's XML and writes it with its changes",
        )


def _value(domain: ET.Element, name: str) -> tuple[str, str, str]:
    """An element's text, with its unit and, of processors, how many are there at the start."""
    element = domain.find(name)
    if element is None:
        return "", "", ""
    return (element.text or "").strip(), element.get("unit", ""), element.get("current", "")
