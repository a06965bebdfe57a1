"""What a guest writes never fills the disk, and the end of it is at hand when something fails."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from migrated import config
from migrated.guests import guest_log
from migrated.guests.access.pidfd import PidHandle
from migrated.guests.registry import GuestRegistry
from migrated.waiting import within

PATIENCE_SECONDS = 20.0


def test_the_end_of_a_long_log_is_read_without_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "vm1.log"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: reading all of it would not end
        file.seek(0, os.SEEK_END)
        file.write(b"\nthe last line\n")
    assert guest_log.tail(path, 14) == "the last line"
    assert guest_log.tail(tmp_path / "none.log") == ""


def test_a_log_is_cut_to_whole_lines_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "vm1.log"
    lines = [f"line {number:05}\n".encode() for number in range(1000)]
    path.write_bytes(b"".join(lines))
    assert not guest_log.cut(path, limit_bytes=len(lines) * len(lines[0]), kept_bytes=1000)
    assert guest_log.cut(path, limit_bytes=5000, kept_bytes=1000)
    first, *rest = path.read_bytes().splitlines(keepends=True)
    assert b"cut" in first
    assert rest
    assert rest == lines[-len(rest) :]


def test_only_files_are_cut(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(5000))
    (tmp_path / "vm1.log").symlink_to(tmp_path / "big")
    with pytest.raises(OSError, match=r"symbolic links"):
        guest_log.cut(tmp_path / "vm1.log", limit_bytes=10, kept_bytes=5)
    os.mkfifo(tmp_path / "vm2.log")
    assert not guest_log.cut(tmp_path / "vm2.log", limit_bytes=0, kept_bytes=0)


async def test_a_guest_that_never_stops_writing_fills_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_log, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(guest_log, "MAX_BYTES", 20_000)
    monkeypatch.setattr(guest_log, "KEPT_BYTES", 1000)
    settings = config.decode({"agent": {"state_dir": str(tmp_path)}, "tls": {"insecure": True}}, "target")
    path = tmp_path / "guests" / "vm1" / "vm1.log"
    path.parent.mkdir(parents=True)
    process = PidHandle.spawn(
        ["sh", "-c", "while :; do echo a warning the guest can cause; done"], pass_fds=(), log=path
    )
    cuts = 0
    try:
        async with GuestRegistry(settings), within(PATIENCE_SECONDS, "the log to be cut three times"):
            before = 0
            while cuts < 3:
                with contextlib.suppress(FileNotFoundError):
                    now = path.stat().st_size
                    cuts += now < before
                    before = now
                await asyncio.sleep(0)
    finally:
        process.signal(signal.SIGKILL)
        process.close()
    assert cuts == 3


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            "qemu-system-x86_64: -object secret,id=disk,data=letmein,format=raw: Property 'secret.id' twice",
            "qemu-system-x86_64: -object secret,id=disk,data=(secret),format=raw: Property 'secret.id' twice",
        ),
        (
            """-object {"qom-type": "secret", "data": "letmein"}: no""",
            """-object {"qom-type": "secret", "data": "(secret)"}: no""",
        ),
        ("password=letmein", "password=(secret)"),
        ("load of migration failed: Invalid argument", "load of migration failed: Invalid argument"),
    ],
)
def test_an_error_message_quotes_no_secret(tmp_path: Path, said: str, shown: str) -> None:
    path = tmp_path / "qemu.log"
    path.write_text(said)
    assert guest_log.tail(path) == shown
