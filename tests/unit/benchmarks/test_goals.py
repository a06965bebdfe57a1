"""The table of goals says what was measured, and whether that is enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import goals
from benchmarks.goals import GIB, MIB, TIB


def result(data: dict[str, list[dict[str, Any]]], figure: str) -> tuple[str, str]:
    """What the row of this figure says: measured, and the result."""
    (row,) = [row for row in goals.table(data).rows if row[0] == figure]
    return row[2], row[3]


def sample(downtime: float | None = 0.009, **more: Any) -> dict[str, Any]:
    outcome = "completed" if downtime is not None else "no end in 60 s"
    return {"outcome": outcome, "verified": downtime is not None, "downtime_seconds": downtime, "details": {}, **more}


def compared(system: str, stall: float | None, **more: Any) -> dict[str, Any]:
    ended = 3 if stall is not None else 0
    row = {
        "memory": "memfd",
        "path": "10g",
        "load": "sparse",
        "system": system,
        "runs": 3,
        "ended": ended,
        "verified": ended,
    }
    figures = {"stall_seconds": stall, "total_seconds": stall, "downtime_seconds": stall, "cpu_seconds": 0.3}
    return {**row, **figures, "samples": [{"memory_bytes": 512 * MIB}], **more}


def test_without_results_nothing_is_measured() -> None:
    rows = goals.table({}).rows
    assert {row[3] for row in rows} == {"not measured"}
    assert {row[2] for row in rows} == {"-"}
    assert len({row[0] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("downtimes", "says", "result_"),
    [
        ([0.009] * 199 + [0.030], "p50 9.0 ms, p99 9.0 ms, longest 30.0 ms of 200", "reached"),
        ([0.009] * 190 + [0.030] * 10, "p50 9.0 ms, p99 30.0 ms, longest 30.0 ms of 200", "**missed**"),
        ([0.011] * 200, "p50 11.0 ms, p99 11.0 ms, longest 11.0 ms of 200", "**missed**"),
        ([0.009, None], "1 of 2 migrations failed", "**missed**"),
    ],
)
def test_the_downtime_of_many_migrations(downtimes: list[float | None], says: str, result_: str) -> None:
    data = {"switchover": [{"case": "4k", "size": 256 * MIB, "samples": [sample(one) for one in downtimes]}]}
    assert result(data, "downtime, memfd 4 KiB, 256 MiB") == (says, result_)
    assert result(data, "downtime, memfd 2 MiB, 256 MiB") == ("-", "not measured")


def test_larger_guests_have_rows_of_their_own_where_they_were_measured() -> None:
    data = {"switchover": [{"case": "2m", "size": size, "samples": [sample()]} for size in (256 * MIB, 4 * GIB)]}
    names = [row[0] for row in goals.table(data).rows]
    assert "downtime, memfd 2 MiB, 4 GiB" in names
    assert "downtime, memfd 4 KiB, 4 GiB" not in names


def test_a_migration_whose_memory_was_not_verified_reaches_nothing() -> None:
    data = {"downtime": [{"size": GIB, "samples": [sample(), sample(verified=False)]}]}
    says = "1 GiB: 1 of 2 migrations failed"
    assert result(data, "downtime, memfd 2 MiB, larger guests") == (says, "**missed**")


@pytest.mark.parametrize(
    ("ours", "theirs", "says", "result_"),
    [
        (0.012, 0.040, "sparse 12.0 ms (QEMU 40.0 ms)", "reached"),
        (0.012, 0.010, "sparse 12.0 ms (QEMU 10.0 ms)", "**missed**"),
        (0.021, 0.040, "sparse 21.0 ms (QEMU 40.0 ms)", "**missed**"),
        (0.012, None, "sparse 12.0 ms (QEMU no end)", "reached"),
        (None, 0.040, "sparse 3 of 3 migrations failed", "**missed**"),
    ],
)
def test_the_longest_stall_has_a_limit_and_a_rival(
    ours: float | None, theirs: float | None, says: str, result_: str
) -> None:
    data = {"comparison": [compared("migrated", ours), compared("qemu-postcopy", theirs)]}
    assert result(data, "longest stall, 10 Gbit/s, memfd 2 MiB") == (says, result_)


def test_a_missing_rival_is_not_a_beaten_one() -> None:
    data = {"comparison": [compared("migrated", 0.012)]}
    assert result(data, "longest stall, 10 Gbit/s, memfd 2 MiB") == ("sparse 12.0 ms", "not measured")
    slow = {"comparison": [compared("migrated", 0.045, path="1g", load="hot")]}
    assert result(slow, "longest stall, 1 Gbit/s, memfd 2 MiB") == ("hot 45.0 ms", "reached")


def test_sparse_writes_are_compared_in_three_figures() -> None:
    theirs = compared("qemu-precopy", 0.66, downtime_seconds=0.0095, stall_seconds=0.011)
    ours = compared("migrated", 0.65, downtime_seconds=0.0096, stall_seconds=0.010)
    says, result_ = result({"comparison": [ours, theirs]}, "sparse writes, 10 Gbit/s, memfd 2 MiB")
    assert says == "total 0.65 s (QEMU 0.66 s); downtime 9.6 ms (QEMU 9.5 ms); stall 10.0 ms (QEMU 11.0 ms)"
    assert result_ == "**missed**"


def test_processor_time_is_per_gibibyte_of_the_guest() -> None:
    data = {"comparison": [compared("migrated", 0.1, cpu_seconds=0.36), compared("qemu-precopy", 0.1)]}
    figure = "processor time per GiB, both sides, 10 Gbit/s, memfd 2 MiB"
    assert result(data, figure) == ("sparse 1.20 (0.72 s, QEMU 0.60)", "reached")
    data["comparison"][0]["cpu_seconds"] = 0.37
    assert result(data, figure)[1] == "**missed**"


def test_throughput_is_compared_with_iperf3_and_with_multifd() -> None:
    row = {
        "path": "loopback",
        "streams": 2,
        "ratio": [0.9],
        "migrated": [2e9],
        "qemu": [2.1e9],
        "verified": 1,
        "runs": 1,
    }
    figure = "throughput beside a spinning guest, loopback, 2 streams"
    assert result({"throughput": [row]}, figure) == ("0.90 of iperf3; 2.00 GB/s (QEMU 2.10)", "**missed**")
    assert result({"throughput": [{**row, "qemu": [1.9e9]}]}, figure)[1] == "reached"


def test_two_streams_are_never_slower_than_one() -> None:
    def runs(present: float, absent: float) -> list[dict[str, Any]]:
        return [{"populated": kind, "bytes_per_second": rate} for kind, rate in ((True, present), (False, absent))]

    data = {"engines": [{"streams": 1, "results": runs(3e9, 4e9)}, {"streams": 2, "results": runs(4.5e9, 3.9e9)}]}
    figure = "two streams / one stream, engines alone"
    assert result(data, figure) == ("1.50 (pages present); 0.97 (pages absent)", "**missed**")


def test_absent_memory_the_agent_and_a_guest_that_has_none() -> None:
    def rows(downtime: float) -> dict[str, list[dict[str, Any]]]:
        one = {"downtime": downtime, "source_bytes": 7 * MIB, "verified": True}
        used = {"within": 2 * GIB, "results": [{**one, "downtime": 0.01}]}
        return {"sparse": [used, {"within": TIB, "results": [one]}]}

    figure = "downtime, 1 TiB of which 2 GiB are in use"
    assert result(rows(0.039), figure) == ("without absent memory 10.0 ms; 39.0 ms", "reached")
    assert result(rows(0.041), figure)[1] == "**missed**"
    assert result(rows(0.041), "memory of the source's agent / guest") == ("0.34% of 2 GiB", "**missed**")


def test_pre_copy_ends_where_qemus_does() -> None:
    def row(system: str, within: int) -> dict[str, Any]:
        return {"limit_ms": 50, "system": system, "within": within, "runs": 3}

    figure = "mode precopy, sparse writes"
    data = {"converge": [row("migrated", 2), row("qemu-precopy", 3)]}
    assert result(data, figure) == ("limit 50 ms: 2 of 3 (QEMU 3 of 3)", "**missed**")
    assert result({"converge": [row("migrated", 2), row("qemu-precopy", 1)]}, figure)[1] == "reached"
    assert result({"converge": [row("migrated", 3)]}, figure)[1] == "not measured"


def test_a_fault_on_a_huge_page_is_the_longest_of_each_migration() -> None:
    details = {"fault_seconds": {"max": 0.045}, "bytes_by_kind": {"demand": 4096 * 2621, "drain": 0}, "stale_pages": 1}
    data = {"faults": [{"page": "2 MiB to 1024 MiB", "samples": [sample(details=details)]}]}
    figure = "fault on a 1 GiB page, source on 2 MiB pages"
    assert result(data, figure) == ("45.0 ms, 1.0% changed", "**missed**")
    details["fault_seconds"] = {"max": 0.0}  # the guest touched nothing that was stale
    assert result(data, figure) == ("-", "not measured")


def test_a_demanded_page_by_threads_has_its_goal_on_two() -> None:
    rows = [{"threads": threads, "demand": [seconds]} for threads, seconds in ((1, 0.06), (2, 0.035))]
    figure = "demanded page of 1 GiB, 1 % changed, source's engine alone"
    assert result({"search": rows}, figure) == ("60.0 ms (1 thread); 35.0 ms (2 threads)", "reached")
    rows[1]["demand"] = [0.045]
    assert result({"search": rows}, figure)[1] == "**missed**"


def test_faults_on_current_pages() -> None:
    rates = {"threads": 1, "bare": {"per_second": 100}, "alone": {"per_second": 89}, "around": {"faults": 10}}
    data = {"limit": [{"touches": 1000, "rates": [rates]}]}
    assert result(data, "faults on current pages a second / bare C handler") == ("0.89 (1 thread)", "**missed**")
    assert result(data, "faults on current pages / pages touched, 4 KiB guest") == ("0.010 (1 thread)", "reached")


def test_a_later_file_replaces_the_rows_that_it_measured_again(tmp_path: Path) -> None:
    first = {"comparison": [compared("migrated", 0.03), compared("migrated", 0.04, path="1g")]}
    again = {"comparison": [compared("migrated", 0.02)], "sparse": []}
    paths = [tmp_path / "first.json", tmp_path / "again.json"]
    for path, sections in zip(paths, (first, again), strict=True):
        path.write_text(json.dumps({"sections": {name: {"data": rows} for name, rows in sections.items()}}))
    merged = goals.merge(json.loads(path.read_text()) for path in paths)
    assert [(row["path"], row["stall_seconds"]) for row in merged["comparison"]] == [("10g", 0.02), ("1g", 0.04)]
    done = CliRunner().invoke(goals.main, [str(path) for path in paths])
    assert done.exit_code == 0, done.output
    assert "| longest stall, 1 Gbit/s, memfd 2 MiB" in done.output
