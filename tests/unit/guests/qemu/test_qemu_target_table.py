"""The target's table of a running QEMU: command lines as people, scripts and libvirt write them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrated.config import load
from migrated.errors import GuestError, GuestRefusedError, UsageError
from migrated.guests.qemu.command import check_command
from migrated.guests.qemu.config import QemuTargetConfig
from migrated.guests.qemu.options import Properties, format_size, parse_options, parse_size
from migrated.guests.qemu.target_table import Answers, Running, TargetTable, read_running, target_table
from migrated.memory.regions import Region
from migrated.settings import read

MIB = 1 << 20
PROGRAM = "/usr/bin/qemu-system-x86_64"


def derive(line: str | list[str], *, qmp: str = "", answers: Answers | None = None, name: str = "") -> TargetTable:
    """The table of this command line, and the certainty that the agent's decoder reads the same."""
    words = shlex.split(line) if isinstance(line, str) else line
    running = Running(4711, ("qemu-system-x86_64", *words), PROGRAM, "/home/user", 0)
    table = target_table(running, name=name, qmp=qmp, answers=answers)
    decoded = tomllib.loads(str(table))["guests"][table.name]
    read_back = read(QemuTargetConfig, decoded, table.name)
    assert (read_back.command, read_back.page_size) == (table.command, parse_size(table.page_size))
    return table


def answers(machine: str = "pc-i440fx-7.2", *, backends: str = "", blocks: str = "", ram: str = "pc.ram") -> Answers:
    return Answers("7.2.22", machine, ram, frozenset(backends.split()), frozenset(blocks.split()))


def backend(name: str, size: str, more: str = "") -> str:
    return f"memory-backend-file,id={name},size={size}{more},share=on,mem-path={{memory:{name}}}"


def value(table: TargetTable, flag: str, number: int = 0) -> str:
    places = [index for index, word in enumerate(table.command) if word == flag]
    return table.command[places[number] + 1]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("-m 256", "256M"),
        ("-m 256M", "256M"),
        ("-m 1.5G", "1536M"),
        ("-m size=4G,slots=2,maxmem=8G", "4G"),
        ("-m slots=2,maxmem=8G", "128M"),
        ("-m 1G -m slots=2,maxmem=8G", "1G"),
        ("-m 1048576K", "1G"),
        ("", "128M"),
    ],
)
@pytest.mark.parametrize("machine", ["-machine pc-i440fx-7.2", "-M q35,accel=kvm", "-machine type=pc-q35-7.2", ""])
def test_default_ram_becomes_a_backend_of_its_name(machine: str, line: str, size: str) -> None:
    table = derive(f"{machine} {line}")
    assert value(table, "-object") == backend("pc.ram", size)
    machines = [word for word in table.command if "memory-backend=pc.ram" in word]
    assert len(machines) == 1
    check_command("vm", ["true", *table.command[1:]], (Region("pc.ram", parse_size(size) or 0, 4096),))


def test_the_machine_type_stays_beside_the_backend() -> None:
    assert value(derive("-M q35,accel=kvm -m 1G"), "-M") == "q35,accel=kvm,memory-backend=pc.ram"
    assert value(derive("-machine accel=kvm -machine pc -m 1G"), "-machine", 1) == "pc,memory-backend=pc.ram"


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("memory-backend-ram,id=m,size=1G", backend("m", "1G")),
        ("memory-backend-memfd,id=m,size=1G,share=on,hugetlb=on,hugetlbsize=2M,seal=off", backend("m", "1G")),
        ("memory-backend-file,id=m,size=1G,mem-path=/dev/hugepages,share=on,prealloc=on", backend("m", "1G")),
        ("memory-backend-file,id=m,size=1G,mem-path=/proc/self/fd/7,share=on", backend("m", "1G")),
        ("memory-backend-shm,id=m,size=1G", backend("m", "1G")),
        ("qom-type=memory-backend-ram,id=m,size=1G,merge=off", "qom-type=" + backend("m", "1G", ",merge=off")),
        (
            '{"qom-type":"memory-backend-memfd","id":"m","size":1073741824,"hugetlb":true,"share":true}',
            '{"qom-type":"memory-backend-file","id":"m","size":1073741824,"share":true,"mem-path":"{memory:m}"}',
        ),
    ],
)
def test_backends_of_every_kind_are_filled_by_the_agent(given_: str, expected: str) -> None:
    table = derive(["-machine", "q35,memory-backend=m", "-m", "1G", "-object", given_])
    found = value(table, "-object")
    if given_.startswith("{"):
        assert found == expected
    else:
        assert dict(Properties(found, "qom-type").items()) == dict(Properties(expected, "qom-type").items())
    assert table.command.count("-object") == 1
    assert value(table, "-machine") == "q35,memory-backend=m"
    assert f"# was: -object {given_}" in str(table)
    check_command("vm", ["true", *table.command[1:]], (Region("m", 1 << 30, 4096),))


