"""Which limit of [timeouts] each wait for a guest has.  What a flow waits for is in tests/simulation/test_timeouts.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrated.errors import TimeoutExceededError
from migrated.guests.process.config import ProcessTargetConfig
from migrated.guests.process.source import ProcessSource
from migrated.guests.process.target import ProcessTarget
from migrated.guests.qemu.config import QemuSourceConfig, QemuTargetConfig
from migrated.guests.qemu.source import QemuSource
from migrated.guests.qemu.target import QemuTarget
from migrated.settings import Timeouts

#: Each another, so that a limit says which one it is.
TIMEOUTS = Timeouts(guest_start=101, guest_command=102, guest_pause=103, guest_state=104, abort=105, release=106)


class Heard:
    """Stands in for a guest's process, connection or monitor: notes the limit of everything that is asked of it."""

    pid = 1
    alive = True

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}
        self.running = True

    def poll(self) -> str | None:
        return None

    def close(self) -> None: ...

    # ---- a process

    async def wait(self, limit: float) -> str:
        self.limits["wait"] = limit
        raise TimeoutExceededError("it has not ended")

    async def kill(self, limit: float) -> None:
        self.limits["kill"] = limit

    # ---- a connection of a co-operative guest

    async def ask(self, kind: Any, _: bytes = b"", *, limit_seconds: float, what: str) -> tuple[bytes, tuple[int, ...]]:
        del what
        self.limits[kind.name] = limit_seconds
        return b"", ()

    async def request(self, kind: Any, payload: bytes = b"", **named: Any) -> tuple[bytes, tuple[int, ...]]:
        return await self.ask(kind, payload, **named)

    async def send(self, *_: Any) -> None: ...

    # ---- a monitor

    keeps_order = True

    async def execute(self, command: str, arguments: Any = None, *, limit: float | None = None) -> Any:
        del arguments
        self.limits[command] = TIMEOUTS.guest_command if limit is None else limit
        self.running = {"stop": False, "cont": True}.get(command, self.running)
        return []

    async def status(self) -> str:
        return "running" if self.running else "paused"

    async def wait_status(self, _: Any, *, limit: float) -> str:
        self.limits["status"] = limit
        return await self.status()

    async def wait_loaded(self, *, limit: float) -> str:
        self.limits["loaded"] = limit
        return "paused"

    async def remove_fds(self) -> None: ...

    def forget_events(self) -> None: ...

    def saw(self, _: str) -> bool:
        return False

    # ---- a file with the device state

    async def save(self, limit: float) -> bytes:
        self.limits["save"] = limit
        return b""

    # ---- a channel

    async def read(self) -> bytes:
        return b""

    async def write(self, _: bytes) -> None: ...

    async def close_write(self) -> None: ...


@pytest.fixture
def heard() -> Heard:
    return Heard()


async def test_a_cooperative_guest_at_the_source(heard: Heard) -> None:
    class Hub:
        name = "vm1"
        timeouts = TIMEOUTS

        async def wait_connected(self, limit: float, **_: Any) -> Heard:
            heard.limits["connected"] = limit
            return heard

    guest: Any = ProcessSource("vm1", Hub())  # type: ignore[arg-type]
    guest._timeouts, guest._guest, guest._process = TIMEOUTS, heard, heard
    await guest.quiesce()
    await guest.unquiesce()
    await guest.pause(heard)
    await guest.send_state(heard)
    await guest.resume()
    assert heard.limits == {"PAUSE": TIMEOUTS.guest_pause, "STATE": TIMEOUTS.guest_state, "RUN": TIMEOUTS.guest_command}
    heard.limits.clear()
    await guest.reclaim({})
    command = TIMEOUTS.guest_command
    assert heard.limits == {"connected": TIMEOUTS.guest_start, "FORGET": command, "RUN": command}
    heard.limits.clear()
    await guest.release()
    assert heard.limits == {
        "connected": TIMEOUTS.guest_command,
        "END": TIMEOUTS.guest_command,
        "wait": TIMEOUTS.release,
        "kill": TIMEOUTS.release,
    }


async def test_a_cooperative_guest_at_the_target(heard: Heard, tmp_path: Path) -> None:
    guest: Any = ProcessTarget("vm1", ProcessTargetConfig(command=["true"]), tmp_path, TIMEOUTS)
    guest._process = guest._connection = heard
    await guest.load_state(heard)
    await guest.resume()
    await guest.release()
    await guest.kill()
    command = TIMEOUTS.guest_command
    assert heard.limits == {
        "RESTORE": TIMEOUTS.guest_state,
        "RUN": command,
        "FORGET": command,
        "kill": TIMEOUTS.abort,
    }


async def test_qemu_at_the_source(heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def opened(_: Any) -> Heard:
        return heard

    async def nothing(*_: Any) -> Any:
        return []

    monkeypatch.setattr("migrated.guests.qemu.source.StateFile.open", opened)
    monkeypatch.setattr("migrated.guests.qemu.source.qemu_memory.ram_blocks", nothing)
    guest: Any = QemuSource("vm1", QemuSourceConfig(qmp="/nowhere"), TIMEOUTS)
    guest.qemu._monitor = guest.qemu._handle = heard
    await guest.quiesce()
    assert heard.limits == {"stop": TIMEOUTS.guest_pause}
    await guest.unquiesce()
    heard.limits.clear()
    await guest.pause(heard)
    assert heard.limits.pop("query-stats") == TIMEOUTS.guest_command
    both = TIMEOUTS.guest_pause + TIMEOUTS.guest_state  # the two commands are given together
    assert heard.limits == {"stop": TIMEOUTS.guest_pause, "save": both}
    heard.limits.clear()
    await guest.resume()
    assert heard.limits == {"cont": TIMEOUTS.guest_pause, "status": TIMEOUTS.guest_pause}
    heard.limits.clear()
    await guest.release()
    assert heard.limits == {"quit": TIMEOUTS.guest_command, "wait": TIMEOUTS.release, "kill": TIMEOUTS.release}


async def test_qemu_at_the_target(heard: Heard, tmp_path: Path) -> None:
    guest: Any = QemuTarget("vm1", QemuTargetConfig(command=["qemu"]), tmp_path, TIMEOUTS)
    guest.qemu._monitor = guest.qemu._handle = heard
    await guest._loaded(heard)
    assert heard.limits == {"loaded": TIMEOUTS.guest_state}
    heard.running, guest.runs = True, True
    await guest.resume()
    await guest.kill()
    command = TIMEOUTS.guest_command
    assert heard.limits == {
        "loaded": TIMEOUTS.guest_state,
        "cont": command,
        "status": command,
        "kill": TIMEOUTS.abort,
    }
