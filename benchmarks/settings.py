"""Settings of one benchmark run, and the output of its results."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

from benchmarks.report import Section, distribution, milliseconds, seconds, svg
from benchmarks.sample import Sample

MIB = 1 << 20


@dataclasses.dataclass
class Settings:
    """Settings from the command line."""

    quick: bool
    runs: int
    slow_runs: int  # on the 1 Gbit/s link
    memory_bytes: int
    paths: tuple[str, ...]
    loads: tuple[str, ...]
    memories: tuple[str, ...]  # of `comparison`
    limit_seconds: float  # of one migration
    large_bytes: int  # the larger guest of `downtime`
    migrations: int  # of each case of `switchover`
    cases: tuple[str, ...]  # of `switchover`
    switchover_bytes: tuple[int, ...]  # sizes of its guests
    output: Path
    host: dict[str, str | int]
    sections: dict[str, Section] = dataclasses.field(default_factory=dict)
    started: float = dataclasses.field(default_factory=time.monotonic)

    def runs_on(self, path: str) -> int:
        """Return the number of migrations per figure on this path."""
        return self.slow_runs if path == "1g" else self.runs

    def say(self, path: str, load: str, system: str, number: int, sample: Sample) -> None:
        """Print one line per migration."""
        good = "memory verified" if sample.verified else "MEMORY NOT VERIFIED"
        what = (
            f"{seconds(sample.total_seconds)}, down {milliseconds(sample.downtime_seconds)}, "
            f"stall {milliseconds(sample.stall_seconds)}, {good}"
            if sample.outcome == "completed"
            else sample.outcome.splitlines()[0]
        )
        self.note(f"{path} {load} {system} {number + 1}: {what}")

    def note(self, text: str) -> None:
        """Print a line of progress."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", file=sys.stderr, flush=True)

    def save(self, section: Section) -> None:
        """Write all results so far, so that an interrupted run keeps them."""
        self.sections[section.name] = section
        self.output.mkdir(parents=True, exist_ok=True)
        data = {
            "host": self.host,
            "runs": self.runs,
            "sections": {name: dataclasses.asdict(one) for name, one in self.sections.items()},
        }
        (self.output / "results.json").write_text(json.dumps(data, indent=1))
        (self.output / "results.md").write_text("\n".join(one.markdown() for one in self.sections.values()))
        if "comparison" in self.sections:
            (self.output / "comparison.svg").write_text(svg(self.sections["comparison"].data))
        if "switchover" in self.sections:
            cases = self.sections["switchover"].data
            downtimes = {case["title"]: [one["downtime_seconds"] for one in case["samples"]] for case in cases}
            known = {title: [value for value in values if value is not None] for title, values in downtimes.items()}
            (self.output / "downtime.svg").write_text(distribution(known))
