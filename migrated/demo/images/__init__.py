"""Build our own guests where they are needed: a Linux guest and a boot-sector guest that check their own memory.

`build_linux_guest` downloads Debian's kernel as a package, without installing it, and makes an initramfs whose init is
linux_init.c.  `build_bootsector` assembles boot_entry.S and boot_load.c into a disk image that needs no operating
system. Both run the load of selfcheck.h and write to their first serial port, which `migrated.demo.console` reads.

The caller chooses the directory in which results are cached.  Their names contain a digest of everything they are made
of.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import struct
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from migrated.errors import HostError

SOURCES = Path(__file__).parent
KERNEL_PACKAGE = "linux-image-cloud-amd64"
#: What a virtio disk and a balloon need.
MODULES = (
    *("virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci"),
    *("virtio_blk", "virtio_balloon"),
)
PATTERNS = ("sparse", "hot", "dense", "idle")
BLOCK_BYTES = 4096
BUILD_SECONDS = 120
DOWNLOAD_SECONDS = 600

_BOOT_PARAMETERS = struct.Struct("<8sQQQII")
_BOOT_MAGIC = b"MGDLOAD1"


@dataclasses.dataclass(frozen=True, slots=True)
class LinuxImage:
    """The files for QEMU's ``-kernel`` and ``-initrd``."""

    kernel: Path
    initrd: Path

    def arguments(self, **load: str | int) -> list[str]:
        """Return QEMU arguments; ``load``: size, rate, pattern, sweep, disk, churn, as linux_init.c documents them."""
        words = ["console=ttyS0", "quiet", "panic=-1", *(f"load_{key}={value}" for key, value in load.items())]
        if "churn" in load:
            words.append("init_on_free=1")
        return ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", " ".join(words)]


def build_linux_guest(cache_dir: Path | str) -> LinuxImage:
    """Build kernel and initramfs of the Linux guest.

    Raises HostError if the package is unavailable (no apt, no package lists) or the compiler is missing.
    """
    cache = _directory(cache_dir)
    kernel, modules = _debian_kernel(cache)
    digest = _digest(SOURCES / "linux_init.c", SOURCES / "selfcheck.h", *modules)
    initrd = cache / f"initrd-{digest}.gz"
    if not initrd.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            init = Path(scratch) / "init"
            _compile("-O2", "-static", "-pthread", "-o", str(init), str(SOURCES / "linux_init.c"))
            files = {"init": (0o755, init.read_bytes())}
            files.update((f"modules/{path.stem}.ko", (0o644, path.read_bytes())) for path in modules)
            _write_whole(initrd, gzip.compress(_cpio(files), compresslevel=1))
    return LinuxImage(kernel, initrd)


