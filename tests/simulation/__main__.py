"""Run many schedules, or repeat one.

python -m tests.simulation --schedules 10000          seeds 0 …, on all processors
python -m tests.simulation --seed 4711 --keep 0,2     one seed, reduced to these actions, with its trace
"""

from __future__ import annotations

import argparse
import os
import sys

from tests.simulation.run import attempt, explain, kind_of, run_many
from tests.simulation.schedule import Schedule, draw_schedule


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seconds", type=float, help="end after so long")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="only this one, with its trace")
    parser.add_argument("--keep", help="only these of its actions: numbers, or none")
    parser.add_argument("--explain", type=int, default=10, help="so many of the failing seeds")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        schedule = draw_schedule(arguments.seed)
        if arguments.keep:
            chosen = [] if arguments.keep == "none" else [int(one) for one in arguments.keep.split(",")]
            schedule = Schedule(schedule.seed, tuple(schedule.actions[one] for one in chosen))
        problem, world = attempt(schedule, trace=True)
        print("\n".join(world.lines))
        print(problem or "nothing was violated")
        return int(problem is not None)
    total = run_many(arguments.first, arguments.schedules, arguments.processes, arguments.seconds)
    kinds: dict[str, list[int]] = {}
    for seed, problem in total["failing"]:
        kinds.setdefault(kind_of(problem), []).append(seed)
    for kind, seeds in sorted(kinds.items(), key=lambda item: item[1][0]):
        print(f"{len(seeds)} times, first after {seeds[0] - arguments.first + 1} schedules: {kind}", file=sys.stderr)
    for seeds in list(kinds.values())[: arguments.explain]:
        print(explain(seeds[0]), file=sys.stderr)
    print(
        f"{dict(total['figures'])}, {len(total['states'])} states, {len(total['failing'])} failing, {total['seconds']:.1f} s"
    )
    return int(bool(total["failing"]))


if __name__ == "__main__":
    sys.exit(main())