def test_numa_nodes_and_dimms_keep_their_backends() -> None:
    table = derive(
        "-machine pc-q35-7.2 -m 1G,slots=4,maxmem=8G"
        " -object memory-backend-ram,id=n0,size=512M,host-nodes=0,policy=bind"
        " -object memory-backend-ram,id=n1,size=512M -numa node,nodeid=0,cpus=0,memdev=n0 -numa node,nodeid=1,memdev=n1"
        " -object memory-backend-memfd,id=d,size=2G -device pc-dimm,id=dimm0,memdev=d"
    )
    assert [value(table, "-object", number) for number in range(3)] == [
        backend("n0", "512M"),
        backend("n1", "512M"),
        backend("d", "2G"),
    ]
    assert value(table, "-machine") == "pc-q35-7.2"
    assert value(table, "-device") == "pc-dimm,id=dimm0,memdev=d"
    assert [check for check in table.every_check if "left out" in check] == [
        "host-nodes=0 was left out: it is about the source's host or file",
        "policy=bind was left out: it is about the source's host or file",
    ]


def test_a_backend_that_nothing_uses_is_not_the_agents() -> None:
    line = "-machine q35 -m 1G -object memory-backend-ram,id=spare,size=1G"
    table = derive(line)
    assert value(table, "-object") == "memory-backend-ram,id=spare,size=1G"
    assert any("spare" in check for check in table.every_check)
    plugged = derive(line, answers=answers("pc-q35-7.2", backends="pc.ram spare", blocks="pc.ram spare"))
    assert value(plugged, "-object") == backend("spare", "1G")


def test_legacy_memory_options_make_way_for_the_agents_memory() -> None:
    table = derive("-m 512 -mem-path /dev/hugepages -mem-prealloc -M pc-i440fx-7.2")
    assert table.command[1:] == [
        *("-m", "512", "-M", "pc-i440fx-7.2,memory-backend=pc.ram", "-object", backend("pc.ram", "512M"))
    ]
    assert "# was: -mem-path /dev/hugepages" in str(table)
    assert "# was: -mem-prealloc" in str(table)


@pytest.mark.parametrize(("machine", "plain"), [("pc-i440fx-3.1", True), ("pc-q35-4.0", False), ("q35", False)])
def test_old_machine_types_keep_the_names_of_their_blocks(machine: str, plain: bool) -> None:
    """Up to 3.1 a file's block is called /objects/ID, where the default RAM and a memory-backend-ram have a plain ID."""
    canonical = "x-use-canonical-path-for-ramblock-id"
    assert Properties(value(derive(f"-M {machine} -m 1G"), "-object")).get(canonical) == ("off" if plain else "")
    assert value(
        derive(f"-M {machine},memory-backend=m -object memory-backend-ram,id=m,size=1G"), "-object"
    ) == backend("m", "1G", f",{canonical}=off" if plain else "")
    memfd = derive(f"-M {machine},memory-backend=m -object memory-backend-memfd,id=m,size=1G")
    assert canonical not in value(memfd, "-object")


@pytest.mark.parametrize(("line", "page_size"), [("-m 1G", "2M"), ("-m 129", "4K"), ("-m 130", "2M")])
def test_memory_that_is_not_whole_huge_pages_comes_on_small_ones(line: str, page_size: str) -> None:
    assert derive(line).page_size == page_size


