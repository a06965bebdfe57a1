"""A guest moves back and forth under random failures: ``make soak``, or ``python -m tests.faults.soak --seconds 600``.

Every round is a migration of its own choosing (mode, stage, failure, pages, rate), drawn from a seed; the same seed draws the
same rounds again.  After each the guest checks all its memory, in the one place where it runs, and nothing may be left behind.
The first loss ends it, with the seed, the round and both logs; exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import random
import sys
import time
from pathlib import Path

from migrated.demo.pair import short_directory
from migrated.demo.pool import huge_pages
from tests.faults.cases import FAILURES, FITS, STAGES, run_case
from tests.faults.rig import Rig, build_guest, rig
from tests.rig import supervisor

#: Of a hundred rounds, so many are migrations that nothing happens to.
QUIET_PERCENT = 15
#: A rig is made anew, with other pages, after so many rounds.
ROUNDS_A_RIG = 40
#: Source, target, and one that is on its way out, of 16 MiB each.
POOL_BYTES = 64 << 20
RATES = (0, 500, 2000, 8000)


class Tally:
    """What was done."""

    def __init__(self) -> None:
        self.rounds = 0
        self.failures: collections.Counter[str] = collections.Counter()
        self.stages: collections.Counter[str] = collections.Counter()

    def summary(self, seed: int, seconds: float) -> str:
        """For people."""
        failures = ", ".join(f"{name} {count}" for name, count in self.failures.most_common())
        stages = ", ".join(f"{name} {count}" for name, count in self.stages.most_common())
        return (
            f"seed {seed}: {self.rounds} migrations in {seconds:.0f} s, {sum(self.failures.values())} failures, "
            f"nothing lost\n  failures: {failures or 'none'}\n  stages: {stages or 'none'}"
        )


async def one_round(made: Rig, draw: random.Random, tally: Tally) -> None:
    """One migration.  Everything is drawn before anything happens."""
    stage = draw.choice(list(STAGES.values()))
    name = draw.choice([name for name in FAILURES if FITS[name](stage)])
    mode, rate = draw.choice(stage.modes), draw.choice(RATES)
    quiet = draw.randrange(100) < QUIET_PERCENT
    what = "nothing" if quiet else f"{name} at {stage.name}"
    sys.stdout.write(f"{tally.rounds + 1:5d}  {mode:8s}  {rate:5d}/s  {what}\n")
    sys.stdout.flush()
    guest = await made.sound()
    await made.ask(guest, f"rate {rate}")
    if quiet:
        record = await made.migrate(mode=mode, downtime_limit_ms=300.0)
        # Under mode precopy a guest that writes too fast stays, and says so.
        code = (record.get("error") or {}).get("code")
        if record.get("state") != "completed" and code != "not-converging":
            raise AssertionError(f"{record}\n{made.logs()}")
        await made.sound()
    else:
        # The stage needs rounds that end: the wildest rate is for where it is not in the way.
        if rate == 0 and mode == "precopy":
            await made.ask(guest, "rate 2000")
        await run_case(made, mode, stage.name, name)
        tally.failures[name] += 1
        tally.stages[stage.name] += 1
    tally.rounds += 1


async def soak(seconds: float, seed: int, program: Path) -> Tally:
    """Until the time is over; AssertionError or MigratedError at the first loss."""
    tally = Tally()
    until = time.monotonic() + seconds
    rigs = 0
    while time.monotonic() < until:
        # A rig's rounds depend on the seed and its number alone, not on what went before.
        draw = random.Random(f"{seed}/{rigs}")
        pages = draw.choice(("4K", "4K", "2M")) if os.access("/proc/sys/vm/nr_hugepages", os.W_OK) else "4K"
        rigs += 1
        sys.stdout.write(f"rig {rigs} on {pages} pages\n")
        async with contextlib.AsyncExitStack() as stack:
            if pages == "2M":
                stack.enter_context(huge_pages(POOL_BYTES, 2 << 20))
            made = await stack.enter_async_context(rig(program, pages=pages))
            for _ in range(ROUNDS_A_RIG):
                if time.monotonic() >= until:
                    break
                try:
                    await one_round(made, draw, tally)
                except BaseException:
                    sys.stdout.write(f"LOST in round {tally.rounds + 1} of seed {seed}, rig {rigs}\n{made.logs(200)}\n")
                    raise
    return tally


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SOAK_SECONDS", "600")))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("SOAK_SEED", "0")) or None)
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1, 1 << 32)
    started = time.monotonic()
    sys.stdout.write(f"SOAK_SEED={seed} repeats this run\n")
    supervisor.start()
    with supervisor.directory("mg-", short_directory()) as directory:
        try:
            tally = asyncio.run(soak(options.seconds, seed, build_guest(directory)))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a loss
            sys.stdout.write(f"FAILED with seed {seed}: {type(error).__name__}: {error}\n")
            return 1
    sys.stdout.write(tally.summary(seed, time.monotonic() - started) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
