"""Install the agents: an environment of their own, the units, the configuration, manual pages and completions.

``python -m package.install --wheel WHEEL [--destdir DIRECTORY] [--prefix /usr/local] [--python 3.13]``, which is
``make install`` and the greater part of ``make deb``.

    PREFIX/lib/migrated          the environment: what package/agents.lock names, each file checked against its hash
    PREFIX/bin/migrated          the program
    PREFIX/lib/systemd/system    the units; PREFIX/lib/sysusers.d and PREFIX/lib/tmpfiles.d
    PREFIX/share                 manual pages, completions, examples, the list of components
    /etc/migrated                the configuration; a file that exists is kept
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

from package import agents, sbom

ROOT: Final = Path(__file__).parents[1]
CONFIGURATION: Final = Path("/etc/migrated")
#: The units are written for a program that was installed here.
UNIT_PROGRAM: Final = "/usr/local/bin/migrated"
#: Whatever else is in systemd/ is a unit.
NOT_UNITS: Final = {".sysusers.conf": "sysusers.d", ".tmpfiles.conf": "tmpfiles.d"}

PROGRAM: Final = """\
#!{python} -I
import sys

from migrated.cli import main

sys.exit(main())
"""


class Installation:
    """What is below one prefix."""

    def __init__(self, destdir: Path, prefix: Path, version: str) -> None:
        self.destdir = destdir
        self.prefix = prefix
        self.version = version
        self.environment = prefix / "lib" / "migrated"

    def at(self, path: Path) -> Path:
        """Return where a path is now, its directory made."""
        there = self.destdir / path.relative_to("/")
        there.parent.mkdir(parents=True, exist_ok=True)
        return there

    @property
    def site(self) -> Path:
        """The directory of the environment's packages."""
        return self.environment / "lib" / f"python{self.version}" / "site-packages"

    def add_environment(self, wheel: Path, python: Path) -> None:
        """Lay out the virtual environment: it needs no program of its own, and so no version of Python but its own."""
        there = self.at(self.environment)
        shutil.rmtree(there, ignore_errors=True)
        # Whoever ran them where they were made has left bytecode there: this installation compiles its own.
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(agents.packages(self.version), self.at(self.site), ignore=ignored)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(self.at(self.site))
        (there / "pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
        (there / "bin").mkdir()
        (there / "bin" / "python3").symlink_to(python)
        program = there / "bin" / "migrated"
        program.write_text(PROGRAM.format(python=self.environment / "bin" / "python3"))
        program.chmod(0o755)
        link = self.at(self.prefix / "bin" / "migrated")
        link.unlink(missing_ok=True)
        link.symlink_to("../lib/migrated/bin/migrated")

    def compile(self) -> None:
        """Compile the environment's modules, which nobody may do later: the agents cannot write there."""
        compiling = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode=checked-hash"]
        places = [f"-s{self.destdir}", "-p/"] if self.destdir != Path("/") else []
        subprocess.run([*compiling, *places, str(self.at(self.environment))], check=True)

    def add_units(self) -> None:
        """Copy all of systemd/, with the program where this prefix has it."""
        for source in sorted((ROOT / "systemd").iterdir()):
            kind = next((kind for kind in NOT_UNITS if source.name.endswith(kind)), None)
            if kind is None:
                path = self.prefix / "lib" / "systemd" / "system" / source.name
            else:
                path = self.prefix / "lib" / NOT_UNITS[kind] / f"{source.name.removesuffix(kind)}.conf"
            there = self.at(path)
            there.write_text(source.read_text().replace(UNIT_PROGRAM, str(self.prefix / "bin" / "migrated")))
            there.chmod(0o644)

    def add_configuration(self) -> None:
        """Copy the annotated files and the examples.  A file that exists is the operator's."""
        for source in sorted((ROOT / "config").glob("*.toml")):
            there = self.at(CONFIGURATION / source.name)
            there.parent.chmod(0o750)
            if not there.exists():
                shutil.copyfile(source, there)
                there.chmod(0o640)
        examples = self.at(self.prefix / "share" / "doc" / "migrated" / "examples")
        shutil.copytree(ROOT / "config" / "examples", examples, dirs_exist_ok=True)

    def add_documents(self) -> None:
        """Write manual pages and completions, and the list of components with their licences."""
        share = self.at(self.prefix / "share")
        # By this Python, whichever the environment is for.
        path = os.pathsep.join(map(str, (ROOT, agents.packages(agents.own_version()))))
        subprocess.run(
            [sys.executable, "-m", "package.manuals", str(share)], check=True, env={**os.environ, "PYTHONPATH": path}
        )
        documents = share / "doc" / "migrated"
        components = sbom.document(self.version)
        (documents / "migrated.cdx.json").write_text(json.dumps(components, indent=1) + "\n")
        shutil.copyfile(ROOT / "LICENSE", documents / "LICENSE")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m package.install")
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--destdir", type=Path, default=Path("/"))
    parser.add_argument("--prefix", type=Path, default=Path("/usr/local"))
    arguments = parser.parse_args()
    os.umask(0o022)
    made = Installation(arguments.destdir.resolve(), arguments.prefix, agents.own_version())
    made.add_environment(arguments.wheel, agents.own_python())
    made.compile()
    made.add_units()
    made.add_configuration()
    made.add_documents()


if __name__ == "__main__":
    main()