def test_a_machine_whose_ram_has_an_unknown_name_is_marked() -> None:
    table = derive("-M riscv-board -m 1G")
    assert any("info ramblock" in check for check in table.every_check)
    assert value(derive("-M microvm -m 1G"), "-object") == backend("microvm.ram", "1G")
    asked = derive("-M riscv-board -m 1G", answers=answers("riscv-board", ram="riscv.ram"))
    assert value(asked, "-object") == backend("riscv.ram", "1G")
    assert not any("info ramblock" in check for check in asked.every_check)


def test_memory_that_is_in_no_option_is_not_made_twice() -> None:
    """A configuration file may hold the backend."""
    table = derive("-readconfig vm.cfg -m 1G", answers=answers(backends="m", blocks="m pc.bios"))
    assert "-object" not in table.command
    assert any("memory backend m" in check for check in table.checks)


# ---------------------------------------------------------------- the machine type


@pytest.mark.parametrize("given_", ["pc", "q35", "virt"])
def test_an_alias_is_marked(given_: str) -> None:
    assert any(check.startswith(f"{given_}: an alias") for check in derive(f"-machine {given_} -m 1G").every_check)


def test_what_qemu_says_makes_the_machine_type_concrete() -> None:
    table = derive("-machine pc,accel=kvm -m 1G", answers=answers())
    assert value(table, "-machine") == "pc-i440fx-7.2,accel=kvm,memory-backend=pc.ram"
    assert value(derive("-m 1G", answers=answers()), "-machine") == "pc-i440fx-7.2,memory-backend=pc.ram"
    merged = derive("-machine accel=kvm -m 1G", answers=answers())
    assert Properties(value(merged, "-machine"), "type").get("type") == "pc-i440fx-7.2"
    assert not any("alias" in check or "machine" in check for one in (table, merged) for check in one.every_check)
    assert "version 7.2.22" in str(table)


def test_no_machine_type_is_marked_where_nobody_knows_it() -> None:
    assert any("no -machine" in check for check in derive("-m 1G").checks)
    assert any("no machine type" in check for check in derive("-machine accel=kvm -m 1G").every_check)


def test_memory_plugged_in_later_is_told() -> None:
    plugged = derive("-m 1G", answers=answers(backends="pc.ram dimm7", blocks="pc.ram dimm7"))
    assert any("dimm7" in check for check in plugged.checks)


# ---------------------------------------------------------------- sockets, incoming, start


@pytest.mark.parametrize(
    "line", ["-incoming defer", "-incoming tcp:0:4444", "-S", "-daemonize", "--daemonize", "-snapshot", "-loadvm x"]
)
def test_what_only_the_agent_may_say_is_left_out_and_shown(line: str) -> None:
    table = derive(f"-m 256 {line} -name vm")
    assert not set(line.split()) & set(table.command)
    assert f"# was: {line}" in str(table)
    check_command("vm", ["true", *table.command[1:]], (Region("pc.ram", 256 * MIB, 4096),))


def test_the_monitor_becomes_the_agents() -> None:
    one = derive("-m 1G -qmp unix:/run/a.qmp,server,nowait")
    assert value(one, "-qmp") == "unix:{qmp},server=on,wait=off"
    two = "-m 1G -qmp unix:/run/a.qmp,server=on,wait=off -qmp unix:/run/b.qmp,server=on,wait=off"
    chosen = derive(two, qmp="/run/b.qmp")
    assert value(chosen, "-qmp", 0) == "unix:/run/a.qmp,server=on,wait=off"
    assert value(chosen, "-qmp", 1) == "unix:{qmp},server=on,wait=off"
    assert any("/run/a.qmp" in check for check in chosen.every_check)
    assert value(derive(two), "-qmp", 0) == "unix:{qmp},server=on,wait=off"
    relative = derive("-m 1G -qmp unix:/a,server=on -qmp unix:vm.qmp,server=on", qmp="/home/./user/vm.qmp")
    assert value(relative, "-qmp", 1) == "unix:{qmp},server=on,wait=off"


