"""The `libvirt` driver: a QEMU that libvirt manages, on both sides and all the time.

The source is reached through libvirt's own monitor.  On the target libvirt restores the domain from an image that is a FIFO:
its QEMU waits for the devices' state while memory is migrated.  The memory is the agent's, as with the `qemu` driver.  See
docs/libvirt.md.
"""

from __future__ import annotations

import fnmatch
import zlib
from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, Field, field_validator

from migrated.errors import GuestRefusedError, RemoteProtocolError
from migrated.guests.libvirt.replace import Replacements
from migrated.options import PersistentOption, UndefineOption
from migrated.settings import GuestTable, MemoryTable, PageSize, Table, refuse

_PAGE_MAX_BYTES = 2 << 20
#: Of a domain's XML as text.
MAX_XML_BYTES = 1 << 20

DEFAULT_URI = "qemu:///system"


def _check_program(path: str) -> str:
    if path and not path.startswith("/"):
        refuse(f"{path!r} is not absolute", "give an absolute path")
    return path


Program = Annotated[str, AfterValidator(_check_program)]


class _OnSource(UndefineOption):
    """What is said of a domain on its source."""

    uri: str = Field(default=DEFAULT_URI, description="libvirt, on this host")


class _OnTarget(PersistentOption):
    """What is said of a domain on its target."""

    uri: str = Field(default=DEFAULT_URI, description="libvirt, on this host")
    replace: Replacements = Field(
        default=Replacements(),
        description="what differs between the hosts in the domain's XML; see [replace](#replace-on-a-target)",
    )
    xml_hook: Program = Field(
        default="",
        description="absolute path of a program that changes the domain's XML: XML on standard input, XML on standard output; see "
        "[libvirt.md](libvirt.md#another-host-other-paths)",
    )
    xml_hook_user: str = Field(default="nobody", description="user that runs `xml_hook`, if the agent is root")
    page_size: PageSize | None = Field(
        default=None, description="of the domain's memory, not 1G; by default 2M, or 4K where the host lacks huge pages"
    )
    reserve: bool = Field(
        default=True, description="`false`: pages are taken as they are needed, for guests larger than the host"
    )

    @field_validator("page_size")
    @classmethod
    def _two_megabytes_at_most(cls, size: int | None) -> int | None:
        # libvirt's QEMU places its memory at multiples of 2 MiB.
        if size is not None and size > _PAGE_MAX_BYTES:
            refuse("1 GiB pages cannot be mapped over the memory of libvirt's QEMU", 'give "4K" or "2M"')
        return size


class LibvirtSourceConfig(_OnSource, GuestTable):
    """``[guests.NAME]`` of a source: a domain."""

    driver: Literal["libvirt"] = "libvirt"
    domain: str = Field(default="", description="the domain's name; by default the guest's")


class LibvirtTargetConfig(_OnTarget, MemoryTable):
    """``[guests.NAME]`` of a target: where a domain arrives.  One with another name is not let in."""

    driver: Literal["libvirt"] = "libvirt"
    domain: str = Field(default="", description="the domain's name; by default the guest's")


class LibvirtSection(Table):
    """``[libvirt]``: libvirt's domains as guests that need no table.  Patterns are those of a shell: ``*``, ``web-*``."""

    def table(self, name: str) -> GuestTable | None:
        """What ``[guests.NAME]`` would say of a domain that is let through here; None for any other."""
        del name
        return None

    def _for_one(self, table: type[Table]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in table.model_fields}


class LibvirtSourceSection(_OnSource, LibvirtSection):
    """``[libvirt]`` of a source."""

    domains: list[str] = Field(default=[], description="patterns of the domains that may be migrated away")

    def table(self, name: str) -> GuestTable | None:
        """See LibvirtSection."""
        if not _matches(name, self.domains):
            return None
        return LibvirtSourceConfig(**self._for_one(_OnSource))


class LibvirtTargetSection(_OnTarget, LibvirtSection):
    """``[libvirt]`` of a target."""

    accept: list[str] = Field(default=[], description="patterns of the domains that may arrive")

    def table(self, name: str) -> GuestTable | None:
        """See LibvirtSection."""
        if not _matches(name, self.accept):
            return None
        # Not validated again: a page size is written as text and is a number here.
        return LibvirtTargetConfig.model_construct(**self._for_one(_OnTarget))


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the source says of a domain in its hello.

    ``ids`` and ``used_bytes`` are of the regions' RAM blocks, in their order.  ``xml`` is the domain as it runs, ``definition``
    as it is defined (empty: transient); both compressed.
    """

    machine: str
    version: tuple[int, int, int]
    backends: tuple[str, ...]
    ids: tuple[str, ...]
    used_bytes: tuple[int, ...]
    xml: bytes
    definition: bytes
    autostart: bool
    persistent: Literal["", "as-source", "yes", "no"] = (
        ""  # as requested with the migration; empty: the target's configuration decides
    )

    def encode(self) -> dict[str, Any]:
        """As plain values."""
        built: dict[str, Any] = msgspec.to_builtins(self, builtin_types=(bytes,))
        return built

    @classmethod
    def decode(cls, values: dict[str, Any]) -> Description:
        """From a peer.  Raises RemoteProtocolError."""
        try:
            return msgspec.convert(values, cls, builtin_types=(bytes,))
        except msgspec.ValidationError as error:
            raise RemoteProtocolError(f"the description of the libvirt guest is malformed: {error}") from error


def pack_xml(guest: str, xml: str) -> bytes:
    """A domain's XML as it travels.  Raises GuestRefusedError."""
    data = xml.encode()
    if len(data) > MAX_XML_BYTES:
        raise GuestRefusedError(
            f"guest {guest}: its XML has {len(data)} bytes, the limit is {MAX_XML_BYTES}",
            code="domain-xml",
            hint="remove metadata from the domain (virsh metadata)",
        )
    return zlib.compress(data, 9)


def unpack_xml(packed: bytes) -> str:
    """The XML again.  Raises RemoteProtocolError."""
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(packed, MAX_XML_BYTES)
        if not decoder.eof:
            raise RemoteProtocolError("the domain's XML is cut short or too long")
        return data.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise RemoteProtocolError(f"the domain's XML is malformed: {error}") from error
