"""The Linux guest's kernel and modules, out of a Debian package as each release lays it out."""

from __future__ import annotations

import lzma
import subprocess
from pathlib import Path

import pytest

from migrated.demo.images import MODULES, _extract
from migrated.errors import HostError

CONTROL = "Package: linux\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: none\n"


def package(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in {**files, "DEBIAN/control": CONTROL.encode()}.items():
        path = directory / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (directory / "tree" / "DEBIAN").chmod(0o755)  # else dpkg-deb refuses it, whatever the umask
    path = directory / "linux.deb"
    subprocess.run(["dpkg-deb", "--build", "-Znone", directory / "tree", path], check=True, stdout=subprocess.DEVNULL)
    return path


def kernel(*, compressed: bool, built_in: tuple[str, ...] = ()) -> dict[str, bytes]:
    """The files of a package that has all we want, some of it in the kernel itself."""
    names = [name for name in MODULES if name not in built_in]
    modules = {
        f"lib/modules/1/kernel/{name}.ko{'.xz' * compressed}": lzma.compress(name.encode())
        if compressed
        else name.encode()
        for name in names
    }
    lines = "".join(f"kernel/drivers/{name}.ko\n" for name in built_in)
    return {"boot/vmlinuz-1": b"kernel", "lib/modules/1/modules.builtin": lines.encode(), **modules}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
def test_modules_are_extracted_ready_to_be_loaded(tmp_path: Path, compressed: bool) -> None:
    into = tmp_path / "into"
    into.mkdir()
    _extract(package(tmp_path, kernel(compressed=compressed, built_in=MODULES[:2])), into)
    assert {path.name: path.read_bytes() for path in into.iterdir()} == {
        "vmlinuz": b"kernel",
        **{f"{name}.ko": name.encode() for name in MODULES[2:]},
    }


def test_a_module_that_is_nowhere_is_named(tmp_path: Path) -> None:
    files = kernel(compressed=True)
    del files["lib/modules/1/kernel/virtio_blk.ko.xz"]
    with pytest.raises(HostError, match=r"linux\.deb holds no virtio_blk\.ko"):
        _extract(package(tmp_path, files), tmp_path)
