"""Build the Debian package: ``python -m package.deb --wheel WHEEL --output DIRECTORY``, which is ``make deb``.

``--suite`` chooses the Debian release, which decides on the version of Python that the package is for.  The package's own
scripts are in package/debian/.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Final

from package import agents, sbom
from package.install import CONFIGURATION, Installation

ROOT: Final = Path(__file__).parents[1]
TEMPLATES: Final = ROOT / "package" / "debian"
#: Version of Python, and number of the release.
SUITES: Final = {"bookworm": ("3.11", 12), "trixie": ("3.13", 13)}
SCRIPTS: Final = ("preinst", "postinst", "prerm", "postrm")
#: Debian's own variables say who builds a package.
MAINTAINER: Final = (
    f"{os.environ.get('DEBFULLNAME', 'the migrated authors')} <{os.environ.get('DEBEMAIL', 'nobody@example.org')}>"
)
PREFIX: Final = Path("/usr")
COPYRIGHT: Final = """\
/usr/lib/migrated also holds the following Python packages, each with its
texts in its .dist-info directory.  The texts of the Apache License 2.0, the
LGPL 2 and the GPL 2 are also in /usr/share/common-licenses: Apache-2.0,
LGPL-2, GPL-2.
"""


def own_suite() -> str:
    """Return the release of this machine."""
    return platform.freedesktop_os_release().get("VERSION_CODENAME", "")


def project_version() -> str:
    """Return the version of the sources."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def stage(suite: str, wheel: Path, tree: Path) -> None:
    """Install everything but the package's own files below ``tree``."""
    version, _ = SUITES[suite]
    made = Installation(tree, PREFIX, version)
    # Modules are compiled when the package is installed, as Debian does it.
    made.add_environment(wheel, PREFIX / "bin" / f"python{version}")
    made.add_units()
    made.add_configuration()
    made.add_documents()
    share = made.at(PREFIX / "share")
    for page in (share / "man").rglob("*.[1-8]"):
        _compress(page)
    # Debian's zsh looks for those of packages here.
    (share / "zsh" / "site-functions").rename(share / "zsh" / "vendor-completions")


def pack(suite: str, tree: Path, output: Path, revision: str) -> Path:
    """Build the package of a tree that `stage` has made."""
    python, release = SUITES[suite]
    version = f"{project_version()}-{revision}+deb{release}"
    architecture = _run("dpkg", "--print-architecture").strip()
    documents = tree / "usr" / "share" / "doc" / "migrated"
    _write_changelog(documents, version)
    _write_copyright(documents, python)
    overrides = tree / "usr" / "share" / "lintian" / "overrides" / "migrated"
    overrides.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(TEMPLATES / "lintian-overrides", overrides)
    control = tree / "DEBIAN"
    shutil.rmtree(control, ignore_errors=True)
    control.mkdir()
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    configuration = [path for path in files if path.is_relative_to(tree / CONFIGURATION.relative_to("/"))]
    major, minor = python.split(".")
    fill = {
        "VERSION": version,
        "ARCHITECTURE": architecture,
        "MAINTAINER": MAINTAINER,
        "INSTALLED_SIZE": str(sum(path.stat().st_size for path in files) // 1024),
        "PYTHON": python,
        "NEXT_PYTHON": f"{major}.{int(minor) + 1}",
        "SHARED_LIBRARIES": _shared_libraries([path for path in files if ".so" in path.suffixes]),
        "SERVICES": " ".join(units(".service")),
        "UNITS": " ".join(units(".service", ".socket")),
        "JOURNAL_VERSION": _journal_version(),
    }
    for name in ("control", *SCRIPTS):
        text = re.sub(r"@([A-Z_]+)@", lambda match: fill[match[1]], (TEMPLATES / name).read_text())
        (control / name).write_text(text)
        (control / name).chmod(0o755 if name in SCRIPTS else 0o644)
    (control / "conffiles").write_text("".join(f"/{path.relative_to(tree)}\n" for path in configuration))
    sums = (
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(tree)}\n"
        for path in files
        if path not in configuration
    )
    (control / "md5sums").write_text("".join(sums))
    output.mkdir(parents=True, exist_ok=True)
    package = output / f"migrated_{version}_{architecture}.deb"
    _run("dpkg-deb", "--root-owner-group", "-Zxz", "-z1", "--build", str(tree), str(package))
    return package


def units(*kinds: str) -> list[str]:
    """Return the units of these kinds; templates are not started under their own name.

    A slice is none of those that a script may name: guests run in it.
    """
    return [path.name for path in sorted((ROOT / "systemd").iterdir()) if path.suffix in kinds and "@" not in path.name]


def _journal_version() -> str:
    text = (ROOT / "migrated" / "recovery" / "journal.py").read_text()
    found = re.search(r"^VERSION(?:: Final)? = (\d+)$", text, re.MULTILINE)
    assert found is not None
    return found[1]


def _shared_libraries(files: list[Path]) -> str:
    """Return the dependencies on packages with shared libraries."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "debian").mkdir()
        (Path(scratch) / "debian" / "control").write_text("Source: migrated\n\nPackage: migrated\nArchitecture: any\n")
        options = ("-O", "--warnings=0", *(f"-e{path}" for path in files))
        said = subprocess.run(
            ["dpkg-shlibdeps", *options], cwd=scratch, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    return said.partition("shlibs:Depends=")[2].strip()


def _write_changelog(documents: Path, version: str) -> None:
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(seconds))
    log = documents / "changelog.Debian"
    log.write_text(
        f"migrated ({version}) stable; urgency=medium\n\n  * Built from the sources.\n\n -- {MAINTAINER}  {date}\n"
    )
    _compress(log)


def _write_copyright(documents: Path, python: str) -> None:
    """Write the licences: ours, and those of the environment's packages, whose texts are with them."""
    (documents / "LICENSE").unlink(missing_ok=True)
    theirs = "".join(f"  {one.name} {one.version}: {sbom.expression(one)}\n" for one in agents.distributions(python))
    (documents / "copyright").write_text(f"{(ROOT / 'LICENSE').read_text()}\n{COPYRIGHT}\n{theirs}")


def _compress(path: Path) -> None:
    with Path(f"{path}.gz").open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as compressed:
        compressed.write(path.read_bytes())
    path.unlink()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m package.deb")
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--suite", choices=SUITES, default=own_suite())
    parser.add_argument("--revision", nargs="+", default=["1"], help="of the package; several are built from one tree")
    arguments = parser.parse_args()
    os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="migrated-deb-") as scratch:
        tree = Path(scratch) / "migrated"
        tree.mkdir()
        stage(arguments.suite, arguments.wheel, tree)
        for revision in arguments.revision:
            print(pack(arguments.suite, tree, arguments.output, revision))


if __name__ == "__main__":
    main()
