"""Measure single figures: downtime by size, throughput, the guest's pace, fault latencies, bytes after the switchover."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import builtin, delta, external, iperf, plane
from benchmarks.network import link
from benchmarks.pool import warm_pages
from benchmarks.report import Section, mebibytes, milliseconds, rate, ratio
from benchmarks.sample import Sample, median, medians
from benchmarks.settings import MIB, Settings
from migrated.agent.record import SOURCE_STEPS
from migrated.errors import HostError, PoolError
from migrated.memory.engine import Histogram

GIB = 1 << 30
HERE = Path(__file__).parent
BUILD_SECONDS = 180
DOWNTIME_LIMIT_MS = 10  # of `downtime`


async def downtime(settings: Settings) -> Section:
    """Measure the downtime of a guest that writes as fast as it can, in two sizes."""
    section = Section(
        "downtime",
        "Downtime under constant writes, by size",
        (
            "memory",
            "downtime",
            "longest",
            *SOURCE_STEPS,
            "longest stall",
            "stale pages",
            "source agent",
            "memory verified",
        ),
        notes=[
            (
                f"Hybrid mode, loopback, downtime limit {DOWNTIME_LIMIT_MS} ms; the guest rewrites random blocks as fast as it can. "
                "Steps: medians, in milliseconds. Source agent: the growth of its memory during the migration."
            )
        ],
    )
    for size in (settings.memory_bytes, settings.large_bytes):
        samples = []
        with warm_pages(2 * size, 2 * MIB):
            for number in range(settings.runs):
                with link("loopback") as made:
                    sample = await external.move(
                        made, "max", memory_bytes=size, mode="hybrid", downtime_limit_ms=DOWNTIME_LIMIT_MS
                    )
                settings.say("loopback", "max", f"migrated {size // MIB} MiB", number, sample)
                samples.append(sample)
        result = medians(samples)
        longest = max((s.downtime_seconds or 0 for s in samples), default=0)
        section.rows.append(
            (
                *(mebibytes(size), milliseconds(result["downtime_seconds"]), milliseconds(longest)),
                *(_step(samples, name) for name in SOURCE_STEPS),
                *(milliseconds(result["stall_seconds"]), _detail(samples, "stale_pages")),
                mebibytes(median(s.details.get("source_agent_bytes") for s in samples)),
                f"{result['verified']} of {result['runs']}",
            )
        )
        section.data.append({"size": size, **result, "samples": _plain(samples)})
        settings.save(section)
    return section


async def throughput(settings: Settings) -> Section:
    """Compare pre-copy of an idle guest with iperf3, run just before over as many connections."""
    section = Section(
        "throughput",
        "Pre-copy throughput against iperf3",
        ("path", "streams", "iperf3", "migrated", "of iperf3", "QEMU multifd", "memory verified"),
        notes=[
            (
                f"QEMU {settings.host['qemu']}. First round of an idle guest (all of its memory is non-zero), wire bytes divided by "
                "its time; the guest's virtual processor spins on one of the cores in all three. QEMU: pre-copy with as many "
                "multifd channels, wire bytes divided by the total time without setup and downtime, as QEMU reports them."
            )
        ],
    )
    with warm_pages(2 * settings.memory_bytes, 2 * MIB):
        for path in ("loopback",) if settings.quick else tuple(path for path in settings.paths if path != "1g"):
            for streams in (1, 2):
                limits, ours, theirs, ratios, samples = [], [], [], [], []
                for number in range(settings.runs):
                    with link(path) as made:
                        limit = 0.0

                        async def before(made: Any = made, streams: int = streams) -> None:
                            nonlocal limit
                            limit = (await iperf.measure(made, streams)).bytes_per_second

                        sample = await external.move(
                            made, "idle", memory_bytes=settings.memory_bytes, before=before, streams=streams
                        )
                        settings.say(path, "idle", f"migrated x{streams}", number, sample)
                        samples.append(sample)
                        other = await builtin.move(
                            made, "idle", system="qemu-precopy", memory_bytes=settings.memory_bytes, streams=streams
                        )
                        settings.say(path, "idle", f"qemu-multifd x{streams}", number, other)
                    limits.append(limit)
                    first = next(iter(sample.details.get("rounds", [])), None)
                    if first is not None and first["seconds"]:
                        ours.append(first["sent"] / first["seconds"])
                        ratios.append(ours[-1] / limit)
                    if other.outcome == "completed" and other.wire_bytes:
                        total, setup, down = (other.details[key] for key in ("total-time", "setup-time", "downtime"))
                        theirs.append(other.wire_bytes / (total - setup - down) * 1e3)
                section.rows.append(
                    (
                        *(path, str(streams), rate(median(limits)), rate(median(ours)), ratio(median(ratios))),
                        *(rate(median(theirs)), f"{sum(s.verified for s in samples)} of {len(samples)}"),
                    )
                )
                section.data.append(
                    {
                        "path": path,
                        "streams": streams,
                        "iperf3": limits,
                        "migrated": ours,
                        "qemu": theirs,
                        "ratio": ratios,
                        "verified": sum(s.verified for s in samples),
                        "runs": len(samples),
                    }
                )
                settings.save(section)
    return section


async def engines(settings: Settings) -> Section:
    """Compare the data plane alone with iperf3 over as many connections, with no other load."""
    section = Section(
        "engines",
        "The two engines alone against iperf3, loopback",
        (
            *("streams", "iperf3", "engines", "of iperf3", "pages not there before"),
            *("CPU s a GB: iperf3", "engines", "memory verified"),
        ),
        notes=[
            (
                "Both engines in one process, no guest, no agents: from the start of a round over memory that is all non-zero "
                "to the barrier on the target. The pages of the copy are present before, as they are when they could be "
                "populated in time; the other figure includes zeroing them. CPU: seconds per GB, both sides; this figure "
                "depends least on other load on the machine. The engines' figure includes reading, two hashes and writing; "
                "iperf3 discards the data."
            )
        ],
    )
    size = settings.memory_bytes
    with warm_pages(2 * size, 2 * MIB):
        for streams in (1, 2):
            limits, results = [], []
            for _ in range(settings.runs):
                with link("loopback") as made:
                    limits.append(await iperf.measure(made, streams))
                for populated in (True, False):
                    result = await asyncio.to_thread(
                        plane.first_round, size_bytes=size, page_bytes=2 * MIB, streams=streams, populated=populated
                    )
                    settings.note(f"engines: iperf3 {rate(limits[-1].bytes_per_second)}, {result}")
                    results.append(result)
            there = [r for r in results if r["populated"]]
            bare = [r for r in results if not r["populated"]]
            ratios = [r["bytes_per_second"] / limit.bytes_per_second for r, limit in zip(there, limits, strict=True)]
            section.rows.append(
                (
                    *(
                        str(streams),
                        rate(median(one.bytes_per_second for one in limits)),
                        rate(median(r["bytes_per_second"] for r in there)),
                    ),
                    *(ratio(median(ratios)), rate(median(r["bytes_per_second"] for r in bare))),
                    ratio(median(one.cpu_seconds_per_gigabyte for one in limits)),
                    ratio(median(r["cpu_seconds_per_gigabyte"] for r in there)),
                    f"{sum(r['verified'] for r in results)} of {len(results)}",
                )
            )
            section.data.append(
                {"streams": streams, "iperf3": [dataclasses.asdict(one) for one in limits], "results": results}
            )
            settings.save(section)
    return section


async def pace(settings: Settings) -> Section:
    """Measure how much pre-copy slows a guest that does nothing but write."""
    section = Section(
        "pace",
        "The guest's pace during pre-copy",
        ("system", "operations before", "during", "pace", "memory verified"),
        notes=[
            (
                "1 Gbit/s link, so that copying leaves processor time; the guest rewrites a hot set (1/64 of memory, and one "
                "block in ten anywhere) as fast as it can."
            )
        ],
    )
    with warm_pages(2 * settings.memory_bytes, 2 * MIB):
        samples: dict[str, list[Sample]] = {"migrated": []} if settings.quick else {"migrated": [], "qemu-postcopy": []}
        for number in range(settings.runs):
            for system, kept in samples.items():
                with link("1g") as made:
                    if system == "migrated":
                        sample = await external.move(made, "maxhot", memory_bytes=settings.memory_bytes)
                    else:
                        sample = await builtin.move(
                            made, "maxhot", system=system, memory_bytes=settings.memory_bytes, limit_seconds=120
                        )
                settings.say("1g", "maxhot", system, number, sample)
                kept.append(sample)
    for system, kept in samples.items():
        before, during = median(s.operations_before for s in kept), median(s.operations_during for s in kept)
        section.rows.append(
            (
                *(system, f"{before or 0:.0f}/s", f"{during or 0:.0f}/s", ratio(median(s.pace for s in kept))),
                f"{sum(s.verified for s in kept)} of {len(kept)}",
            )
        )
        section.data.append({"system": system, "samples": _plain(kept)})
    settings.save(section)
    return section


async def faults(settings: Settings) -> Section:
    """Measure demanded pages during the drain, which is slowed down so that there are enough of them."""
    section = Section(
        "faults",
        "Faults after the switchover, 10 Gbit/s link, drain running",
        (
            "page, source to target",
            "kind",
            "faults",
            "p50",
            "p99",
            "longest",
            "stale blocks a page",
            "longest stall",
            "memory verified",
        ),
        notes=[
            (
                "From the fault's arrival at the fault server to the end of UFFDIO_CONTINUE, all runs together; quantiles are "
                "accurate to their bucket (a factor of two). 2 MiB pages: 5 000 random blocks a second, the drain limited to "
                "100 Mbit/s so that the guest meets stale pages at all. 1 GiB pages: 20 000 blocks a second, drain unlimited, a "
                "downtime limit of 1 ms so that something is left. The source tracks by its own page size, which is therefore "
                "what it must search for changes."
            )
        ],
    )
    light = {"pattern": "sparse", "rate": 5_000, "sweep_seconds": 0}
    more = {"pattern": "sparse", "rate": 20_000, "sweep_seconds": 0}
    # Page size on the source, page size on the target, load, options.
    cases: tuple[tuple[int, int, dict[str, Any], dict[str, Any]], ...] = (
        (2 * MIB, 2 * MIB, light, {"drain_bandwidth": "100Mbit"}),
        *((source, GIB, more, {"downtime_limit_ms": 1}) for source in (4096, 2 * MIB, GIB)),
    )
    for source, page, load, options in cases[:2] if settings.quick else cases:
        size = max(settings.memory_bytes, page)
        samples = []
        name = f"{_page(source)} to {_page(page)}"
        try:
            with contextlib.ExitStack() as stack:
                for warm in {page, source} - {4096}:
                    stack.enter_context(warm_pages((page, source).count(warm) * size, warm))
                for number in range(settings.runs):
                    with link("10g") as made:
                        sample = await external.move(
                            made,
                            "sparse",
                            memory_bytes=size,
                            page_bytes=source,
                            target_page_bytes=page,
                            guest_load=load,
                            **options,
                        )
                    settings.say("10g", name, "migrated", number, sample)
                    samples.append(sample)
        except PoolError as error:
            section.notes.append(f"{name}: not measured, {error.message}.")
            continue
        _fault_rows(section, name, samples)
        settings.save(section)
    return section


def _page(page_bytes: int) -> str:
    return f"{page_bytes >> 10} KiB" if page_bytes < MIB else f"{page_bytes // MIB} MiB"


def _fault_rows(section: Section, page: str, samples: list[Sample]) -> None:
    ended = [s for s in samples if s.outcome == "completed"]
    for kind in ("current", "stale", "missing"):
        whole = Histogram(0, 0, 0, (0,) * 32)
        for sample in ended:
            buckets = tuple(sample.details["faults_by_kind_us"][kind])
            longest = int(sample.details["fault_seconds"]["max"] * 1e9)
            whole += Histogram(sum(buckets), 0, longest if sum(buckets) else 0, buckets)
        if whole.count == 0:
            continue
        blocks = median(_blocks_a_page(s) for s in ended)
        section.rows.append(
            (
                *(page, kind, str(whole.count), milliseconds(whole.quantile_seconds(0.5))),
                *(milliseconds(whole.quantile_seconds(0.99)), milliseconds(whole.max_ns * 1e-9), f"{blocks or 0:.1f}"),
                *(
                    milliseconds(median(s.stall_seconds for s in ended)),
                    f"{sum(s.verified for s in ended)} of {len(samples)}",
                ),
            )
        )
    section.data.append({"page": page, "samples": _plain(samples)})


def _blocks_a_page(sample: Sample) -> float | None:
    kinds = sample.details.get("bytes_by_kind", {})
    pages = sample.details.get("stale_pages", 0)
    return (kinds["demand"] + kinds["drain"]) / 4096 / pages if pages else None


async def after(settings: Settings) -> Section:
    """Compare the bytes after the switchover with the blocks that really changed."""
    section = Section(
        "after",
        "Bytes after the switchover",
        ("page", "stale pages", "blocks changed", "bytes of them", "on the wire", "ratio", "memory verified"),
        notes=[
            (
                "Both engines over loopback, on memory that the benchmark writes itself, so that the changes are known exactly. "
                "As many blocks again are rewritten with their own contents, and must not be sent."
            )
        ],
    )
    for page, pages, changed in ((2 * MIB, 32, 1), (2 * MIB, 32, 8), (2 * MIB, 32, 128), (GIB, 1, 2621)):
        try:
            with warm_pages(2 * page * pages, page):
                result = await asyncio.to_thread(
                    delta.bytes_after_switchover,
                    pages=pages,
                    page_bytes=page,
                    blocks_per_page=changed,
                    touched_per_page=changed,
                )
        except PoolError as error:
            section.notes.append(f"{page // MIB} MiB pages: not measured, {error.message}.")
            continue
        settings.note(f"after: {result}")
        section.rows.append(
            (
                *(mebibytes(page), str(result["stale_pages"]), str(result["changed_blocks"])),
                *(f"{result['changed_bytes'] / 1024:.0f} KiB", f"{result['wire_bytes'] / 1024:.0f} KiB"),
                *(f"{result['ratio']:.3f}", "yes" if result["verified"] else "NO"),
            )
        )
        section.data.append(result)
    settings.save(section)
    return section


async def limit(settings: Settings) -> Section:
    """Compare minor faults on current pages with the simplest handler that resolves them: one fault, and as many as possible."""
    section = Section(
        "limit",
        "Faults on current pages, beside a bare C handler",
        ("measured", "bare C", "migrated", "ratio", "migrated, neighbours known", "faults"),
        notes=[
            (
                "Both servers in one process, in alternating runs. Bare: poll, read and UFFDIO_CONTINUE, nothing else. One fault: "
                "2 MiB pages, one touch every 0.2 ms, time as seen by the faulting thread. Touches a second: 4 KiB pages in "
                "random order, as fast as the threads can. Where the neighbours are known to be current, as they are after "
                "pre-copy, a fault maps them as well: the last columns, with the number of faults for all touches."
            )
        ],
    )
    program = await asyncio.to_thread(build, settings.output, "fault_limit")
    pages, turns = 64, max(5, settings.runs)
    with warm_pages(pages * 2 * MIB, 2 * MIB):
        process = await asyncio.create_subprocess_exec(
            str(program), str(pages), str(turns), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 120)
    result = json.loads(output)
    bare, engine = (result["latency"][server] for server in ("bare", "engine"))
    for key, label in (("p50_us", "p50"), ("p99_us", "p99"), ("max_us", "longest")):
        one = f"{bare[key]:.0f} µs", f"{engine[key]:.0f} µs", f"{engine[key] / bare[key]:.2f}"
        section.rows.append((f"one fault, {label}", *one, "-", "1 of 1"))
    for rates in result["rates"]:
        by = {server: rates[server]["per_second"] for server in ("bare", "alone", "around")}
        threads = f"{rates['threads']} thread{'s' if rates['threads'] > 1 else ''}"
        section.rows.append(
            (
                f"touches a second, {threads}",
                *(f"{by['bare']:.0f}", f"{by['alone']:.0f}", f"{by['alone'] / by['bare']:.2f}", f"{by['around']:.0f}"),
                f"{rates['around']['faults']} of {result['touches']}",
            )
        )
    section.data.append(result)
    settings.note(f"limit: {result}")
    settings.save(section)
    return section


def build(output: Path, target: str) -> Path:
    """Build a program of this directory's CMakeLists.txt, and return it."""
    directory = output / "native"
    directory.mkdir(parents=True, exist_ok=True)
    for command in (
        ["cmake", "-S", str(HERE), "-B", str(directory), "-G", "Ninja", "--log-level=WARNING"],
        ["cmake", "--build", str(directory), "--target", target],
    ):
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=BUILD_SECONDS)
        if done.returncode:
            raise HostError(f"{' '.join(command[:3])} failed: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return directory / target


def _step(samples: list[Sample], name: str) -> str:
    value = median(s.details.get("steps", {}).get(name) for s in samples)
    return "-" if value is None else f"{value * 1e3:.1f}"


def _detail(samples: list[Sample], name: str) -> str:
    value = median(s.details.get(name) for s in samples)
    return "-" if value is None else f"{value:.0f}"


def _plain(samples: list[Sample]) -> list[Any]:
    return [msgspec.to_builtins(sample) for sample in samples]
