"""A Dockerfile's steps without a container engine: each stage is an overlay on a Debian tree, each RUN a chroot in it.

Only what our Dockerfile uses is understood; anything else is an error, since a step that is skipped proves nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.rig import supervisor, trees

SUITES: Final = {"debian:12": "bookworm", "debian:13": "trixie"}
STEP_SECONDS: Final = 600.0
#: What leads from this machine to its registries: an engine hands such variables to the steps as well.
PASSED_ON: Final = (
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "PIP_CERT",
)
#: Where a step finds this machine's, if pip needs them: Debian's own path belongs to a package.
CERTIFICATES: Final = "/mnt/certificates.pem"
#: In a mount namespace of its own, which ends with the step: $1 is the stage.
MOUNT: Final = """
stage=$1; shift
root=$stage/root
mount -t overlay -o "lowerdir=$stage/base,upperdir=$stage/upper,workdir=$stage/work" overlay "$root"
"""
ENTER: Final = f"""{MOUNT}
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for file in /etc/resolv.conf /etc/pip.conf; do
    [ -f "$file" ] || continue
    touch "$root$file"
    mount --bind "$file" "$root$file"
done
if [ "${{PIP_CERT:-}}" ]; then
    touch "$root{CERTIFICATES}"
    mount --bind "$PIP_CERT" "$root{CERTIFICATES}"
    export PIP_CERT={CERTIFICATES}
fi
exec chroot "$root" "$@"
"""
#: $2 is a directory of the stage, $3 one of this machine.
PUT: Final = f"""{MOUNT}
into=$1; shift
mkdir -p "$root$into"
find "$1" -mindepth 1 -maxdepth 1 -exec cp --archive --target-directory="$root$into" {{}} +
"""


class Stage:
    """One FROM with its steps."""

    def __init__(self, directory: Path, base: Path) -> None:
        self.directory = directory
        for name in ("upper", "work", "root"):
            (directory / name).mkdir(parents=True)
        (directory / "base").symlink_to(base)
        self.workdir = "/"
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        self.command: list[str] = []
        self.arguments: list[str] = []

    @property
    def files(self) -> Path:
        """What the steps have added."""
        return self.directory / "upper"

    def run(self, *command: str) -> str:
        """Run a program as a step would; its output."""
        return self._step(ENTER, "env", f"--chdir={self.workdir}", *command)

    def put(self, content: Path, into: str) -> None:
        """Copy the content of a directory into one of the stage."""
        self._step(PUT, os.path.join("/", self.workdir, into), str(content))

    def _step(self, script: str, *arguments: str) -> str:
        step = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-euc",
            script,
            "sh",
            str(self.directory),
        ]
        done = subprocess.run(
            [*step, *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={name: os.environ[name] for name in PASSED_ON if name in os.environ} | self.environment,
            timeout=STEP_SECONDS,
        )
        assert done.returncode == 0, f"{shlex.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *arguments: str) -> str:
        """Run the image, with its own arguments if none are given."""
        return self.run(*self.command, *(arguments or self.arguments))


def build(dockerfile: Path, scratch: Path) -> Stage:
    """Carry out the steps; the last stage is the image.  Raises TreeUnavailableError."""
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for step in _steps(dockerfile.read_text()):
        word, _, rest = step.partition(" ")
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            stage = Stage(scratch / f"stage{len(stages)}", trees.image(SUITES[image]))
            stages[name or str(len(stages))] = stage
            continue
        assert stage is not None, step
        match word:
            case "RUN":
                stage.run("/bin/sh", "-c", rest)
            case "WORKDIR":
                stage.run("mkdir", "--parents", rest)
                stage.workdir = rest
            case "COPY":
                with supervisor.directory("copied-", str(scratch)) as copied:
                    *sources, target = rest.split()
                    if sources[0].startswith("--from="):
                        _collect(sources[1:], stages[sources[0].removeprefix("--from=")].files, [], copied)
                    else:
                        ignored = (dockerfile.parent / ".dockerignore").read_text().split()
                        _collect(sources, dockerfile.parent, ignored, copied)
                    stage.put(copied, target)
            case "ENV":
                name, _, value = rest.partition("=")
                stage.environment[name] = value
            case "ENTRYPOINT":
                stage.command = json.loads(rest)
            case "CMD":
                stage.arguments = json.loads(rest)
            case "STOPSIGNAL":
                assert rest.startswith("SIG"), step
            case _:
                raise AssertionError(f"not understood: {step}")
    assert stage is not None, dockerfile
    return stage


def _steps(text: str) -> list[str]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [" ".join(step.split()) for step in "\n".join(lines).replace("\\\n", " ").splitlines()]


def _collect(sources: list[str], origin: Path, ignored: list[str], into: Path) -> None:
    """Gather what a COPY copies: the content of directories, and files."""
    leave = {str(path) for pattern in ignored for path in origin.glob(pattern)}

    def left_out(directory: str, names: list[str]) -> list[str]:
        return [name for name in names if os.path.join(directory, name) in leave]

    for pattern in sources:
        found = [origin] if pattern == "." else list(origin.glob(pattern.lstrip("/")))
        assert found, f"COPY {pattern}: nothing there"
        for path in found:
            if path.is_dir():
                shutil.copytree(path, into, symlinks=True, dirs_exist_ok=True, ignore=left_out)
            else:
                shutil.copy2(path, into)