def test_a_control_monitor_on_a_character_device_becomes_the_agents() -> None:
    line = "-m 1G -chardev socket,id=hmp,path=/h -mon hmp -chardev socket,id=c,{},server=on -mon chardev=c,mode=control"
    for socket in ("path=/run/c.qmp", "fd=24"):
        table = derive(line.format(socket))
        assert dict(Properties(value(table, "-chardev", 1), "backend").items()) == {
            "backend": "socket",
            "id": "c",
            "server": "on",
            "path": "{qmp}",
        }
        assert "path=/h" in value(table, "-chardev", 0)


# ---------------------------------------------------------------- what nobody but the operator knows


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("-drive file=/srv/a.qcow2,if=virtio", "/srv/a.qcow2: the target must reach"),
        ("-hda disk.img", "disk.img: the target must reach the same image (relative to /home/user)"),
        ("disk.img", "disk.img: the target must reach"),
        ("-cdrom /iso/x.iso", "/iso/x.iso"),
        ("""-blockdev '{"driver":"raw","file":{"driver":"file","filename":"/srv/b.raw"}}'""", "/srv/b.raw"),
        ("-blockdev driver=file,filename=/srv/c.raw,node-name=c", "/srv/c.raw"),
        ("-blockdev driver=nbd,node-name=n,server.type=unix,server.path=/run/nbd", "/run/nbd"),
        ("-drive file=nbd://10.0.0.1/x,if=virtio", "nbd://10.0.0.1/x"),
        ("-drive if=pflash,format=raw,file=/usr/share/OVMF/CODE.fd", "/usr/share/OVMF/CODE.fd"),
        ("-netdev tap,id=n,ifname=tap0", "network"),
        ("-nic user,hostfwd=tcp::2222-:22", "network"),
        ("-netdev tap,id=n,fd=33,vhostfd=35", "fd=33: a file descriptor"),
        ("-netdev tap,id=n,fd=33,vhostfd=35", "vhostfd=35: a file descriptor"),
        ("-netdev tap,id=n,fds=5:6", "fds=5:6: a file descriptor"),
        ("-netdev stream,id=n,addr.type=fd,addr.str=9", "addr.str=9: a file descriptor"),
        ("-add-fd fd=7,set=2", "fd=7: a file descriptor"),
        ("-blockdev driver=file,filename=/dev/fdset/2,node-name=x", "/dev/fdset/2: a file descriptor"),
        ("-chardev socket,id=s,path=/run/s.sock,server=on", "/run/s.sock"),
        ("-chardev socket,id=s,fd=30,server=on", "fd=30: a file descriptor"),
        ("-serial unix:/run/tty,server=on,wait=off", "must be free on the target"),
        ("-serial tcp::4444,server", "must be free on the target"),
        ("-monitor stdio", "no terminal"),
        ("-serial mon:stdio", "no terminal"),
        ("-nographic", "no terminal"),
        ("-gdb tcp::1234", "must be free"),
        ("-s", "1234"),
        ("-vnc :0", "must be free"),
        ("-spice port=5900,addr=127.0.0.1", "must be free"),
        ("-display gtk", "display"),
        ("-pidfile /run/vm.pid", "/run/vm.pid"),
        ("-kernel /boot/vmlinuz", "/boot/vmlinuz"),
        ("-bios bios-microvm.bin", "bios-microvm.bin"),
        ("-readconfig /etc/vm.cfg", "not shown here"),
        ("-cpu host", "processor"),
        ("-cpu max", "processor"),
        ("-device vfio-pci,host=01:00.0", "cannot be migrated"),
        ("""-device '{"id":"h","driver":"vfio-pci","host":"01:00.0"}'""", "cannot be migrated"),
        ("-device vhost-user-fs-pci,chardev=c", "cannot be migrated"),
        ("-object sev-guest,id=s", "cannot be migrated"),
        ("-object secret,id=k,file=/etc/key", "/etc/key"),
        ("-object memory-backend-epc,id=e,size=64M", "memory-backend-epc"),
        ("-device virtio-gpu,romfile=/opt/rom", "/opt/rom"),
        ("-runas nobody", "nobody"),
        ("-device virtio-mem-pci,memdev=m", "cannot be migrated"),
        ("-device ivshmem-plain,memdev=m", "the guest's alone"),
        ("-name {qmp}", "{qmp}"),
    ],
)
def test_what_belongs_to_the_source_is_marked_and_kept(argument: str, words: str) -> None:
    table = derive(f"-M pc-q35-7.2 -m 1G {argument}")
    assert [check for check in table.every_check if words in check], table.every_check
    assert shlex.split(argument)[-1] in table.command


