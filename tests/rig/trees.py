"""Debian trees: other versions of QEMU for the guest tests, and a system to boot under systemd-nspawn.

    python -m tests.rig.trees [SUITE …]      build these trees (default: all) and print their versions

A tree holds systemd, Python and QEMU of one Debian release.  mmdebstrap builds it once, in ``$MIGRATED_CACHE/trees/SUITE``;
it uses apt and takes a quarter of debootstrap's time.  The packages come from the mirror that this machine itself uses.

``SUITE/qemu-system-x86_64`` runs the QEMU of a tree as if it were installed here.  It has its own mount namespace, in which
/usr is the tree's and everything else is this machine's.  So every path means the same to that QEMU as to its parent.
Because each step is an exec, it keeps the pid and the descriptors that it was started with.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from migrated.demo.run import cache_directory
from migrated.errors import HostError
from tests.rig import supervisor

#: Debian 12, Debian 13 and unstable; oldest first.
SUITES = ("bookworm", "trixie", "sid")
#: python3 instead of python3-minimal, which lacks asyncio, ssl and sqlite3.
PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3", "qemu-system-x86")
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
MAKE_SECONDS = 300.0

PROGRAM = "qemu-system-x86_64"
# The loader's cache lists this machine's libraries, so the tree's QEMU must not see it.
WRAPPER = f"""#!/bin/sh
exec unshare --mount --propagation slave sh -euc '
mount --bind /dev/null /etc/ld.so.cache
mount --bind "$0/usr" /usr
exec {PROGRAM} "$@"' "${{0%/*}}" "$@"
"""
_RECIPE = "etc/migrated-tree"  # what the tree was built from; a tree with another recipe is rebuilt


class Recipe(NamedTuple):
    """What a tree is built from."""

    variant: str
    packages: tuple[str, ...]

    def __str__(self) -> str:
        """Return what is kept in the tree: a tree with another recipe is rebuilt."""
        return "\n".join([*(self.packages or (self.variant,)), *LEFT_OUT, WRAPPER])


SYSTEM = Recipe("essential", PACKAGES)
IMAGE = Recipe("minbase", ())


class TreeUnavailableError(HostError):
    """The tree does not exist and cannot be built here; the message says why."""


def tree(suite: str) -> Path:
    """Return the tree of this Debian release; build it if necessary.  Raises TreeUnavailableError."""
    return _tree(suite, _trees() / suite, SYSTEM)


def image(suite: str) -> Path:
    """Return a tree like the base image of this Debian release: with apt, and little else.  Raises TreeUnavailableError."""
    return _tree(suite, _trees() / f"{suite}-image", IMAGE)


def _tree(suite: str, path: Path, recipe: Recipe) -> Path:
    if _is_current(path, recipe):
        return path
    _check_tools()
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current(path, recipe):
            _make(suite, path, recipe)
    return path


def qemu(suite: str) -> Path:
    """Return the path of this release's QEMU.  Raises TreeUnavailableError."""
    return tree(suite) / PROGRAM


def versions(path: Path) -> str:
    """Return the versions of QEMU and systemd in a tree."""
    qemu_line = subprocess.run([path / PROGRAM, "--version"], check=True, capture_output=True, text=True).stdout
    (library,) = (path / "usr/lib/x86_64-linux-gnu/systemd").glob("libsystemd-core-*.so")
    return f"QEMU {qemu_line.split()[3]}, systemd {library.stem.rpartition('-')[2]}"


def _trees() -> Path:
    return cache_directory() / "trees"


def _is_current(path: Path, recipe: Recipe) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return (path / _RECIPE).read_text() == str(recipe)
    return False


def _check_tools() -> None:
    if os.geteuid() != 0:
        raise TreeUnavailableError("only root can build a Debian tree")
    for program in ("mmdebstrap", "apt-get", "apt-config", "unshare"):
        if shutil.which(program) is None:
            raise TreeUnavailableError(f"cannot build a Debian tree: {program} is not installed")


def _make(suite: str, path: Path, recipe: Recipe) -> None:
    """Build the tree in a scratch directory, and move it into place when it is complete."""
    with supervisor.directory(f".{suite}-", str(path.parent)) as scratch:
        configuration = scratch / "apt.conf"
        configuration.write_text(_run("apt-config", "dump", *_OF_APT))
        made = scratch / "tree"
        _run(
            # In a mount namespace, whatever mmdebstrap mounts disappears with its last process, however that exits.
            *("unshare", "--mount", "mmdebstrap", "--mode=root", f"--variant={recipe.variant}"),
            *(f"--include={package}" for package in recipe.packages),
            *(f"--aptopt={configuration}", "--dpkgopt=force-unsafe-io"),
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
            *(suite, str(made), _mirror()),
        )
        (made / PROGRAM).write_text(WRAPPER)
        (made / PROGRAM).chmod(0o755)
        (made / _RECIPE).write_text(str(recipe))
        if path.exists():  # another recipe, or partly removed; it is deleted with the scratch directory
            path.rename(scratch / "former")
        made.rename(path)


#: Options of this machine's apt for reaching a mirror and for checking it.
_OF_APT = ("Acquire::http", "Acquire::https", "Acquire::Retries", "Acquire::Check-Valid-Until", "Acquire::Check-Date")


def _mirror() -> str:
    """Return the mirror that this machine's own Debian packages come from."""
    output = _run(
        *("apt-get", "indextargets", "--format", "$(REPO_URI)"),
        *("Created-By: Packages", "Origin: Debian", "Label: Debian", "Component: main"),
    )
    if not output:
        raise TreeUnavailableError("apt knows no Debian mirror: is this Debian, and was apt-get update run?")
    return output.splitlines()[0]


def _run(*command: str) -> str:
    """Run a command and return its output.  Raises TreeUnavailableError with its last output if it fails."""
    try:
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MAKE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TreeUnavailableError(f"{' '.join(command[:3])} did not finish within {MAKE_SECONDS:g} s") from None
    if done.returncode:
        told = (done.stderr or done.stdout).strip()[-600:]
        raise TreeUnavailableError(f"{' '.join(command[:3])} failed: {told}")
    return done.stdout


def _made(suites: Sequence[str]) -> Iterator[bool]:
    for suite in suites:
        started = time.monotonic()
        try:
            path = tree(suite)
        except TreeUnavailableError as error:
            print(f"no Debian tree {suite}: {error}")  # noqa: T201 - the output of this command
            yield False
        else:
            print(f"{path}: {versions(path)} ({time.monotonic() - started:.0f} s)")  # noqa: T201 - as above
            yield True


def main() -> int:
    """Build trees; return 0 if all of them exist."""
    parser = argparse.ArgumentParser(prog="python -m tests.rig.trees", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suites", metavar="SUITE", nargs="*", default=SUITES, help=f"of {', '.join(SUITES)}")
    arguments = parser.parse_args()
    supervisor.start()
    return 0 if all(list(_made(arguments.suites))) else 1


if __name__ == "__main__":
    sys.exit(main())
