"""Journal entries to write."""

from __future__ import annotations

from migrated.protocol.messages import PROTOCOL_VERSION, Hello, RegionInfo
from migrated.recovery.journal import SourceEntry, TargetEntry

HELLO = Hello(
    version=PROTOCOL_VERSION,
    session=bytes(range(16)),
    token=bytes(range(100, 132)),
    guest="vm1",
    driver="qemu",
    mode="hybrid",
    streams=2,
    block_secret=bytes(4104),
    regions=(RegionInfo("ram", 1 << 30, 1 << 21), RegionInfo("more", 1 << 21, 4096)),
    agent="a test",
)
TARGET = TargetEntry(
    hello=HELLO,
    stage="loaded",
    peer="host-a:4711",
    page_bytes=(1 << 21, 4096),
    guest={"socket": "/run/x", "number": 3, "flag": True},
    pid=4711,
    pid_started=99,
    started_at=12.5,
)
SOURCE = SourceEntry(
    hello=HELLO, stage="active", target="host-b:7440", file_offsets=(0, 4096), pid=1, pid_started=2, max_bandwidth=5
)
