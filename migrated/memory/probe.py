"""Find out by trying what this host can do: the substance of ``migrated check``.

For each need that is not met, the module says how to fix it.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from pathlib import Path

from migrated.errors import HostError
from migrated.memory.memfd import DEFAULT_PAGE_BYTES, pools
from migrated.memory.native import call, ffi, lib
from migrated.privileged import helper, open_file
from migrated.units import format_size

_CAP_SYS_PTRACE = 19
_CAP_SYS_ADMIN = 21
_CAP_CHECKPOINT_RESTORE = 40
#: Directives that systemd implements with a seccomp filter (systemd.exec(5)).
SECCOMP_DIRECTIVES = (
    *("LockPersonality", "MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock", "ProtectHostname"),
    *("ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables", "RestrictAddressFamilies"),
    *("RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "SystemCallArchitectures", "SystemCallFilter"),
)


#: What each side needs from the kernel, as fields of `Features`.
SERVING = ("minor_hugetlbfs", "minor_shmem", "missing_hugetlbfs", "missing_shmem", "event_remove", "exact_address")
TRACKING = ("wp_hugetlbfs_shmem", "wp_unpopulated", "wp_async", "pagemap_scan")


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """See ``struct mgd_features``."""

    has_userfaultfd: bool
    has_user_mode_only: bool
    minor_hugetlbfs: bool
    minor_shmem: bool
    missing_hugetlbfs: bool
    missing_shmem: bool
    wp_hugetlbfs_shmem: bool
    wp_unpopulated: bool
    wp_async: bool
    pagemap_scan: bool
    poison: bool
    event_remove: bool
    exact_address: bool

    @property
    def can_track(self) -> bool:
        """Whether writes of another process can be tracked."""
        return not self.lacking(TRACKING)

    @property
    def can_serve(self) -> bool:
        """Whether the faults of an incoming guest can be served."""
        return not self.lacking(SERVING)

    def lacking(self, names: tuple[str, ...]) -> str:
        """Return those of these features that the kernel lacks, as text for people."""
        return ", ".join(name for name in names if not getattr(self, name))


def features() -> Features:
    """Query the kernel on throw-away descriptors."""
    raw = ffi.new("struct mgd_features *")
    call(lib.mgd_probe, raw)
    return Features(*(bool(getattr(raw, field.name)) for field in dataclasses.fields(Features)))


@dataclasses.dataclass(frozen=True, slots=True)
class Requirement:
    """One need of an agent.

    ``role``: "source", "target" or "both"; ``needed``: whether nothing works without it (else something works worse);
    ``found``: the current state; ``fix``: what to do, empty if ``ok``.
    """

    name: str
    role: str
    needed: bool
    ok: bool
    found: str
    fix: str


def capabilities() -> int:
    """Return our effective capabilities, one bit each."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return int(match[1], 16) if match else 0


def _has(capability: int) -> bool:
    return bool(capabilities() >> capability & 1)


def requirements() -> list[Requirement]:
    """Return everything that `migrated check` shows, most important first."""
    found = features()
    return [
        _userfaultfd(found),
        _serving(found),
        _tracking(found),
        *([_helper()] if helper() else []),
        _tracing(),
        _unconfined(),
        _map_files(),
        _pool(),
        _kvm(),
        _need(
            "memory errors for lost pages (UFFDIO_POISON)",
            "target",
            needed=False,
            ok=found.poison,
            found="yes" if found.poison else "no",
            fix="run Linux 6.6 or newer; only `migrated abandon` needs it",
        ),
    ]


def _need(name: str, role: str, *, ok: bool, found: str, fix: str, needed: bool = True) -> Requirement:
    """Return a requirement, without ``fix`` if it is met."""
    return Requirement(name, role, needed, ok, found, "" if ok else fix)


def _userfaultfd(found: Features) -> Requirement:
    if found.has_userfaultfd:
        text, fix = "kernel faults included", ""
    elif found.has_user_mode_only:
        text = "faults of user space only: enough for the demo's own guest, not for KVM or QEMU"
        fix = "run as root or with CAP_SYS_PTRACE, or give access to /dev/userfaultfd, or sysctl vm.unprivileged_userfaultfd=1"
    else:
        text, fix = "none", "run a kernel with CONFIG_USERFAULTFD, outside a sandbox that forbids the system call"
    return _need("userfaultfd", "both", ok=found.has_userfaultfd, found=text, fix=fix)


