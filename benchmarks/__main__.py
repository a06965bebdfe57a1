"""``python -m benchmarks``: measure, print the tables and the goals, and write build/bench/results.json, results.md and plots."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import click
import uvloop

from benchmarks import bounds, comparison, converge, domains, figures, goals, search, stall, switchover, tls
from benchmarks.guest import LOADS
from benchmarks.network import RATES
from benchmarks.report import Section
from benchmarks.settings import MIB, Settings
from migrated.demo.qemu_guest import QEMU
from migrated.errors import MigratedError
from migrated.units import parse_size

SECTIONS: dict[str, Callable[[Settings], Awaitable[Section]]] = {
    "limit": figures.limit,
    "after": figures.after,
    "engines": figures.engines,
    "tls": tls.tls,
    "downtime": figures.downtime,
    "switchover": switchover.run,
    "throughput": figures.throughput,
    "faults": figures.faults,
    "search": search.run,
    "pace": figures.pace,
    "limits": bounds.limits,
    "sparse": bounds.sparse,
    "stall": stall.stall,
    "converge": converge.run,
    "comparison": comparison.run,
    "libvirt": domains.run,
}
COMPARED = ("idle", "sparse", "hot", "dense")
OUTPUT = Path("build/bench")


def _choice(allowed: tuple[str, ...], text: str, what: str) -> tuple[str, ...]:
    chosen = tuple(word.strip() for word in text.split(",") if word.strip())
    for word in chosen:
        if word not in allowed:
            raise click.UsageError(f"unknown {what} {word!r}: one of {', '.join(allowed)}")
    return chosen


@click.command()
@click.option(
    "--quick", is_flag=True, help="small guests, one run, fewer paths, loads and kinds of memory: under five minutes"
)
@click.option("--only", default="", help=f"comma-separated sections: {', '.join(SECTIONS)}")
@click.option("--runs", type=click.IntRange(1, 100), help="migrations per figure (default: BENCH_RUNS, or 5)")
@click.option("--slow-runs", type=click.IntRange(1, 100), help="the same on the 1 Gbit/s link (default: as --runs)")
@click.option("--memory", default="", help="memory of the guest (default 1G)")
@click.option("--large", default="", help="memory of the larger guest of `downtime` (default 4G)")
@click.option("--paths", default="", help=f"comma-separated: {', '.join(RATES)}")
@click.option("--loads", default="", help=f"comma-separated: {', '.join(COMPARED)}")
@click.option("--memories", default="", help=f"comma-separated, of `comparison`: {', '.join(comparison.MEMORIES)}")
@click.option("--migrations", type=click.IntRange(1, 10000), help="per case of `switchover` (default 200; --quick: 10)")
@click.option("--cases", default="", help=f"comma-separated cases of `switchover`: {', '.join(switchover.CASES)}")
@click.option(
    "--switchover-memory",
    default="256M",
    help="comma-separated sizes of the guests of `switchover`; larger ones migrate fewer times, in proportion",
)
@click.option("--limit", default=60.0, help="seconds after which a migration is aborted")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, help="directory for the results")
def main(
    *,
    quick: bool,
    only: str,
    runs: int | None,
    slow_runs: int | None,
    memory: str,
    large: str,
    paths: str,
    loads: str,
    memories: str,
    migrations: int | None,
    cases: str,
    switchover_memory: str,
    limit: float,
    output: Path,
) -> None:
    """Compare migrated with QEMU's own migration, iperf3 and a bare fault handler.  Needs root and KVM."""
    lacking = [what for what, there in _needs() if not there]
    if lacking:
        raise click.ClickException(f"cannot run the benchmarks: this machine lacks {', '.join(lacking)}")
    runs = runs or int(os.environ.get("BENCH_RUNS", "1" if quick else "5"))
    settings = Settings(
        runs=runs,
        slow_runs=slow_runs or runs,
        memory_bytes=parse_size(memory or ("512M" if quick else "1G")),
        large_bytes=parse_size(large or ("2G" if quick else "4G")),
        paths=_choice(tuple(RATES), paths or ("loopback,10g" if quick else ",".join(RATES)), "path"),
        loads=_choice(COMPARED, loads or ("sparse" if quick else ",".join(COMPARED)), "load"),
        memories=_choice(
            tuple(comparison.MEMORIES), memories or ("memfd" if quick else ",".join(comparison.MEMORIES)), "memory"
        ),
        quick=quick,
        migrations=migrations or (10 if quick else 200),
        cases=_choice(tuple(switchover.CASES), cases, "case") or tuple(switchover.CASES),
        switchover_bytes=tuple(parse_size(size) for size in switchover_memory.split(",")),
        limit_seconds=limit,
        output=output,
        host=_host(),
    )
    chosen = _choice(tuple(SECTIONS), only, "section") or tuple(SECTIONS)
    try:
        status = uvloop.run(_measure(settings, chosen))
    except (KeyboardInterrupt, asyncio.CancelledError):
        settings.note("interrupted: namespaces, guests and huge pages were cleaned up; results so far are kept")
        status = 130
    sys.exit(status)


async def _measure(settings: Settings, chosen: tuple[str, ...]) -> int:
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # then everything is cleaned up
    failed = 0
    for name in chosen:
        try:
            section = await SECTIONS[name](settings)
        except (MigratedError, OSError, TimeoutError, subprocess.SubprocessError) as error:
            settings.note(f"{name}: {type(error).__name__}: {error}")
            failed = 1
            continue
        print(section.markdown(), flush=True)
    print(goals.table({name: section.data for name, section in settings.sections.items()}).markdown())
    print(f"results: {settings.output}/results.json")
    return failed


def _needs() -> tuple[tuple[str, bool], ...]:
    return (
        ("root", os.geteuid() == 0),
        ("KVM (/dev/kvm)", os.access("/dev/kvm", os.R_OK | os.W_OK)),
        ("network namespaces (ip)", Path("/proc/self/ns/net").exists()),
    )


def _host() -> dict[str, str | int]:
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB,
        "qemu": _qemu_version(),
        "loads": str(LOADS),
    }


def _qemu_version() -> str:
    try:
        said = subprocess.run([QEMU, "--version"], check=False, capture_output=True, text=True, timeout=30).stdout
    except OSError:
        said = ""
    found = re.search(r"version ([\d.]+)", said)
    return found[1] if found else "unknown"


if __name__ == "__main__":
    main()
