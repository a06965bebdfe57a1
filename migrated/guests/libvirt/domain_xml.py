"""A domain's XML, as the source sends it and as the target's libvirt is to read it.

Only ``memoryBacking`` is changed: the guest's memory is the agent's, on the pages that the target's table asks for, so QEMU is
to make its own on ordinary memory that it never touches.  Huge pages or preallocated memory of its own would be held twice.
"""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

from migrated.errors import RemoteProtocolError

_OF_BACKING = ("hugepages", "source", "access", "allocation")


@dataclasses.dataclass(frozen=True, slots=True)
class Domain:
    """A domain that is to arrive."""

    name: str
    uuid: str
    xml: str


def incoming(text: str) -> Domain:
    """The source's XML as it is restored here.  Raises RemoteProtocolError."""
    try:
        root = ET.fromstring(text)  # noqa: S314 - its size is bounded; expat refuses entities that grow
    except ET.ParseError as error:
        raise RemoteProtocolError(f"the domain's XML is malformed: {error}") from error
    name, uuid = root.findtext("name") or "", root.findtext("uuid") or ""
    if root.tag != "domain" or not name or not uuid:
        raise RemoteProtocolError("the domain's XML does not say its name and UUID")
    backing = root.find("memoryBacking")
    if backing is not None:
        for tag in _OF_BACKING:
            for element in backing.findall(tag):
                backing.remove(element)
    for cell in root.findall("cpu/numa/cell"):
        cell.attrib.pop("memAccess", None)
    return Domain(name, uuid, ET.tostring(root, encoding="unicode"))