def _serving(found: Features) -> Requirement:
    return _need(
        "minor and missing faults on shared memory",
        "target",
        ok=found.can_serve,
        found=f"lacking: {found.lacking(SERVING)}" if not found.can_serve else "all there",
        fix="run Linux 5.18 or newer with CONFIG_HAVE_ARCH_USERFAULTFD_MINOR",
    )


def _tracking(found: Features) -> Requirement:
    return _need(
        "dirty tracking of another process",
        "source",
        ok=found.can_track,
        found=f"lacking: {found.lacking(TRACKING)}" if not found.can_track else "all there",
        fix="run Linux 6.7 or newer with CONFIG_PTE_MARKER_UFFD_WP",
    )


def _tracing() -> Requirement:
    name = "reaching into a running QEMU (ptrace)"
    if platform.machine() != "x86_64":
        fix = "only guests that co-operate (driver `process`) can be moved from this architecture"
        return _need(name, "both", ok=False, found=platform.machine(), fix=fix)
    if _has(_CAP_SYS_PTRACE) or helper():
        return _need(name, "both", ok=True, found="by the helper" if helper() else "CAP_SYS_PTRACE", fix="")
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except (OSError, ValueError):
        scope = 0
    return _need(
        name,
        "both",
        ok=scope == 0,
        found="processes of our own user" if scope == 0 else f"kernel.yama.ptrace_scope = {scope}",
        fix="run as root, or give the service AmbientCapabilities=CAP_SYS_PTRACE",
    )


def _unconfined() -> Requirement:
    """A process under seccomp may not suspend another's filter, and its children, guests too, inherit its filter."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    confined = re.search(r"^Seccomp:\s*[1-9]", status, re.MULTILINE) is not None
    return _need(
        "no seccomp filter on the agent",
        "both",
        ok=not confined or bool(helper()),
        found="the helper has none" if helper() else "this process is under one" if confined else "none",
        fix=f"use the privileged helper (systemd/migrated-helper.socket); without it a systemd unit must not set {', '.join(SECCOMP_DIRECTIVES)} ; a container "
        "needs --security-opt seccomp=unconfined",
    )


def _helper() -> Requirement:
    found = "answers"
    try:
        os.close(open_file(os.getpid(), "maps"))
    except (OSError, HostError) as error:
        found = str(error)
    return _need(
        "the privileged helper",
        "both",
        ok=found == "answers",
        found=found,
        fix="systemctl enable --now migrated-helper.socket; see `systemctl status migrated-helper.service`",
    )


def _map_files() -> Requirement:
    ok = _has(_CAP_SYS_ADMIN) or _has(_CAP_CHECKPOINT_RESTORE) or bool(helper())
    return _need(
        "opening a guest's memory (/proc/PID/map_files)",
        "source",
        ok=ok,
        found="allowed" if ok else "CAP_CHECKPOINT_RESTORE is missing",
        fix="run as root, or give the service AmbientCapabilities=CAP_CHECKPOINT_RESTORE",
    )


def _pool() -> Requirement:
    offered = pools()
    found = ", ".join(
        f"{format_size(pool.page_bytes)}: {max(0, pool.available)} of {pool.total} free" for pool in offered
    )
    ok = any(pool.available > 0 for pool in offered)
    default = next((pool for pool in offered if pool.page_bytes == DEFAULT_PAGE_BYTES), None)
    if default is None:
        fix = "run a kernel with CONFIG_HUGETLBFS; until then guests arrive on 4 KiB pages"
    else:
        fix = f"{default.raise_command(512)}  (for each GiB of guest memory; until then guests arrive on 4 KiB pages)"
    return _need("huge pages", "target", needed=False, ok=ok, found=found or "none offered", fix=fix)


def _kvm() -> Requirement:
    device = "/dev/kvm"
    ok = os.access(device, os.R_OK | os.W_OK)
    text = "usable" if ok else ("no right to use it" if Path(device).exists() else "absent")
    return _need(
        "KVM",
        "both",
        needed=False,
        ok=ok,
        found=text,
        fix="load kvm_intel or kvm_amd, and join the group kvm; without it guests run emulated",
    )
