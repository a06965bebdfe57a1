"""AppArmor and SELinux around libvirt's QEMUs: whether they are there, and what their policies have to allow.

libvirt has each QEMU confined to its own files.  The agent's descriptors are not among them.  None of this has been tested with
a security module at work; docs/libvirt.md says so, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from migrated.errors import GuestError
from migrated.memory.probe import Requirement

#: Included by the profile of every domain.
APPARMOR_FILE: Final = "/etc/apparmor.d/local/abstractions/libvirt-qemu"
APPARMOR_RULES: Final = """\
ptrace (readby, tracedby) peer=unconfined,
signal (receive) peer=unconfined,
unix (create, send, receive) type=seqpacket,
/memfd:migrated* rw,
/dev/userfaultfd rw,
/run/migrated/target/guests/*/*.image r,
"""
SELINUX_MODULE: Final = """\
module migrated 1.0;
require {
  type svirt_t; type unconfined_service_t; type tmpfs_t; type hugetlbfs_t; type var_run_t;
  class fd use; class file { getattr map read write }; class fifo_file { getattr read };
  class anon_inode { create ioctl read };
}
allow svirt_t unconfined_service_t:fd use;
allow svirt_t { tmpfs_t hugetlbfs_t }:file { getattr map read write };
allow svirt_t var_run_t:fifo_file { getattr read };
allow svirt_t self:anon_inode { create ioctl read };
"""
_DOCUMENT: Final = "docs/libvirt.md#confinement"
_FIX: Final = {
    "AppArmor": f"add these lines to {APPARMOR_FILE} and start the domains anew, or load their profiles again "
    f"(apparmor_parser -r /etc/apparmor.d/libvirt/libvirt-*):\n{APPARMOR_RULES}",
    "SELinux": f"load this module (checkmodule, semodule_package, semodule -i):\n{SELINUX_MODULE}",
}
_UNCONFINED: Final = re.compile(r"unconfined|.*\(complain\)|(\w+:){2}unconfined_t(:.*)?", re.ASCII)


@dataclasses.dataclass(frozen=True, slots=True)
class Confinement:
    """What confines a process.  ``fix``: what the policy has to allow, as text for people."""

    module: str
    label: str
    fix: str


def of_process(pid: int, root: Path = Path("/")) -> Confinement | None:
    """What confines the process; None if nothing does."""
    for module in modules(root):
        with contextlib.suppress(OSError):  # a kernel with one module has one label
            label = (root / f"proc/{pid}/attr/current").read_text(errors="replace").strip("\0\n ")
            if label and _UNCONFINED.fullmatch(label) is None:
                return Confinement(module, label, _FIX[module])
    return None


def modules(root: Path = Path("/")) -> list[str]:
    """The security modules that are at work on this host."""
    signs = {"AppArmor": ("sys/module/apparmor/parameters/enabled", "Y"), "SELinux": ("sys/fs/selinux/enforce", "1")}
    found = []
    for module, (path, sign) in signs.items():
        with contextlib.suppress(OSError):
            if (root / path).read_text().strip() == sign:
                found.append(module)
    return found


def requirements(root: Path = Path("/")) -> list[Requirement]:
    """For `migrated check`: a line for each security module that would confine libvirt's QEMUs here."""
    if not (root / "etc/libvirt").is_dir():
        return []
    return [_requirement(module, root) for module in modules(root)]


def _requirement(module: str, root: Path) -> Requirement:
    allowed = False
    if module == "AppArmor":
        with contextlib.suppress(OSError):
            lines = (root / APPARMOR_FILE.lstrip("/")).read_text(errors="replace").splitlines()
            allowed = set(APPARMOR_RULES.splitlines()) <= {line.strip() for line in lines}
    return Requirement(
        name=f"libvirt's guests under {module}",
        role="both",
        needed=False,
        ok=allowed,
        found=f"{APPARMOR_FILE} has the lines" if allowed else "it may deny what the agent does in QEMU",
        fix="" if allowed else _FIX[module],
    )


@contextlib.contextmanager
def named(pid: int) -> Iterator[None]:
    """Have an error name what confines the process, because that may be its reason."""
    try:
        yield
    except GuestError as error:
        found = of_process(pid)
        if found is not None:
            denied = f"{found.module} confines this QEMU ({found.label}) and may have denied it: see {_DOCUMENT}"
            error.hint = f"{error.hint}; {denied}" if error.hint else denied
        raise
