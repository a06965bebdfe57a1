"""Measure the downtime of many migrations, back and forth: percentiles, steps, and QEMU's own migration for comparison.

A guest that started on private memory arrives on a memfd of the agent, so each of those migrations needs a new guest, as does
each of QEMU's own.  Booting takes longer than migrating, so there are fewer of these.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import itertools
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks import builtin
from benchmarks.guest import LOADS, Watched
from benchmarks.network import Link, link
from benchmarks.pool import touch
from benchmarks.report import Section, mebibytes
from benchmarks.sample import Sample, median, percentile
from benchmarks.settings import MIB, Settings
from migrated.agent.record import SOURCE_STEPS
from migrated.certificates import Authority, make_host
from migrated.demo.pair import short_directory
from migrated.errors import MigratedError, PoolError
from migrated.settings import TlsFiles
from tests.rig import supervisor
from tests.rig.guest import Move, MovingGuest, fill_video_memory, moving_guest
from tests.rig.pages import PagesUnavailableError, more_pages

PATH, LOAD = "loopback", "max"
DOWNTIME_LIMIT_MS = 10
#: A larger guest migrates fewer times, in proportion, because each migration takes as much longer.
USUAL_BYTES = 256 * MIB
#: Memory of a guest's devices, on both hosts.
DEVICES_BYTES = 256 * MIB
STEPS = SOURCE_STEPS
#: Goals in seconds; a migration whose downtime exceeds the second is listed with its steps.
P50_GOAL, P99_GOAL, VGA_GOAL = 0.010, 0.025, 0.002
#: QEMU's pre-copy may never end under this load: number and length of the attempts after which the benchmark stops trying.
ENDLESS_ATTEMPTS = 3
ENDLESS_SECONDS = 20.0
#: Cases that need a new guest for each migration run only one in so many.
FRESH_SHARE = 4

_VGA = ("-vga", "std")


@dataclasses.dataclass(frozen=True)
class Case:
    """A guest, and the system that migrates it."""

    title: str
    memory: Literal["private", "memfd"] = "memfd"
    page_bytes: int = 4096  # page size of the source's memfd
    target_page_bytes: int = 4096
    system: str = "migrated"
    vga: bool = False
    tls: bool = False

    @property
    def extra(self) -> tuple[str, ...]:
        """Additional options of QEMU."""
        return _VGA if self.vga else ()

    @property
    def goes_back(self) -> bool:
        """Whether one guest migrates back and forth; otherwise each migration has its own."""
        return self.system == "migrated" and self.memory == "memfd"

    def count(self, migrations: int, memory_bytes: int) -> int:
        """Return the number of migrations of this case, for a guest of this size."""
        share = max(1, memory_bytes // USUAL_BYTES) * (1 if self.goes_back else FRESH_SHARE)
        return -(-migrations // share)


def _cases() -> Iterator[tuple[str, Case]]:
    yield "tls", Case("memfd 4 KiB, TLS", tls=True)
    for system in ("qemu-precopy", "qemu-postcopy"):
        yield f"{system}-tls", Case(f"{system} 4 KiB, TLS", system=system, tls=True)
    for vga in (False, True):
        name, title = ("-vga", ", VGA") if vga else ("", "")
        yield f"private{name}", Case(f"private → 2 MiB{title}", memory="private", target_page_bytes=2 * MIB, vga=vga)
        yield f"4k{name}", Case(f"memfd 4 KiB{title}", vga=vga)
        yield (
            f"2m{name}",
            Case(f"memfd 2 MiB{title}", page_bytes=2 * MIB, target_page_bytes=2 * MIB, vga=vga),
        )
        for system in ("qemu-precopy", "qemu-postcopy"):
            yield f"{system}{name}", Case(f"{system} 4 KiB{title}", system=system, vga=vga)


CASES = dict(_cases())


async def run(settings: Settings) -> Section:
    """Measure every case and size, ``settings.migrations`` times."""
    # A tmpfs, as /run/migrated is: the journal is written twice while the guest is paused.
    os.environ.setdefault("TMPDIR", "/dev/shm")
    section = Section(
        "switchover",
        "Downtime, migration by migration",
        ("case", "memory", "migrations", "p50", "p99", "longest", *STEPS, "memory verified"),
        notes=[
            (
                f"QEMU {settings.host['qemu']}, one virtual processor under KVM that rewrites random blocks as fast as it can, "
                f"{PATH}, hybrid mode, downtime limit {DOWNTIME_LIMIT_MS} ms. Memory verified after each migration. "
                f"Steps: medians. State directories are in {short_directory()}."
            ),
            (
                "Downtime of migrated: from the stop command until the source is notified that the guest runs. "
                "Downtime of QEMU: from STOP on the source to RESUME on the target."
            ),
        ],
    )
    supervisor.start()
    medians: dict[str, float] = {}
    for size, name in itertools.product(settings.switchover_bytes, settings.cases):
        case = CASES[name]
        samples = await _case(settings, case, size)
        title = case.title if size == USUAL_BYTES else f"{case.title}, {size // MIB} MiB"
        section.rows.append(row(case.title, size, samples))
        section.notes += explanations(title, samples)
        section.data.append(
            {
                "case": name,
                "size": size,
                "title": title,
                "samples": [msgspec.to_builtins(sample) for sample in samples],
            }
        )
        half = median(sample.downtime_seconds for sample in samples)
        if half is not None and size == settings.switchover_bytes[0]:
            medians[name] = half
        settings.save(section)
    section.notes += [
        f"With VGA, {CASES[name].title}: p50 {(medians[f'{name}-vga'] - medians[name]) * 1e3:+.1f} ms "
        f"(goal: at most {VGA_GOAL * 1e3:+.0f} ms)."
        for name in medians
        if f"{name}-vga" in medians
    ]
    if {"4k", "tls"} <= medians.keys():
        section.notes.append(
            f"TLS, memfd 4 KiB: p50 {(medians['tls'] - medians['4k']) * 1e3:+.1f} ms (goal: at most +3.0 ms)."
        )
    settings.save(section)
    return section


# ---------------------------------------------------------------- migrations


async def _case(settings: Settings, case: Case, memory_bytes: int) -> list[Sample]:
    samples: list[Sample] = []
    pool_bytes = 2 * memory_bytes + DEVICES_BYTES
    with contextlib.ExitStack() as held:
        if 2 * MIB in (case.page_bytes, case.target_page_bytes):
            try:
                held.enter_context(more_pages(pool_bytes // (2 * MIB), 2 * MIB))
            except PagesUnavailableError as error:
                raise PoolError(str(error)) from error
            touch(pool_bytes, 2 * MIB)
        made = held.enter_context(link(PATH))
        tls = held.enter_context(_certificates(made)) if case.tls else None
        migrate = _ours if case.system == "migrated" else _theirs
        moves = migrate(case, memory_bytes, made, settings, tls)
        async for sample in moves:
            settings.say(PATH, LOAD, case.title, len(samples), sample)
            samples.append(sample)
    return samples


@contextlib.contextmanager
def _certificates(made: Link) -> Iterator[Path]:
    """A directory of certificates for both sides, under the names that QEMU uses as well."""
    with tempfile.TemporaryDirectory(prefix="mgb-") as directory:
        now = dt.datetime.now(dt.UTC)
        make_host(Authority.make("benchmark", now=now), Path(directory), [made.target_address], now=now)
        yield Path(directory)


async def _ours(
    case: Case, memory_bytes: int, made: Link, settings: Settings, tls: Path | None
) -> AsyncIterator[Sample]:
    """Migrate with `migrated`.  A guest is discarded after its first failed migration: later figures would mean nothing."""
    count = case.count(settings.migrations, memory_bytes)
    guests, each = (1, count) if case.goes_back else (count, 1)
    sides: dict[str, Any] = {}
    if tls is not None:
        for role in ("source", "target"):
            files = TlsFiles.conventional(role, tls)
            sides[role] = {"tls": {"ca": str(files.ca), "cert": str(files.cert), "key": str(files.key)}}
    for _ in range(guests):
        try:
            async with moving_guest(
                page_bytes=(case.page_bytes, case.target_page_bytes),
                hosts=({"prefix": made.source_prefix, **sides}, {"prefix": made.target_prefix, **sides}),
                kind="boot",
                accel="kvm",
                memory=case.memory,
                memory_bytes=memory_bytes,
                load=LOADS[LOAD],
                extra=case.extra,
            ) as guest:
                if case.vga:
                    await guest.fill_video_memory()
                for _ in range(each):
                    sample = _sample(case, memory_bytes)
                    await _migrate(sample, guest, case)
                    yield sample
        except (AssertionError, MigratedError, OSError, TimeoutError) as error:
            failed = _sample(case, memory_bytes)
            failed.outcome = f"{type(error).__name__}: {error}"
            yield failed


async def _migrate(sample: Sample, guest: MovingGuest, case: Case) -> None:
    move: Move = await guest.move(mode="hybrid", downtime_limit_ms=DOWNTIME_LIMIT_MS)  # verifies its memory
    if case.vga:
        await guest.assert_video_memory()
    sample.verified = True
    sample.downtime_seconds = move.source["downtime_seconds"]
    sample.details = {
        "steps": move.source["downtime_breakdown"],
        "target_steps": move.target["downtime_breakdown"],
        "stale_pages": move.source["stale_pages"],
        "rounds": move.source["round"],
    }


async def _theirs(
    case: Case, memory_bytes: int, made: Link, settings: Settings, tls: Path | None
) -> AsyncIterator[Sample]:
    async def fill(watched: Watched) -> None:
        await fill_video_memory(watched.guest.name, watched.guest.source_qmp)

    endless = 0
    for number in range(case.count(settings.migrations, memory_bytes)):
        sample = await builtin.move(
            made,
            LOAD,
            system=case.system,
            memory_bytes=memory_bytes,
            page_bytes=case.page_bytes,
            limit_seconds=min(ENDLESS_SECONDS, settings.limit_seconds),
            downtime_limit_ms=DOWNTIME_LIMIT_MS,
            extra=case.extra,
            tls=tls,
            before=fill if case.vga else None,
        )
        yield sample
        endless += sample.outcome != "completed"
        if endless == number + 1 == ENDLESS_ATTEMPTS:
            return


def _sample(case: Case, memory_bytes: int) -> Sample:
    return Sample(system=case.system, path=PATH, load=LOAD, memory_bytes=memory_bytes)


# ---------------------------------------------------------------- figures


def row(title: str, memory_bytes: int, samples: Sequence[Sample]) -> tuple[str, ...]:
    """Return a row of the table, over the completed migrations, and how many there were."""
    ended = [sample for sample in samples if sample.outcome == "completed"]
    downtimes = [sample.downtime_seconds for sample in ended]
    return (
        title,
        mebibytes(memory_bytes),
        str(len(ended)) if len(ended) == len(samples) else f"{len(ended)} of {len(samples)} ended",
        *(tenths(percentile(downtimes, share)) for share in (0.5, 0.99, 1.0)),
        *(tenths(median(sample.details.get("steps", {}).get(step) for sample in ended)) for step in STEPS),
        f"{sum(sample.verified for sample in ended)} of {len(ended)}",
    )


def explanations(title: str, samples: Sequence[Sample]) -> list[str]:
    """Return a line for each migration that exceeded the goal, with its steps, the longest first."""
    lines = []
    for number, sample in enumerate(samples, 1):
        steps = sample.details.get("steps", {})
        if steps and (sample.downtime_seconds or 0.0) > P99_GOAL:
            told = "; on the target: ".join(
                ", ".join(f"{step} {seconds * 1e3:.1f}" for step, seconds in _longest_first(side))
                for side in (steps, sample.details.get("target_steps", {}))
                if side
            )
            lines.append(f"{title}, migration {number}: {tenths(sample.downtime_seconds)} ms: {told}.")
    return lines


def _longest_first(steps: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(steps.items(), key=lambda item: item[1], reverse=True)


def tenths(seconds: float | None) -> str:
    """Format seconds as tenths of a millisecond, because steps are short."""
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
