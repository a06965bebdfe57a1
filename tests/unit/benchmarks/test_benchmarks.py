"""What the benchmarks count, and how they say it."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from benchmarks import stall, switchover, tls
from benchmarks.meter import Meter, cpu_times, memory_bytes
from benchmarks.report import Section, distribution, svg
from benchmarks.sample import Sample, medians, percentile
from benchmarks.settings import MIB, Settings
from migrated.errors import HostError

FINISHED = 3


def sample(system: str, total: float | None, **more: object) -> Sample:
    values = {"verified": True, "wire_bytes": 5 * MIB, "stall_seconds": 0.1, **more}
    return Sample(system=system, path="1g", load="sparse", memory_bytes=MIB, total_seconds=total, **values)  # type: ignore[arg-type]


def test_stalls_are_read_by_kind_of_memory_and_step() -> None:
    output = "a_guest_that_maps_goes_on, memfd\n  arm        longest mmap and munmap:    4.067 ms\nanything else\n"
    output += "a_guest_that_maps_goes_on, anonymous\n  scan       longest mmap and munmap:    1.035 ms\n"
    assert stall.parse(output) == [("memfd", "arm", 0.004067), ("anonymous", "scan", 0.001035)]


def test_medians_are_of_the_moves_that_ended_and_say_how_many_did() -> None:
    moves = [sample("migrated", float(n)) for n in range(1, 4)]
    moves.append(sample("migrated", None, outcome="no end in 30 s", verified=False))
    result = medians(moves)
    assert result["total_seconds"] == 2.0
    assert (result["runs"], result["ended"], result["verified"]) == (4, FINISHED, FINISHED)
    assert result["outcomes"] == ["no end in 30 s"]
    assert result["setup_seconds"] is None  # measured in none of them


@pytest.mark.parametrize(
    ("values", "share", "is_"),
    [
        ([], 0.5, None),
        ([None], 0.5, None),
        ([3.0], 0.01, 3.0),
        ([2.0, 1.0], 0.5, 1.0),
        ([2.0, None, 1.0, 3.0], 0.5, 2.0),
        ([float(n) for n in range(1, 201)], 0.99, 198.0),
        ([float(n) for n in range(1, 11)], 0.99, 10.0),
        ([float(n) for n in range(1, 11)], 1.0, 10.0),
    ],
)
def test_a_percentile_is_a_value_that_was_measured(values: list[float | None], share: float, is_: float | None) -> None:
    assert percentile(values, share) == is_


def switched(downtime: float, **more: object) -> Sample:
    return sample("migrated", None, downtime_seconds=downtime, **more)


def test_the_row_of_a_case_is_of_the_migrations_that_ended() -> None:
    moves = [switched(0.010 + n / 1000, details={"steps": {"stop": 0.001, "load": n / 1000}}) for n in range(3)]
    moves.append(sample("migrated", None, outcome="failed", verified=False))
    title, memory, count, *figures, verified = switchover.row("memfd", 256 * MIB, moves)
    assert (title, memory, count, verified) == ("memfd", "256 MiB", "3 of 4 ended", "3 of 3")
    by_column = dict(zip(("p50", "p99", "longest", *switchover.STEPS), figures, strict=True))
    assert (by_column["p50"], by_column["p99"], by_column["longest"]) == ("11.0", "12.0", "12.0")
    assert (by_column["stop"], by_column["load"], by_column["send"]) == ("1.0", "1.0", "-")


def test_larger_guests_and_those_that_boot_anew_migrate_fewer_times() -> None:
    assert switchover.CASES["4k"].count(200, 256 * MIB) == 200
    assert switchover.CASES["4k"].count(200, 4096 * MIB) == 13
    assert switchover.CASES["private"].count(200, 256 * MIB) == 50
    assert switchover.CASES["private"].count(1, 4096 * MIB) == 1


def test_every_long_migration_is_explained_by_its_own_steps() -> None:
    steps = {"stop": 0.001, "load": 0.0285, "run": 0.002}
    lines = switchover.explanations("memfd", [switched(0.025, details={"steps": steps}), switched(0.0315)])
    assert lines == []
    (line,) = switchover.explanations("memfd", [switched(0.012), switched(0.0315, details={"steps": steps})])
    assert line == "memfd, migration 2: 31.5 ms: load 28.5, run 2.0, stop 1.0."
    there = {"steps": steps, "target_steps": {"journal": 0.0005, "load": 0.028}}
    (line,) = switchover.explanations("memfd", [switched(0.0315, details=there)])
    assert line.endswith("stop 1.0; on the target: load 28.0, journal 0.5.")


def test_the_distribution_rises_to_the_longest_downtime() -> None:
    image = distribution({"memfd <4 KiB>": [0.012, 0.009, 0.010], "none": []})
    plot = ET.fromstring(image)
    (line,) = (path.get("d") or "" for path in plot.findall(".//{*}path") if path.get("fill") == "none")
    reached = [float(y) for y in re.findall(r"V([0-9.]+)", line)]
    assert reached == sorted(reached, reverse=True)
    assert len(reached) == 3
    assert reached[-1] == 20.0  # the top: all of them
    assert "memfd &lt;4 KiB&gt;, 3 migrations" in image
    assert ET.fromstring(distribution({})).tag.endswith("svg")


def test_pace_is_the_guests_operations_during_pre_copy_against_before() -> None:
    assert sample("migrated", 1.0, operations_before=200.0, operations_during=150.0).pace == 0.75
    assert sample("migrated", 1.0, operations_before=200.0).pace is None


def test_a_table_keeps_its_columns_below_each_other() -> None:
    section = Section("x", "Title", ("path", "total"), [("loopback", "1 s"), ("1g", "12 s")], ["a note"])
    lines = section.markdown().splitlines()
    assert lines[0] == "### Title"
    assert len({len(line) for line in lines[2:6]}) == 1
    assert lines[-1] == "- a note"


def test_the_plot_is_an_image_even_of_a_system_that_never_ended() -> None:
    rows: list[dict[str, Any]] = [
        {
            "memory": "memfd",
            "path": "1g",
            "load": "dense",
            "system": "migrated",
            "total_seconds": 9.0,
            "stall_seconds": 0.1,
            "wire_bytes": 9,
        },
        {
            "memory": "memfd",
            "path": "1g",
            "load": "dense",
            "system": "qemu-precopy",
            "total_seconds": None,
            "stall_seconds": None,
            "wire_bytes": None,
        },
    ]
    image = svg(rows)
    assert ET.fromstring(image).tag.endswith("svg")
    assert "no end" in image


def test_results_are_on_disk_after_every_section(tmp_path: Path) -> None:
    settings = Settings(
        quick=True,
        runs=1,
        slow_runs=1,
        memory_bytes=MIB,
        paths=(),
        loads=(),
        memories=(),
        limit_seconds=1,
        large_bytes=MIB,
        migrations=1,
        cases=(),
        switchover_bytes=(),
        output=tmp_path,
        host={},
    )
    settings.save(Section("one", "One", ("a",), [("1",)]))
    settings.save(Section("two", "Two", ("b",), [("2",)]))
    assert list(json.loads((tmp_path / "results.json").read_text())["sections"]) == ["one", "two"]
    assert "### Two" in (tmp_path / "results.md").read_text()


async def test_the_meter_counts_what_a_process_uses_while_it_is_watched() -> None:
    meter = Meter()
    before = memory_bytes(os.getpid())
    meter.watch(os.getpid())
    async with meter:
        held = bytearray(os.urandom(1 << 16) * 512)
        while meter.cpu_seconds < 0.02:  # until it has counted some
            sum(held[:100_000])
            meter.sample()
    assert meter.peak_memory_bytes >= len(held) // 2
    assert memory_bytes(os.getpid()) > before
    assert cpu_times(os.getpid()).guest == 0


def test_a_process_that_has_ended_is_said_to_have() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(ProcessLookupError):  # a zombie still has a total, with its guest's part in it
            cpu_times(pid)
    finally:
        os.waitpid(pid, 0)


def test_the_speed_of_openssl_is_read() -> None:
    assert tls.parse("+H:16384\n+F:25:AES-128-GCM:4223877120.00\n") == 4223877120.0
    with pytest.raises(HostError, match="openssl speed: ''"):
        tls.parse("")