def build_bootsector(
    cache_dir: Path | str,
    *,
    size_bytes: int = 0,
    rate: int = 0,
    pattern: str = "sparse",
    sweep_seconds: int = 10,
) -> Path:
    """Build a raw disk image (``-drive format=raw,file=…,if=ide``) whose guest loads all its memory above 1 MiB.

    ``size_bytes`` limits how much of it (0: all), ``rate`` the blocks written per second (0: as fast as it can),
    ``sweep_seconds`` is the duration of a background sweep (0: none).  Raises HostError if the compiler is missing.
    """
    cache = _directory(cache_dir)
    sources = [SOURCES / name for name in ("boot_entry.S", "boot_load.c", "selfcheck.h", "boot.ld")]
    parameters = _BOOT_PARAMETERS.pack(_BOOT_MAGIC, size_bytes, rate, sweep_seconds, PATTERNS.index(pattern), 0)
    path = cache / f"boot-{_digest(*sources, extra=parameters)}.img"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            elf, raw = Path(scratch) / "boot.elf", Path(scratch) / "boot.raw"
            flags = "-m64 -O2 -ffreestanding -nostdlib -static -no-pie -fno-pic -fno-stack-protector -mno-red-zone "
            flags += "-mgeneral-regs-only -fcf-protection=none -fno-asynchronous-unwind-tables "
            flags += "-fno-tree-loop-distribute-patterns --param=min-pagesize=0 -Wl,--build-id=none -Wl,-z,noexecstack -Wl,--no-warn-rwx-segments"
            link = ["-T", str(SOURCES / "boot.ld"), "-o", str(elf)]
            _compile(*flags.split(), *link, *(str(path) for path in sources[:2]))
            _run(["objcopy", "-O", "binary", str(elf), str(raw)], BUILD_SECONDS)
            image = bytearray(raw.read_bytes())
            _BOOT_PARAMETERS.pack_into(image, image.index(_BOOT_MAGIC), *_BOOT_PARAMETERS.unpack(parameters))
            image.extend(bytes(1 << 20))  # a disk smaller than a cylinder confuses the firmware
            _write_whole(path, bytes(image[: (len(image) // 512) * 512]))
    return path


def build_disk(path: Path | str, size_bytes: int) -> Path:
    """Make a disk whose 4 KiB blocks are functions of their numbers, as the Linux guest's ``load_disk`` expects."""
    path = Path(path)
    mask = (1 << 64) - 1
    step = 0xA0761D6478BD642F
    steps = [(step * i) & mask for i in range(1, BLOCK_BYTES // 8 - 2)]
    with path.open("wb") as file:
        for index in range(size_bytes // BLOCK_BYTES):
            counter = ~index & mask
            seed = ((index + 1) * 0x9E3779B97F4A7C15 & mask) ^ ((counter + 1) * 0xD6E8FEB86659FD93 & mask)
            seed = (seed ^ seed >> 29) | 1
            file.write(struct.pack("<512Q", index, counter, index, *((seed + s) & mask for s in steps)))
    return path


def _directory(path: Path | str) -> Path:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _digest(*paths: Path, extra: bytes = b"") -> str:
    sha = hashlib.sha256(extra)
    for path in (Path(__file__), *paths):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def _write_whole(path: Path, data: bytes) -> None:
    """Write beside the path and rename: the cache never holds half a file, even with several builders."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).chmod(0o644)
    os.replace(file.name, path)  # noqa: PTH105 - the two names are strings already


def _run(command: list[str], limit_seconds: float, cwd: Path | None = None) -> str:
    """Run a build command; return its output, or raise HostError with the end of its output."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=limit_seconds, cwd=cwd)
    except FileNotFoundError:
        message = f"{command[0]} is not installed"
        raise HostError(
            message, code="tool-missing", hint=f"install the Debian package that holds {command[0]}"
        ) from None
    except subprocess.TimeoutExpired:
        message = f"{' '.join(command[:3])} did not finish within {limit_seconds:g} s"
        raise HostError(message, code="tool-failed") from None
    if done.returncode:
        message = f"{' '.join(command[:3])} failed: {(done.stderr or done.stdout).strip()[-2000:]}"
        raise HostError(message, code="tool-failed")
    return done.stdout


def _compile(*arguments: str) -> None:
    if shutil.which("gcc") is None:
        message = "gcc is not installed: the test guests are compiled here"
        raise HostError(message, code="tool-missing", hint="apt-get install gcc libc6-dev")
    _run(["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-I", str(SOURCES), *arguments], BUILD_SECONDS)


def _debian_kernel(cache: Path) -> tuple[Path, list[Path]]:
    """Return the newest cached kernel and its modules; apt fetches them if the cache has none."""
    wanted_modules = f"uncompressed {' '.join(MODULES)}"
    suffix = f"+{hashlib.sha256(wanted_modules.encode()).hexdigest()[:8]}"  # which modules were extracted, and how
    for directory in sorted(cache.glob(f"linux-*{suffix}"), reverse=True):
        if (directory / "complete").exists():
            return directory / "vmlinuz", _module_paths(directory)
    package = _kernel_package()
    with tempfile.TemporaryDirectory(dir=cache) as name:
        scratch = Path(name)
        # apt's unprivileged downloader may not write into our directory; as root it reports that and continues by
        # itself.
        _run(["apt-get", "-q", "download", package], DOWNLOAD_SECONDS, cwd=scratch)
        (archive,) = scratch.glob("*.deb")
        wanted = scratch / "wanted"
        wanted.mkdir()
        _extract(archive, wanted)
        if not (wanted / "vmlinuz").exists():
            message = f"{archive.name} holds no kernel"
            raise HostError(message, code="guest-kernel")
        (wanted / "complete").touch()
        directory = cache / f"linux-{package.removeprefix('linux-image-')}{suffix}"
        try:
            wanted.rename(directory)
        except OSError:
            if not (directory / "complete").exists():  # else another process was faster
                raise
    return directory / "vmlinuz", _module_paths(directory)


def _module_paths(directory: Path) -> list[Path]:
    return [path for name in MODULES if (path := directory / f"{name}.ko").exists()]


def _kernel_package() -> str:
    """Return the package that the meta package currently depends on."""
    hint = "apt-get update (the package lists are not here), or put vmlinuz into the cache"
    for line in _run(["apt-cache", "depends", KERNEL_PACKAGE], BUILD_SECONDS).splitlines():
        words = line.split()
        if len(words) == 2 and words[0] == "Depends:" and words[1].startswith("linux-image-"):
            return words[1]
    message = f"apt knows no package {KERNEL_PACKAGE}"
    raise HostError(message, code="guest-kernel", hint=hint)


def _extract(archive: Path, into: Path) -> None:
    """Extract only the kernel and a few modules from a package of a hundred megabytes.

    Debian compresses modules since release 13.  Some modules of one release are built into the kernel of another.
    """
    modules = {f"{name}.ko" for name in MODULES}
    built_in: set[str] = set()
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as tar,
    ):
        for member in tar:
            name = Path(member.name).name.removesuffix(".xz")
            is_kernel, is_list = name.startswith("vmlinuz-"), name == "modules.builtin"
            if not member.isfile() or not (is_kernel or is_list or name in modules):
                continue
            file = tar.extractfile(member)
            if file is None:
                continue
            content = lzma.decompress(file.read()) if member.name.endswith(".xz") else file.read()
            if is_list:
                built_in = {Path(line).name for line in content.decode().splitlines()}
            else:
                (into / ("vmlinuz" if is_kernel else name)).write_bytes(content)
    if missing := sorted(name for name in modules - built_in if not (into / name).exists()):
        message = f"{archive.name} holds no {', '.join(missing)}"
        raise HostError(message, code="guest-kernel")


def _cpio(files: Mapping[str, tuple[int, bytes]]) -> bytes:
    """Return an initramfs in the "newc" format: files (name → mode, contents), their directories, /dev/console."""
    out = bytearray()
    directories = sorted({str(parent) for name in files for parent in Path(name).parents if str(parent) != "."})
    for name in ("dev", *directories):
        out += _cpio_entry(name, stat.S_IFDIR | 0o755)
    out += _cpio_entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for name, (mode, data) in files.items():
        out += _cpio_entry(name, stat.S_IFREG | mode, data)
    out += _cpio_entry("TRAILER!!!", 0)
    return bytes(out)


def _cpio_entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    encoded = name.encode() + b"\0"
    #         inode mode uid gid links mtime size      device   node device  name          checksum
    fields: Iterable[int] = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)
