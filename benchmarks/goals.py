"""Compare results with the goals: the first table of docs/benchmarks.md.

``python -m benchmarks.goals build/bench/results.json`` prints it again.  Of several files, later ones replace the rows of
earlier ones.  A figure consists of parts, each with its own comparison, and is reached if all of them are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.report import Section
from benchmarks.sample import median, percentile

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
Row = Mapping[str, Any]
#: The rows of each section, as in results.json.
Data = Mapping[str, Sequence[Row]]
#: What distinguishes the rows of a section.
IDENTITY = (
    "case",
    "size",
    "memory",
    "path",
    "load",
    "limit_ms",
    "system",
    "streams",
    "page",
    "within",
    "page_bytes",
    "threads",
)

MEMORIES = {"private": "private memory", "memfd": "memfd 2 MiB"}
CASES = {"private": "private → 2 MiB", "4k": "memfd 4 KiB", "2m": "memfd 2 MiB"}
PATHS = {"loopback": "loopback", "10g": "10 Gbit/s", "1g": "1 Gbit/s"}
LOADS = ("idle", "sparse", "hot", "dense")

P50_SECONDS, P99_SECONDS = 0.010, 0.025
STALL_SECONDS, SLOW_STALL_SECONDS = 0.020, 0.050
OF_IPERF = 0.85
CPU_RATIO = 1.2
SPARSE_SECONDS = 0.040
GIGANTIC_SECONDS, GIGANTIC_THREADS = 0.040, 2
FAULTS_SHARE = 0.1
OF_BARE = 0.9
MEMORY_SHARE = 0.003


@dataclasses.dataclass(frozen=True)
class Part:
    """One measured value of a figure, and whether it reaches the goal; None: there is nothing to compare it with."""

    text: str
    reached: bool | None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A row of the table."""

    name: str
    goal: str
    parts: tuple[Part, ...]

    @property
    def result(self) -> str:
        """Return reached, missed or not measured."""
        results = [part.reached for part in self.parts]
        if False in results:
            return "**missed**"
        return "not measured" if None in results or not results else "reached"

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Return the row."""
        return self.name, self.goal, "; ".join(part.text for part in self.parts) or "-", self.result


def merge(results: Iterable[Mapping[str, Any]]) -> Data:
    """Return the rows of several results.json.  A later row replaces the earlier one that measures the same."""
    merged: dict[str, dict[tuple[Any, ...], Row]] = {}
    for result in results:
        for name, section in result["sections"].items():
            rows = merged.setdefault(name, {})
            rows.update({tuple(row.get(key) for key in IDENTITY): row for row in section["data"]})
    return {name: list(rows.values()) for name, rows in merged.items()}


def table(data: Data) -> Section:
    """Return the table of all figures."""
    section = Section("goals", "Goals and results", ("figure", "goal", "measured", "result"))
    for figures in FIGURES:
        section.rows += [figure.cells for figure in figures(data)]
    return section


# ---------------------------------------------------------------- rows and parts


def _find(data: Data, section: str, **wanted: Any) -> Row | None:
    rows = data.get(section, ())
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _long(seconds: float) -> str:
    return f"{seconds:.2f} s"


def _size(size: int) -> str:
    unit, name = next(pair for pair in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB")) if size >= pair[0])
    return f"{size / unit:g} {name}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _beside(
    label: str,
    ours: Row | None,
    theirs: Row | None,
    key: str,
    show: Callable[[float], str],
    *,
    bound: float = float("inf"),
    compared: bool = True,
) -> Iterator[Part]:
    """Compare a median with QEMU's and with a bound.  A migration of QEMU's that never ends is no rival."""
    if ours is None:
        return
    label = f"{label} " if label else ""
    if failed := _failed(ours):
        yield Part(f"{label}{failed}", reached=False)
        return
    value, other = ours[key], None if theirs is None else theirs[key]
    told = "" if theirs is None else f" (QEMU {'no end' if other is None else show(other)})"
    reached: bool | None = value <= bound and not (compared and other is not None and value > other)
    if reached and compared and theirs is None:
        reached = None
    yield Part(f"{label}{show(value)}{told}", reached)


def _failed(row: Row) -> str:
    """Return what is wrong with a row's migrations: some failed, or the guest's memory was not verified."""
    runs = row.get("runs", 0)
    sound = min(row.get("ended", runs), row.get("verified", runs))
    return "" if sound == runs else f"{runs - sound} of {runs} migrations failed"


def _completed(samples: Sequence[Row]) -> list[Row]:
    return [sample for sample in samples if sample["outcome"] == "completed" and sample["verified"]]


# ---------------------------------------------------------------- figures


def _downtime(data: Data) -> Iterator[Figure]:
    goal = f"p50 ≤ {P50_SECONDS * 1e3:g} ms, p99 ≤ {P99_SECONDS * 1e3:g} ms"
    rows = [row for row in data.get("switchover", ()) if row["case"] in CASES]
    found = {(row["case"], row.get("size", 256 * MIB)): row["samples"] for row in rows}
    sizes = sorted({256 * MIB, *(size for _, size in found)})
    for size in sizes:
        for case, title in CASES.items():
            samples = found.get((case, size))
            if samples is not None or size == sizes[0]:
                yield Figure(f"downtime, {title}, {_size(size)}", goal, tuple(_quantiles(samples)))
    others = data.get("downtime", ())
    if others or len(sizes) == 1:
        parts = tuple(part for row in others for part in _quantiles(row["samples"], f"{_size(row['size'])}: "))
        yield Figure("downtime, memfd 2 MiB, larger guests", goal, parts)


def _quantiles(samples: Sequence[Row] | None, label: str = "") -> Iterator[Part]:
    if samples is None:
        return
    ended = _completed(samples)
    half, most, longest = (percentile((s["downtime_seconds"] for s in ended), share) for share in (0.5, 0.99, 1.0))
    if half is None or most is None or longest is None or len(ended) < len(samples):
        yield Part(f"{label}{len(samples) - len(ended)} of {len(samples)} migrations failed", reached=False)
        return
    yield Part(
        f"{label}p50 {_short(half)}, p99 {_short(most)}, longest {_short(longest)} of {len(samples)}",
        half <= P50_SECONDS and most <= P99_SECONDS,
    )


def _stall(data: Data) -> Iterator[Figure]:
    for path, link in PATHS.items():
        slow = path == "1g"
        bound = SLOW_STALL_SECONDS if slow else STALL_SECONDS
        goal = f"≤ {bound * 1e3:g} ms" + ("" if slow else ", ≤ QEMU post-copy")
        for memory, title in MEMORIES.items():
            where = {"memory": memory, "path": path}
            parts = [
                part
                for load in ("sparse", "hot")
                for part in _beside(
                    load,
                    _find(data, "comparison", **where, load=load, system="migrated"),
                    _find(data, "comparison", **where, load=load, system="qemu-postcopy"),
                    "stall_seconds",
                    _short,
                    bound=bound,
                    compared=not slow,
                )
            ]
            yield Figure(f"longest stall, {link}, {title}", goal, tuple(parts))


def _throughput(data: Data) -> Iterator[Figure]:
    for streams in (1, 2):
        row = _find(data, "throughput", path="loopback", streams=streams)
        parts: list[Part] = []
        if row is not None and (failed := _failed(row)):
            parts = [Part(failed, reached=False)]
        elif row is not None:
            share, ours, theirs = (median(row[key]) or 0.0 for key in ("ratio", "migrated", "qemu"))
            parts = [
                Part(f"{share:.2f} of iperf3", share >= OF_IPERF),
                Part(f"{ours / 1e9:.2f} GB/s (QEMU {theirs / 1e9:.2f})", ours >= theirs if theirs else None),
            ]
        name = f"throughput beside a spinning guest, loopback, {_count(streams, 'stream')}"
        yield Figure(name, f"≥ {OF_IPERF} of iperf3, ≥ QEMU multifd", tuple(parts))


def _engines(data: Data) -> Iterator[Figure]:
    rates = {
        (row["streams"], populated): median(
            one["bytes_per_second"] for one in row["results"] if one["populated"] is populated
        )
        for row in data.get("engines", ())
        for populated in (True, False)
    }
    parts = []
    for populated, title in ((True, "pages present"), (False, "pages absent")):
        one, two = rates.get((1, populated)), rates.get((2, populated))
        if one and two:
            parts.append(Part(f"{two / one:.2f} ({title})", two >= one))
    yield Figure("two streams / one stream, engines alone", "≥ 1", tuple(parts))


def _processor(data: Data) -> Iterator[Figure]:
    for path, link in PATHS.items():
        for memory, title in MEMORIES.items():
            parts = []
            for load in LOADS:
                where = {"memory": memory, "path": path, "load": load}
                ours = _find(data, "comparison", **where, system="migrated")
                theirs = _find(data, "comparison", **where, system="qemu-precopy")
                if ours is None or theirs is None or not theirs["ended"]:
                    continue
                if failed := _failed(ours):
                    parts.append(Part(f"{load} {failed}", reached=False))
                    continue
                gibibytes = ours["samples"][0]["memory_bytes"] / GIB
                own, other = (row["cpu_seconds"] / gibibytes for row in (ours, theirs))
                parts.append(
                    Part(f"{load} {own / other:.2f} ({own:.2f} s, QEMU {other:.2f})", own <= CPU_RATIO * other)
                )
            goal = f"≤ {CPU_RATIO} times QEMU pre-copy"
            yield Figure(f"processor time per GiB, both sides, {link}, {title}", goal, tuple(parts))


def _sparse_writes(data: Data) -> Iterator[Figure]:
    for memory, title in MEMORIES.items():
        where = {"memory": memory, "path": "10g", "load": "sparse"}
        ours = _find(data, "comparison", **where, system="migrated")
        theirs = _find(data, "comparison", **where, system="qemu-precopy")
        parts = [
            part
            for label, key, show in (
                ("total", "total_seconds", _long),
                ("downtime", "downtime_seconds", _short),
                ("stall", "stall_seconds", _short),
            )
            for part in _beside(label, ours, theirs, key, show)
        ]
        yield Figure(f"sparse writes, 10 Gbit/s, {title}", "no worse than QEMU pre-copy", tuple(parts))


def _absent_memory(data: Data) -> Iterator[Figure]:
    parts, used = [], 2 * GIB
    for row in data.get("sparse", ()):
        value = median(one["downtime"] for one in row["results"]) or 0.0
        sound = all(one["verified"] for one in row["results"])
        if row["within"] == TIB:
            parts.append(Part(_short(value) if sound else "memory not verified", sound and value <= SPARSE_SECONDS))
        else:
            used = row["within"]
            parts.append(Part(f"without absent memory {_short(value)}", reached=True))
    name = f"downtime, 1 TiB of which {_size(used)} are in use"
    yield Figure(name, f"≤ {SPARSE_SECONDS * 1e3:g} ms", tuple(parts))


def _converge(data: Data) -> Iterator[Figure]:
    parts = []
    for row in data.get("converge", ()):
        if row["system"] != "migrated":
            continue
        other = _find(data, "converge", limit_ms=row["limit_ms"], system="qemu-precopy")
        told = "" if other is None else f" (QEMU {other['within']} of {other['runs']})"
        reached = None if other is None else row["within"] * other["runs"] >= other["within"] * row["runs"]
        parts.append(Part(f"limit {row['limit_ms']} ms: {row['within']} of {row['runs']}{told}", reached))
    yield Figure("mode precopy, sparse writes", "completes within the limit where QEMU does", tuple(parts))


def _gigantic(data: Data) -> Iterator[Figure]:
    row = _find(data, "faults", page="2 MiB to 1024 MiB")
    parts = []
    faulted = [one for one in _completed(row["samples"] if row else ()) if one["details"]["fault_seconds"]["max"]]
    if faulted:
        longest = median(sample["details"]["fault_seconds"]["max"] for sample in faulted) or 0.0
        blocks = median(_stale_blocks(sample["details"]) for sample in faulted) or 0.0
        parts.append(Part(f"{_short(longest)}, {blocks * 4096 / GIB:.1%} changed", longest <= GIGANTIC_SECONDS))
    goal = f"≤ {GIGANTIC_SECONDS * 1e3:g} ms"
    yield Figure("fault on a 1 GiB page, source on 2 MiB pages", goal, tuple(parts))
    parts = []
    for row in data.get("search", ()):
        value = median(row["demand"]) or 0.0
        enough = row["threads"] != GIGANTIC_THREADS or value <= GIGANTIC_SECONDS
        parts.append(Part(f"{_short(value)} ({_count(row['threads'], 'thread')})", enough))
    goal += f" with {GIGANTIC_THREADS} threads"
    yield Figure("demanded page of 1 GiB, 1 % changed, source's engine alone", goal, tuple(parts))


def _stale_blocks(details: Mapping[str, Any]) -> float | None:
    kinds, pages = details["bytes_by_kind"], details["stale_pages"]
    return (kinds["demand"] + kinds["drain"]) / 4096 / pages if pages else None


def _current_faults(data: Data) -> Iterator[Figure]:
    around, alone = [], []
    for row in data.get("limit", ()):
        for rates in row["rates"]:
            threads = _count(rates["threads"], "thread")
            share = rates["around"]["faults"] / row["touches"]
            around.append(Part(f"{share:.3f} ({threads})", share <= FAULTS_SHARE))
            ratio = rates["alone"]["per_second"] / rates["bare"]["per_second"]
            alone.append(Part(f"{ratio:.2f} ({threads})", ratio >= OF_BARE))
    yield Figure("faults on current pages / pages touched, 4 KiB guest", f"≤ {FAULTS_SHARE}", tuple(around))
    yield Figure("faults on current pages a second / bare C handler", f"≥ {OF_BARE}", tuple(alone))


def _agents(data: Data) -> Iterator[Figure]:
    grown = {
        row["size"]: median(sample["details"].get("source_agent_bytes") for sample in row["samples"])
        for row in data.get("downtime", ())
    }
    for row in data.get("sparse", ()):
        if row["within"] != TIB:
            grown[row["within"]] = median(one["source_bytes"] for one in row["results"])
    parts = [
        Part(f"{grew / size:.2%} of {_size(size)}", grew / size <= MEMORY_SHARE)
        for size, grew in sorted(grown.items())
        if grew is not None
    ]
    yield Figure("memory of the source's agent / guest", f"≤ {MEMORY_SHARE:.1%}", tuple(parts))


FIGURES: tuple[Callable[[Data], Iterator[Figure]], ...] = (
    _downtime,
    _stall,
    _throughput,
    _engines,
    _processor,
    _sparse_writes,
    _absent_memory,
    _converge,
    _gigantic,
    _current_faults,
    _agents,
)


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: tuple[Path, ...]) -> None:
    """Print the table of goals from one or more results.json."""
    print(table(merge(json.loads(path.read_text()) for path in results)).markdown())


if __name__ == "__main__":
    main()