@pytest.mark.parametrize(
    "argument",
    [
        "-nic none",
        "-display none",
        "-vga std",
        "-cpu Skylake-Server-v4",
        "-smp 4,sockets=2",
        "-serial none",
        "-serial chardev:c",
        "-device virtio-rng-pci,rng=r",
        "-object rng-random,id=r,filename=/dev/urandom",
        "-append 'root=/dev/vda console=ttyS0'",
        "-drive if=none,id=cd,media=cdrom",
        "-blockdev driver=qcow2,node-name=q,file=f",
        "-name guest=vm,debug-threads=on",
        "-overcommit mem-lock=on,cpu-pm=on",
    ],
)
def test_what_is_the_guests_own_is_not_marked(argument: str) -> None:
    general = set(derive("-M pc-q35-7.2 -m 1G -display none").every_check)
    table = derive(f"-M pc-q35-7.2 -m 1G -display none {argument}")
    assert set(table.every_check) == general
    assert shlex.split(argument)[-1] in table.command


LIBVIRT = """
-name guest=debian12,debug-threads=on -S
-object '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1/master-key.aes"}'
-machine pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram -accel kvm -cpu host,migratable=on
-m 2048 -object '{"qom-type":"memory-backend-ram","id":"pc.ram","size":2147483648}' -overcommit mem-lock=off
-smp 2,sockets=2,cores=1,threads=1 -uuid 4dea22b3-1d52-d8f3-2516-782e98ab3fa0 -no-user-config -nodefaults
-chardev socket,id=charmonitor,fd=31,server=on,wait=off -mon chardev=charmonitor,id=monitor,mode=control
-rtc base=utc,driftfix=slew -global kvm-pit.lost_tick_policy=delay -no-hpet -no-shutdown -boot strict=on
-device '{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x2"}'
-blockdev '{"driver":"file","filename":"/var/lib/libvirt/images/d.qcow2","node-name":"libvirt-1-storage"}'
-blockdev '{"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"libvirt-1-storage"}'
-device '{"driver":"virtio-blk-pci","bus":"pci.4","addr":"0x0","drive":"libvirt-1-format","id":"virtio-disk0"}'
-netdev '{"type":"tap","fd":"33","vhost":true,"vhostfd":"35","id":"hostnet0"}'
-chardev pty,id=charserial0 -device '{"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}'
-spice port=5900,addr=127.0.0.1,disable-ticketing=on -sandbox on,obsolete=deny,spawn=deny -msg timestamp=on
"""


def test_a_guest_of_libvirt() -> None:
    words = shlex.split(LIBVIRT)
    table = derive(LIBVIRT)
    assert table.name == "debian12"
    changed = {
        '{"qom-type":"memory-backend-ram","id":"pc.ram","size":2147483648}': '{"qom-type":"memory-backend-file",'
        '"id":"pc.ram","size":2147483648,"share":true,"mem-path":"{memory:pc.ram}"}',
        "socket,id=charmonitor,fd=31,server=on,wait=off": "socket,id=charmonitor,server=on,wait=off,path={qmp}",
    }
    assert table.command[1:] == [changed.get(word, word) for word in words if word != "-S"]
    for text in ("fd=33", "vhostfd=35", "/var/lib/libvirt/images/d.qcow2", "master-key.aes"):
        assert any(text in check for check in table.every_check)
    assert not any("libvirt-1" in check for check in table.every_check)
    check_command("vm", ["true", *table.command[1:]], (Region("pc.ram", 2 << 30, 4096),))


