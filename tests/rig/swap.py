"""Swap space in compressed memory (zram) for the duration of a test."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.rig import supervisor

_CONTROL = Path("/sys/class/zram-control")


class SwapUnavailableError(Exception):
    """There is no zram; the message says why."""


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SwapUnavailableError(f"{command[0]}: {getattr(error, 'stderr', '') or error}") from error


def _remove(number: int) -> None:
    subprocess.run(["swapoff", f"/dev/zram{number}"], check=False, capture_output=True)
    with contextlib.suppress(OSError):
        (_CONTROL / "hot_remove").write_text(str(number))


@contextlib.contextmanager
def zram(size_bytes: int) -> Iterator[None]:
    """Enable swap on a new zram device.  Raises SwapUnavailableError with the reason if that fails."""
    try:
        number = int((_CONTROL / "hot_add").read_text())
    except OSError as error:
        raise SwapUnavailableError(f"cannot create a zram device: {error}") from error
    with supervisor.undoing(sys.executable, "-m", __name__, str(number)):
        try:
            device = Path(f"/dev/zram{number}")
            if not device.is_block_device():
                raise SwapUnavailableError(f"{device} does not exist")
            Path(f"/sys/block/zram{number}/disksize").write_text(str(size_bytes))
            _run("mkswap", str(device))
            _run("swapon", "-p", "100", str(device))  # highest priority: used before any other swap
            yield
        finally:
            _remove(number)


if __name__ == "__main__":  # run by the supervisor after a test run was killed
    _remove(int(sys.argv[1]))
