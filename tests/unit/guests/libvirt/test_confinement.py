"""AppArmor and SELinux are named where they may deny something, with what they have to allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated.errors import GuestRefusedError
from migrated.guests.libvirt import confinement

DOCUMENT = Path(__file__).parents[4] / "docs" / "libvirt.md"
APPARMOR = ("sys/module/apparmor/parameters/enabled", "Y\n")
SELINUX = ("sys/fs/selinux/enforce", "1")


def host(root: Path, *files: tuple[str, str], libvirt: bool = True) -> Path:
    """A host with these files."""
    for name, text in (*files, *([("etc/libvirt/qemu.conf", "")] if libvirt else [])):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("module", "label", "name"),
    [
        (APPARMOR, "libvirt-6d8ba4ab-4ee7-4a0b-a47c-1b4a3bd0c5f3 (enforce)\n", "AppArmor"),
        (APPARMOR, "libvirt-6d8ba4ab-4ee7-4a0b-a47c-1b4a3bd0c5f3 (complain)\n", None),
        (APPARMOR, "unconfined\n", None),
        (SELINUX, "system_u:system_r:svirt_t:s0:c107,c434\0", "SELinux"),
        (SELINUX, "unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023\0", None),
        ((APPARMOR[0], "N\n"), "unconfined\n", None),
        ((SELINUX[0], "0"), "system_u:system_r:svirt_t:s0:c107,c434\0", None),
    ],
)
def test_a_confined_qemu_is_named_with_its_label(
    tmp_path: Path, module: tuple[str, str], label: str, name: str | None
) -> None:
    found = confinement.of_process(7, host(tmp_path, module, ("proc/7/attr/current", label)))
    assert (found.module if found else None) == name
    if found:
        assert found.label == label.strip("\0\n")
        assert found.fix


def test_a_host_without_them_needs_nothing(tmp_path: Path) -> None:
    assert confinement.requirements(host(tmp_path)) == []
    assert confinement.requirements(host(tmp_path / "b", APPARMOR, SELINUX, libvirt=False)) == []
    assert confinement.of_process(7, tmp_path) is None


def test_check_tells_what_to_allow_until_it_is_allowed(tmp_path: Path) -> None:
    before, selinux = confinement.requirements(host(tmp_path, APPARMOR, SELINUX))
    assert not before.ok
    assert not before.needed
    assert confinement.APPARMOR_RULES in before.fix
    assert confinement.SELINUX_MODULE in selinux.fix
    lines = "".join(f"  {line}\n" for line in confinement.APPARMOR_RULES.splitlines())
    after, _ = confinement.requirements(host(tmp_path, (confinement.APPARMOR_FILE.lstrip("/"), lines)))
    assert (after.ok, after.fix) == (True, "")


def test_an_error_of_a_confined_qemu_names_what_may_have_denied_it(monkeypatch: pytest.MonkeyPatch) -> None:
    confined = confinement.Confinement("AppArmor", "libvirt-1 (enforce)", "")
    for found, hint in ((confined, "try; AppArmor confines this QEMU (libvirt-1 (enforce))"), (None, "try")):
        monkeypatch.setattr(confinement, "of_process", lambda _, found=found: found)
        with pytest.raises(GuestRefusedError) as raised, confinement.named(7):
            raise GuestRefusedError("no", code="cannot-inject", hint="try")
        assert raised.value.hint.startswith(hint)


def test_the_document_has_the_same_lines() -> None:
    text = DOCUMENT.read_text()
    assert f"```text\n{confinement.APPARMOR_RULES}```" in text
    assert f"```text\n{confinement.SELINUX_MODULE}```" in text
