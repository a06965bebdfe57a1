"""A machine that systemd has booted: a Debian tree under systemd-nspawn, with this checkout and its agents' units in it.

What is written there goes with it: the tree below stays as it was made.  The network is this machine's own, so agents of
two such machines reach each other on loopback.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import migrated._native
from migrated.demo.run import cache_directory
from tests.rig import supervisor, trees

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "systemd"
DEVICES = ("/dev/kvm", "/dev/userfaultfd")
BOOT_SECONDS = 60.0
COMMAND_SECONDS = 60.0
PACKAGE_SECONDS = 300.0
#: Of a kernel or a container around us that does not let nspawn do its work; any other end of it is a failure of the test.
REFUSALS = ("Operation not permitted", "Permission denied", "Read-only file system")
_NSPAWN_RUN = Path("/run/systemd/nspawn")


class MachineUnavailableError(Exception):
    """No such machine can be booted here; the message says why."""


class Machine:
    """A booted one.  Made by `booted`."""

    def __init__(self, name: str, leader: int, shared: Path) -> None:
        self.name = name
        self.shared = shared  # seen there under the same path
        self.leader = leader  # its process 1, as it is numbered here
        #: What makes a command run there; with its network, which is ours.
        self.prefix = ("nsenter", f"--target={leader}", "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--")

    def path(self, path: Path | str) -> Path:
        """Where a path of the machine is found from outside."""
        return Path(f"/proc/{self.leader}/root") / str(path).lstrip("/")

    def run(self, *command: str, check: bool = True, seconds: float = COMMAND_SECONDS) -> str:
        """Run a command there; its output."""
        done = subprocess.run([*self.prefix, *command], check=False, capture_output=True, text=True, timeout=seconds)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def dpkg(self, *arguments: str, check: bool = True) -> str:
        """Run dpkg there; its output."""
        return self.run("dpkg", "--force-unsafe-io", *arguments, check=check, seconds=PACKAGE_SECONDS)

    def install_packages(self, *packages: Path) -> None:
        """Install our Debian package in place of the units, with those that it depends on and the tree lacks."""
        # As below: this file takes precedence over the package's.
        ours = [line for line in (UNITS / "migrated.tmpfiles.conf").read_text().splitlines() if " /dev/" not in line]
        self.path("/etc/tmpfiles.d/migrated.conf").write_text("\n".join([*ours, ""]))
        self.dpkg("--install", *map(str, packages))

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        output = self.run("systemctl", "show", f"--property={','.join(properties)}", unit)
        return dict(line.split("=", 1) for line in output.splitlines())

    def processes(self) -> dict[int, list[str]]:
        """Command lines there, by their numbers there."""
        found = {}
        for entry in self.path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        return found

    @contextlib.contextmanager
    def drop_in(self, unit: str, *lines: str) -> Iterator[None]:
        """Settings of a service that the block needs."""
        path = self.path(f"/run/systemd/system/{unit}.d/test.conf")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["[Service]", *lines]) + "\n")
        self.run("systemctl", "daemon-reload")
        try:
            yield
        finally:
            path.unlink()
            self.run("systemctl", "daemon-reload")

    def install(self) -> None:
        """Install the units, as docs/operations.md says."""
        units = [unit for unit in UNITS.iterdir() if unit.suffix in {".service", ".socket"}]
        for unit in units:
            shutil.copy(unit, self.path("/etc/systemd/system"))
        shutil.copy(UNITS / "migrated.sysusers.conf", self.path("/usr/lib/sysusers.d/migrated.conf"))
        shutil.copy(UNITS / "migrated.tmpfiles.conf", self.path("/usr/lib/tmpfiles.d/migrated.conf"))
        # The program here is that of a checkout, which may be in a directory that the helper's unit hides.
        drop_in = self.path("/etc/systemd/system/migrated-helper.service.d/checkout.conf")
        drop_in.parent.mkdir()
        drop_in.write_text("[Service]\nPrivateTmp=no\nProtectHome=no\n")
        self.run("systemd-sysusers")
        # The devices are this machine's own: their owners stay as they are.
        self.run("systemd-tmpfiles", "--create", "--exclude-prefix=/dev")
        self.run("systemctl", "daemon-reload")
        # systemd forgets a stopped unit that nothing refers to, and the descriptors that it stores for it.
        self.run("systemctl", "enable", "--quiet", *(unit.name for unit in units if "[Install]" in unit.read_text()))
        self.run("systemctl", "start", "migrated-helper.socket")


@contextlib.contextmanager
def booted(name: str, suite: str, shared: Path, *packages: Path) -> Iterator[Machine]:
    """Boot the tree of a Debian release; ``shared`` is seen there under the same path.

    Its agents are those of this checkout, or those of our Debian package, if it is given.

    Raises MachineUnavailableError, TreeUnavailableError.
    """
    _check_here()
    tree = trees.tree(suite)
    machine_name = f"{shared.name.partition('-')[0]}-{os.getpid()}-{name}"  # several pairs may be up at a time
    log = shared / f"{name}.boot.log"
    seen = {str(path) for path in (ROOT, cache_directory(), shared, *map(Path, DEVICES)) if path.exists()}
    command = [
        *("systemd-nspawn", "--quiet", f"--directory={tree}", "--volatile=overlay", f"--machine={machine_name}"),
        *("--register=no", "--keep-unit", "--capability=all", "--resolv-conf=off", "--timezone=off"),
        *(f"--bind={path}" for path in sorted(seen)),
        *([f"--bind-ro={_program(tree, shared)}:/usr/local/bin/migrated"] if not packages else []),
        f"--setenv={supervisor.WORD}={os.environ[supervisor.WORD]}",  # so that the supervisor finds process 1
        "--boot",
    ]
    with contextlib.ExitStack() as undo:
        undo.callback(_tidy, machine_name)
        undo.enter_context(supervisor.undoing("rmdir", str(_NSPAWN_RUN / "propagate" / machine_name)))
        cgroups = [undo.enter_context(_cgroup(path / machine_name)) for path in _own_cgroups()]
        enter = 'for cgroup in "$@"; do echo $$ >"$cgroup/cgroup.procs"; done; '
        with log.open("wb") as output:
            nspawn = subprocess.Popen(
                ["sh", "-euc", f"{enter}exec {shlex.join(command)}", "sh", *map(str, cgroups)],
                env={**os.environ, "SYSTEMD_SECCOMP": "0"},  # nspawn's own filter would be the agents', too
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        undo.callback(_end, nspawn)
        machine = _wait_booted(name, nspawn, shared, log)
        if packages:
            machine.install_packages(*packages)
        else:
            machine.install()
        yield machine


def _own_cgroups() -> list[Path]:
    """Where our own cgroup is in the hierarchies that systemd uses: one, or two beside the first version's controllers."""
    ours = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        ours[names] = path.lstrip("/")
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        where = Path(before.split(" ")[4])
        if kind == "cgroup2":
            found.append(where / ours[""])
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            found.append(where / ours["name=systemd"])
    return found


