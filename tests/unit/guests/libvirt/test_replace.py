"""The XML of an arriving domain: what the target's configuration and the operator's hook make of it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated import config
from migrated.demo.pair import short_directory
from migrated.errors import ConfigError, GuestRefusedError
from migrated.guests.libvirt.replace import Replacements
from migrated.guests.libvirt.xml_hook import XmlHook

DOMAIN = """\
<domain type="kvm"><name>vm</name><uuid>6d8ba4ab-4ee7-4a0b-a47c-1b4a3bd0c5f3</uuid><title>/srv/a/disk.qcow2 of net1</title>
<memory unit="KiB">1048576</memory><vcpu placement="static" cpuset="0-3,8">2</vcpu>
<cputune><vcpupin vcpu="0" cpuset="0" /><vcpupin vcpu="1" cpuset="2-3" /><emulatorpin cpuset="8" /></cputune>
<numatune><memory mode="strict" nodeset="0-1" /><memnode cellid="0" mode="strict" nodeset="0" /></numatune>
<os><loader type="pflash">/usr/share/fw/CODE.fd</loader><nvram>/srv/a/vars.fd</nvram></os>
<devices><emulator>/usr/libexec/qemu-kvm</emulator>
<disk type="file"><source file="/srv/a/disk.qcow2"><seclabel model="dac" /></source><backingStore type="file">
<source file="/srv/base.qcow2" /></backingStore></disk>
<disk type="block"><source dev="/dev/vg/data" /></disk>
<interface type="network"><source network="net1" portid="1" /></interface>
<interface type="bridge"><source bridge="net1" /></interface>
<interface type="direct"><source dev="eth0" mode="bridge" /></interface>
<hostdev><source dev="eth0" /></hostdev></devices></domain>"""


def replacements(**tables: dict[str, str]) -> Replacements:
    """As configured."""
    return Replacements.model_validate(tables)


@pytest.mark.parametrize(
    ("tables", "before", "after"),
    [
        ({"paths": {"/srv/a/disk.qcow2": "/mnt/b"}}, 'file="/srv/a/disk.qcow2"', 'file="/mnt/b"'),
        ({"paths": {"/srv/base.qcow2": "/mnt/b"}}, 'file="/srv/base.qcow2"', 'file="/mnt/b"'),
        ({"paths": {"/dev/vg/data": "/dev/b"}}, 'dev="/dev/vg/data"', 'dev="/dev/b"'),
        ({"paths": {"/srv/a/vars.fd": "/mnt/v"}}, ">/srv/a/vars.fd<", ">/mnt/v<"),
        ({"paths": {"/usr/share/fw/": "/fw/"}}, ">/usr/share/fw/CODE.fd<", ">/fw/CODE.fd<"),
        ({"paths": {"/usr/libexec/qemu-kvm": "/usr/bin/qemu"}}, ">/usr/libexec/qemu-kvm<", ">/usr/bin/qemu<"),
        ({"networks": {"net1": "lab"}}, 'network="net1"', 'network="lab"'),
        ({"bridges": {"net1": "br7"}}, 'bridge="net1"', 'bridge="br7"'),
        ({"links": {"eth0": "eth7"}}, 'dev="eth0" mode', 'dev="eth7" mode'),
        ({"cpus": {"8": "9"}}, 'cpuset="0-3,8"', 'cpuset="0-3,9"'),
        ({"nodes": {"1": "4"}}, 'nodeset="0-1"', 'nodeset="0,4"'),
    ],
)
def test_only_the_value_that_is_named_is_replaced(tables: dict[str, dict[str, str]], before: str, after: str) -> None:
    text, done = replacements(**tables).apply(DOMAIN)
    assert DOMAIN.count(before) == 1
    expected = DOMAIN.replace(before, after)
    if "cpus" in tables:
        expected = expected.replace('emulatorpin cpuset="8"', 'emulatorpin cpuset="9"')
    assert text == expected
    assert done


def test_directories_replace_what_is_below_them_and_the_longest_wins() -> None:
    paths = {"/srv/": "/mnt/", "/srv/a/": "/data/", "/srv/a/vars.fd": "/vars"}
    text, done = replacements(paths=paths).apply(DOMAIN)
    assert 'file="/data/disk.qcow2"' in text
    assert 'file="/mnt/base.qcow2"' in text
    assert "<nvram>/vars</nvram>" in text
    assert "<title>/srv/a/disk.qcow2 of net1</title>" in text
    assert "devices/disk//source@file: /srv/a/disk.qcow2 → /data/disk.qcow2" in done


def test_processors_are_renumbered_one_by_one() -> None:
    text, _ = replacements(cpus={"0-3": "4-5,8-9", "8": "0"}).apply(DOMAIN)
    assert 'cpuset="0,4-5,8-9">2<' in text
    assert '<vcpupin vcpu="0" cpuset="4" /><vcpupin vcpu="1" cpuset="8-9" /><emulatorpin cpuset="0" />' in text


@pytest.mark.parametrize(
    "tables", [{}, {"paths": {"/srv/a": "/mnt"}, "networks": {"net": "lab"}, "cpus": {"4-5": "6-7"}}]
)
def test_what_is_not_named_stays_as_it_is(tables: dict[str, Any]) -> None:
    assert replacements(**tables).apply(DOMAIN) == (DOMAIN, [])


@pytest.mark.parametrize("cpuset", ["", "3-1", "0-99999999999", "0,0", "^1", "0-65535,0-65535"])
def test_a_set_that_is_none_is_left_to_libvirt(cpuset: str) -> None:
    text = DOMAIN.replace('cpuset="0-3,8"', f'cpuset="{cpuset}"')
    assert f'cpuset="{cpuset}">2<' in replacements(cpus={"0": "1"}).apply(text)[0]


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"disks": {}}, "disks"),
        ({"machine": {"q35": "pc"}}, "machine"),
        ({"paths": {"disk": "/srv"}}, "paths"),
        ({"paths": {"/srv/": "/mnt"}}, "paths"),
        ({"paths": {"/srv": 1}}, "paths"),
        ({"networks": {"net1": ""}}, "networks"),
        ({"networks": ["net1"]}, "networks"),
        ({"cpus": {"0-3": "0-2"}}, "cpus"),
        ({"cpus": {"3-0": "0-3"}}, "cpus"),
        ({"cpus": {"0-3": "0-3", "3": "4"}}, "cpus"),
        ({"nodes": {"a": "0"}}, "nodes"),
    ],
)
def test_a_list_with_a_mistake_is_refused_by_its_key(table: dict[str, Any], key: str) -> None:
    for tables in ({"libvirt": {"replace": table}}, {"guests": {"vm": {"driver": "libvirt", "replace": table}}}):
        with pytest.raises(ConfigError, match=f"replace.{key}"):
            config.decode({"tls": {"insecure": True}, **tables}, "target")


def test_the_list_holds_for_the_domains_that_are_let_in() -> None:
    table = {"accept": ["*"], "replace": {"networks": {"net1": "lab"}}, "xml_hook": "/usr/local/bin/hook"}
    target = config.decode({"tls": {"insecure": True}, "libvirt": table}, "target").guest_table("vm")
    assert target is not None
    assert (target.replace, target.xml_hook) == (replacements(networks={"net1": "lab"}), "/usr/local/bin/hook")  # type: ignore[attr-defined]  # of the target


# ---------------------------------------------------------------- the hook


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that the hook's user can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory(dir=short_directory()) as path:
        Path(path).chmod(0o755)
        yield Path(path)


def hook(directory: Path, script: str, limit_seconds: float = 30.0) -> XmlHook:
    """A hook with this script."""
    path = directory / "hook"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return XmlHook("vm", str(path), "nobody", limit_seconds=limit_seconds)


async def test_the_hook_changes_the_xml(directory: Path) -> None:
    changing = hook(directory, 'sed "s/net1/$1-$2/"')
    assert await changing.change(DOMAIN, "domain") == DOMAIN.replace("net1", "vm-domain")


async def test_the_hook_has_no_rights_and_no_environment_of_the_agent(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "told")
    script = (
        'cat; { id -u; env; grep -E "^(CapEff|CapBnd|NoNewPrivs)" /proc/self/status; ls /proc/self/fd; } >&2; exit 3'
    )
    with pytest.raises(GuestRefusedError) as refused:
        await hook(directory, script).change(DOMAIN, "domain")
    said = refused.value.message
    assert refused.value.code == "xml-hook"
    assert "ended with status 3" in said
    assert "SECRET" not in said
    assert "NoNewPrivs:\t1" in said
    assert "CapEff:\t0000000000000000" in said
    if os.geteuid() == 0:
        assert "CapBnd:\t0000000000000000" in said
        assert ": 65534\n" in said


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo the inventory is down >&2; exit 1", "ended with status 1: the inventory is down"),
        ("true", "wrote something else than XML"),
        ("echo '<domain>'", "wrote something else than XML"),
        ("printf '\\377'", "wrote something else than XML"),
        ("echo '<network/>'", "wrote no domain but <network>"),
        ("sed s/6d8ba4ab/00000000/", "changed <uuid>"),
        ("sed 's/>vm</>wm</'", "changed <name>"),
        ("sed s/1048576/2097152/", "changed <memory>"),
        ("sed s/KiB/MiB/", "changed <memory>"),
        ("sed 's/>2</>3</'", "changed <vcpu>"),
        ("head -c 2000000 /dev/zero", "wrote more than"),
    ],
)
async def test_a_hook_that_fails_or_makes_another_domain_is_refused(directory: Path, script: str, problem: str) -> None:
    with pytest.raises(GuestRefusedError) as refused:
        await hook(directory, script).change(DOMAIN, "domain")
    assert refused.value.code == "xml-hook"
    assert problem in refused.value.message


async def test_a_hook_that_does_not_end_is_ended_with_what_it_has_started(directory: Path) -> None:
    with pytest.raises(GuestRefusedError, match="did not end within"):
        await hook(directory, "sleep 1000 & sleep 1000", limit_seconds=0.2).change(DOMAIN, "domain")


async def test_a_hook_or_its_user_that_is_not_there_is_refused_by_name(directory: Path) -> None:
    with pytest.raises(GuestRefusedError, match="/no/such/hook"):
        await XmlHook("vm", "/no/such/hook", "nobody", limit_seconds=30).change(DOMAIN, "domain")
    if os.geteuid() == 0:
        with pytest.raises(GuestRefusedError, match="there is no user of-nobody"):
            await XmlHook("vm", str(directory), "of-nobody", limit_seconds=30).change(DOMAIN, "domain")
