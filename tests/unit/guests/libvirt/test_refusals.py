"""Each device that a domain cannot take along is refused by its name, from the XML that libvirt shows of a running domain."""

from __future__ import annotations

import pytest

from migrated.errors import GuestRefusedError
from migrated.guests.libvirt.source import refuse_devices

DISK = "<disk type='file'><driver name='qemu' type='qcow2'/><source file='/a'/><target dev='vda'/>{}</disk>"
REFUSED = {
    "a host device": "<hostdev mode='subsystem' type='pci' managed='yes'><source><address bus='1'/></source></hostdev>",
    "a host network device": "<interface type='hostdev'><source><address type='pci' bus='1'/></source></interface>",
    "a vhost-user network device": "<interface type='vhostuser'><source type='unix' path='/a' mode='client'/></interface>",
    "a vDPA network device": "<interface type='vdpa'><source dev='/dev/vhost-vdpa-0'/></interface>",
    "a vhost-user disk": "<disk type='vhostuser'><source type='unix' path='/a'/><target dev='vda'/></disk>",
    "a vDPA disk": "<disk type='vhostvdpa'><source dev='/dev/vhost-vdpa-0'/><target dev='vda'/></disk>",
    "a block job (mirror)": DISK.format("<mirror type='file' job='copy' ready='yes'><source file='/b'/></mirror>"),
    "a virtiofs file system": "<filesystem type='mount'><driver type='virtiofs'/><source dir='/a'/></filesystem>",
    "an emulated TPM": "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>",
    "a TPM of the host": "<tpm model='tpm-tis'><backend type='passthrough'><device path='/dev/tpm0'/></backend></tpm>",
    "a vhost-user video device": "<video><driver name='vhostuser'/><model type='virtio'/></video>",
    "memory shared with others": "<shmem name='a'><model type='ivshmem-plain'/></shmem>",
}
PLAIN = (
    DISK.format("<backingStore/>")
    + "<filesystem type='mount'><driver type='path'/><source dir='/a'/></filesystem>"
    + "<interface type='network'><source network='default'/></interface>"
    + "<video><model type='virtio'/></video><memballoon model='virtio'/>"
)


def domain(devices: str, more: str = "") -> str:
    """The XML of a running domain with these devices."""
    return f"<domain type='kvm'><name>vm</name>{more}<devices>{PLAIN}{devices}</devices></domain>"


@pytest.mark.parametrize("name", REFUSED)
def test_a_device_that_would_not_arrive_whole_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(GuestRefusedError, match="guest vm has") as refused:
        refuse_devices("vm", domain(REFUSED[name]))
    assert refused.value.code == "unsupported-device"
    assert refused.value.message.removeprefix("guest vm has ").startswith(name)


def test_all_of_them_are_named_at_once() -> None:
    with pytest.raises(GuestRefusedError) as refused:
        refuse_devices("vm", domain("".join(REFUSED.values()), "<launchSecurity type='sev'/>"))
    assert all(name in refused.value.message for name in (*REFUSED, "encrypted memory"))


def test_other_devices_are_no_obstacle() -> None:
    refuse_devices("vm", domain(""))
