"""The demo's processes run the installed code, whatever lies in the directory somebody starts it in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from migrated.demo.pair import AgentProcess, free_port, short_directory
from migrated.demo.process_guest import RunningProcess


async def test_an_agent_imports_nothing_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(tmp_path)
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(prefix="mg", dir=short_directory()) as directory:
        agent = AgentProcess("source", Path(directory), {"tls": {"insecure": True}, "http": {"status": ""}})
        try:
            await agent.start()
        finally:
            await agent.stop()


async def test_a_guest_imports_nothing_from_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile(tmp_path)
    monkeypatch.chdir(tmp_path)
    guest = RunningProcess(tmp_path, memory_bytes=1 << 20)
    process = await guest._launch(*guest._command(tmp_path / "tty"), "--help")
    try:
        assert await process.wait() == 0, guest.log_path.read_text()
    finally:
        await guest.stop()


def test_a_free_port_is_handed_out_once_and_not_by_the_kernel() -> None:
    """Else an agent sometimes found its port taken: by another agent's, or by a connection of anybody."""
    ports = [free_port() for _ in range(1000)]
    assert len(set(ports)) == len(ports)
    kernels_first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert max(ports) < max(kernels_first, 32768)


def hostile(directory: Path) -> None:
    for module in ("migrated", "struct", "msgspec", "mmap", "argparse"):
        (directory / f"{module}.py").write_text("raise SystemExit('this must not run')\n")