def test_a_table_derived_again_from_its_own_command_is_the_same() -> None:
    table = derive(LIBVIRT)
    filled = [
        word.replace("{qmp}", "/run/x.qmp").replace("{memory:pc.ram}", "/proc/self/fd/9") for word in table.command
    ]
    again = derive([*filled[1:], "-incoming", "defer", "-S"])
    assert [sorted(word.split(",")) for word in again.command] == [sorted(word.split(",")) for word in table.command]


# ---------------------------------------------------------------- names, text, the process


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("-name vm1", "vm1"),
        ("-name guest=web.7,debug-threads=on", "web.7"),
        ("-name 'my guest'", "my-guest"),
        ("-name guest=Ünïcode", "n-code"),
        ("-name ..", "guest"),
        ("", "guest"),
    ],
)
def test_the_guest_is_called_as_qemu_calls_it(line: str, name: str) -> None:
    assert derive(f"-m 1G {line}").name == name


def test_a_name_that_no_guest_can_have_is_refused() -> None:
    assert derive("-m 1G", name="a.b").name == "a.b"
    with pytest.raises(UsageError, match="cannot be a guest's name"):
        derive("-m 1G", name="a/b")


def test_the_agent_loads_the_printed_table(tmp_path: Path) -> None:
    path = tmp_path / "target.toml"
    path.write_text(f"[tls]\ninsecure = true\n[agent]\nstate_dir = '{tmp_path}'\n\n{derive(LIBVIRT, name='a.b')}")
    config = load(path, "target")
    guest = config.guests["a.b"]
    assert isinstance(guest, QemuTargetConfig)
    assert guest.command[0] == "qemu-system-x86_64"


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), max_size=8))
def test_any_command_line_becomes_toml_that_says_the_same(words: list[str]) -> None:
    table = derive(words)
    assert table.command[0] == "qemu-system-x86_64"


@settings(deadline=None)
@given(st.lists(st.binary(min_size=1).filter(lambda word: 0 not in word), max_size=3))
def test_bytes_that_are_no_text_are_marked(words: list[bytes]) -> None:
    table = derive(["-name", *(os.fsdecode(word) for word in words)])
    if words and os.fsdecode(words[0]) != words[0].decode(errors="replace"):
        assert any("UTF-8" in check for check in table.every_check)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.from_regex(r"[a-z][a-z0-9.-]*", fullmatch=True), st.text("ab,=\"'{", min_size=1)), max_size=5)
)
def test_properties_are_written_as_they_were_read(pairs: list[tuple[str, str]]) -> None:
    text = ",".join(f"{key}={value_.replace(',', ',,')}" for key, value_ in pairs)
    properties = Properties(text)
    assert [*properties.items()] == pairs
    assert str(properties) == text


def test_options_with_and_without_an_argument() -> None:
    options = parse_options(["-S", "--no-reboot", "-m", "1G", "x.img", "-append", "-nographic", "-"])
    assert [(option.name, option.value) for option in options] == [
        *(("S", None), ("no-reboot", None), ("m", "1G"), ("", "x.img"), ("append", "-nographic"), ("", "-"))
    ]


@settings(deadline=None)
@given(st.integers(min_value=1, max_value=1 << 50))
def test_sizes_are_read_as_they_are_written(size: int) -> None:
    assert parse_size(format_size(size)) == size


def test_a_process_that_is_no_qemu_is_refused() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(GuestRefusedError) as caught:
            read_running(process.pid)
        assert caught.value.code == "not-qemu"
        process.communicate(b"\n")
    with pytest.raises(GuestError) as gone:
        read_running(process.pid)
    assert gone.value.code == "guest-gone"


def test_a_program_given_by_a_relative_path_is_named_by_its_file() -> None:
    for first, expected in (
        ("./qemu-system-x86_64", PROGRAM),
        ("vm1", PROGRAM),
        ("/opt/qemu", "/opt/qemu"),
        ("qemu-kvm", "qemu-kvm"),
    ):
        table = target_table(Running(1, (first, "-m", "1G"), PROGRAM, "/", 64055))
        assert table.command[0] == expected
        assert any("64055" in check for check in table.checks)
