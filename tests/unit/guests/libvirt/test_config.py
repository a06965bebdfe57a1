"""What the source says of a domain, and what the target makes of its XML."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import pytest

from migrated import config
from migrated.agent.requests import StartRequest
from migrated.errors import ConfigError, GuestRefusedError, RemoteProtocolError
from migrated.guests.libvirt import connection
from migrated.guests.libvirt.config import (
    MAX_XML_BYTES,
    Description,
    LibvirtSourceConfig,
    LibvirtTargetConfig,
    pack_xml,
    unpack_xml,
)
from migrated.guests.libvirt.domain_xml import incoming
from migrated.guests.registry import GuestRegistry
from migrated.protocol.framing import MAX_FIELDS

DOMAIN = """\
<domain type='kvm'><name>vm</name><uuid>6d8ba4ab-4ee7-4a0b-a47c-1b4a3bd0c5f3</uuid>
<memoryBacking><hugepages/><source type='memfd'/><access mode='shared'/><allocation mode='immediate'/><locked/></memoryBacking>
<cpu><numa><cell id='0' memory='1' memAccess='shared'/></numa></cpu><devices><disk/></devices></domain>"""


def test_only_the_backing_of_memory_is_changed() -> None:
    domain = incoming(DOMAIN)
    assert (domain.name, domain.uuid) == ("vm", "6d8ba4ab-4ee7-4a0b-a47c-1b4a3bd0c5f3")
    assert "<memoryBacking><locked /></memoryBacking>" in domain.xml
    assert "memAccess" not in domain.xml
    for gone in ("hugepages", "memfd", "shared", "immediate"):
        assert gone not in domain.xml
    assert "<devices><disk /></devices>" in domain.xml


@pytest.mark.parametrize("text", ["", "<domain>", "<domain/>", "<guest><name>a</name><uuid>b</uuid></guest>"])
def test_xml_that_is_no_domain_is_the_peers_mistake(text: str) -> None:
    with pytest.raises(RemoteProtocolError):
        incoming(text)


def test_xml_travels_compressed_and_bounded() -> None:
    assert unpack_xml(pack_xml("vm", DOMAIN)) == DOMAIN
    with pytest.raises(GuestRefusedError):
        pack_xml("vm", "x" * (MAX_XML_BYTES + 1))
    for packed in (
        b"",
        b"no",
        zlib.compress(b"x" * (MAX_XML_BYTES + 1)),
        zlib.compress(b"\xff"),
        zlib.compress(b"x")[:-1],
    ):
        with pytest.raises(RemoteProtocolError):
            unpack_xml(packed)


def test_a_description_fits_a_control_message_and_is_checked() -> None:
    described = Description("pc-q35-7.2", (7, 2, 22), ("pc.ram",), ("pc.ram",), (4096,), b"", b"", autostart=False)
    values = described.encode()
    assert Description.decode(values) == described
    assert len(values) <= MAX_FIELDS
    for wrong in ({}, {**values, "xml": "text"}, {**values, "more": 1}):
        with pytest.raises(RemoteProtocolError):
            Description.decode(wrong)


def test_domains_need_no_table_where_the_configuration_says_so() -> None:
    tls = {"tls": {"insecure": True}}
    source = config.decode({**tls, "libvirt": {"domains": ["web-*"], "undefine_source": True}}, "source")
    assert source.guest_table("web-1") == LibvirtSourceConfig(undefine_source=True)
    assert source.guest_table("db-1") is None
    target = config.decode({**tls, "libvirt": {"accept": ["*"], "page_size": "2M"}}, "target")
    table = target.guest_table("web-1")
    assert isinstance(table, LibvirtTargetConfig)
    assert (table.driver, table.page_size, table.persistent) == ("libvirt", 2 << 20, "as-source")
    assert config.decode(tls, "target").guest_table("web-1") is None
    for wrong in ({"libvirt": {"page_size": "1G"}}, {"guests": {"vm": {"driver": "libvirt", "page_size": "1G"}}}):
        with pytest.raises(ConfigError, match="page_size"):
            config.decode({**tls, **wrong}, "target")


def test_options_for_libvirts_guests_are_refused_for_others(tmp_path: Path) -> None:
    tables = {"vm": {"driver": "qemu", "qmp": "/run/vm.qmp"}, "db": {"driver": "libvirt"}}
    settings = {"tls": {"insecure": True}, "agent": {"state_dir": str(tmp_path)}, "guests": tables}
    registry = GuestRegistry(config.decode(settings, "source"))
    plain = StartRequest.model_validate({"guest": "vm", "to": "b:1"})
    for options in ({"persistent": "yes"}, {"undefine_source": False}):
        request = StartRequest.model_validate({"guest": "vm", "to": "b:1", **options})
        registry.source_guest("db", request)
        registry.source_guest("vm", plain)
        with pytest.raises(GuestRefusedError, match=next(iter(options))) as refused:
            registry.source_guest("vm", request)
        assert refused.value.code == "not-of-libvirt"


def test_an_agent_without_the_binding_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "DISTRIBUTION", [])
    for name in ("libvirt", "libvirt_qemu", "libvirtmod", "libvirtmod_qemu"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(GuestRefusedError) as told:
        connection.binding("vm")
    assert told.value.code == "libvirt-missing"
    assert "python3-libvirt" in told.value.hint