@contextlib.contextmanager
def _cgroup(path: Path) -> Iterator[Path]:
    """One for a machine: in a common one, two systemds would remove each other's units."""
    try:
        path.mkdir()
    except OSError as error:
        raise MachineUnavailableError(f"no control group can be made here: {error}") from error
    remove = ("find", str(path), "-depth", "-type", "d", "-exec", "rmdir", "--", "{}", "+")
    with supervisor.undoing(*remove):
        try:
            yield path
        finally:
            for _ in range(50):  # the kernel may still be taking the last process out
                if subprocess.run(remove, check=False, stderr=subprocess.DEVNULL).returncode == 0:
                    break
                time.sleep(0.1)


def _check_here() -> None:
    if os.geteuid() != 0:
        raise MachineUnavailableError("only root can boot a machine")
    if shutil.which("systemd-nspawn") is None:
        raise MachineUnavailableError("systemd-nspawn is not installed (Debian package systemd-container)")


def _program(tree: Path, shared: Path) -> Path:
    """What is ``migrated`` there: this checkout, with the packages of this run if the tree has its interpreter."""
    installed = Path(sys.executable).parent / "migrated"
    real = Path(sys.executable).resolve()
    if real.parent == Path("/usr/bin") and (tree / real.relative_to("/")).exists():
        return installed
    version = (tree / "usr/bin/python3").readlink().name.removeprefix("python")
    packages = _packages(version)
    native = Path(migrated._native.__file__).parent
    program = shared / f"migrated-on-python{version}"
    program.write_text(
        f"""#!/usr/bin/python3
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(packages)!r}]
import migrated
migrated.__path__.append({str(native)!r})
from migrated.cli import main
sys.exit(main())
"""
    )
    program.chmod(0o755)
    return program


def _packages(version: str) -> Path:
    """What the agents need from PyPI, for another version of Python than ours; made once for each set of them."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    digest = hashlib.sha256("\n".join(needed).encode()).hexdigest()[:16]
    path = cache_directory() / f"packages-{version}-{digest}"
    if not path.exists():
        with supervisor.directory(".packages-", str(path.parent)) as scratch:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            which = [f"--target={scratch / 'made'}", f"--python-version={version}", "--only-binary=:all:"]
            done = subprocess.run([*install, *which, *needed], check=False, capture_output=True, text=True)
            if done.returncode:
                raise MachineUnavailableError(f"no packages for Python {version}: {done.stderr.strip()[-500:]}")
            (scratch / "made").rename(path)
    return path


def _wait_booted(name: str, nspawn: subprocess.Popen[bytes], shared: Path, log: Path) -> Machine:
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline and nspawn.poll() is None:
        if children := _children(nspawn.pid):
            machine = Machine(name, children[0], shared)
            # `degraded` is up as well: some unit of the distribution's did not like it here.
            if machine.run("systemctl", "is-system-running", "--wait", check=False).strip() in {"running", "degraded"}:
                return machine
        time.sleep(0.05)
    said = " | ".join(log.read_text(errors="replace").splitlines()[-6:])[-1000:]
    if any(refusal in said for refusal in REFUSALS):
        raise MachineUnavailableError(f"systemd-nspawn may not boot a machine here: {said}")
    raise AssertionError(f"no machine boots under systemd-nspawn: {said}")


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _end(nspawn: subprocess.Popen[bytes]) -> None:
    """End process 1, and with it every process there; nspawn then takes its mounts away."""
    if nspawn.poll() is None:
        for child in _children(nspawn.pid):
            os.kill(child, signal.SIGKILL)
        try:
            nspawn.wait(10)
        except subprocess.TimeoutExpired:
            nspawn.kill()
            nspawn.wait()


def _tidy(machine_name: str) -> None:
    """Nspawn leaves these two where /run is no file system of its own."""
    with contextlib.suppress(OSError):
        (_NSPAWN_RUN / "propagate" / machine_name).rmdir()
    for lock in (_NSPAWN_RUN / "locks").glob(f"*{machine_name}*"):
        lock.unlink(missing_ok=True)
