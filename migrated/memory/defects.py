"""Find the defects of the kernel's dirty tracking and their consequences for guests: second half of ``migrated check``.

The probes are in `migrated.memory.defect_probe`.  Each runs in a process of its own, on memory of its own: hanging or
crashing is an answer too.  docs/kernel.md explains what each of them tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal

#: A probe takes some tenths of a second, mostly to start Python; zeroing 1 GiB pages on a busy host takes seconds.
_LIMIT_SECONDS = 60.0
#: How long a killed process may take to exit.  One that hangs in the kernel never does.
_KILLED_SECONDS = 2.0
_ZAPS = ("zapped_", "punched_")
_COMMAND = (sys.executable, "-P", "-m", "migrated.memory.defect_probe")  # -P: nothing from the current directory

#: ``absent``: the kernel is correct; ``handled``: it is not, and the agents work around it; ``excludes``: some guests
#: cannot be migrated; ``untested``: unknown.
State = Literal["absent", "handled", "excludes", "untested"]
Facts = dict[str, bool | str]


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What a probe found.

    ``role``: the agent that it concerns; ``effect``: the consequence, empty if ``absent``.
    """

    name: str
    role: str
    state: State
    found: str
    effect: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """The answer of a probe that did not report facts."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Probe:
    key: str
    name: str
    role: str
    judge: Callable[[_Probe, Facts], Finding]
    guests: str  # which guests a failure excludes

    def finding(self, state: State, found: str, effect: str = "") -> Finding:
        return Finding(self.name, self.role, state, found, effect)


def _judge_tracking(probe: _Probe, facts: Facts) -> Finding:
    if not facts["exact"] or not facts["written_again"]:
        return probe.finding(
            "excludes", "written pages are not reported", f"{probe.guests} cannot be migrated from here"
        )
    found, effects = [], []
    if unseen := sorted({key.partition("_")[0] for key in facts if key.startswith(_ZAPS) and not facts[key]}):
        found.append(f"written, then {' or '.join(unseen)}: not reported")
        effects.append("the agent finds such pages by the markers that arming leaves")
    if not facts["rearmed"]:
        found.append("reported pages are not re-armed")
        effects.append("the agent re-arms them by UFFDIO_WRITEPROTECT")
    if not facts["engine"]:
        effect = f"{probe.guests} lose writes if they give memory back meanwhile (balloon, free page reporting)"
        return probe.finding("excludes", "; ".join(found) or "the agent misses pages that were zapped", effect)
    if found:
        return probe.finding("handled", "; ".join(found), "; ".join(effects))
    return probe.finding("absent", "exact, also of pages zapped after the write")


def _judge_mapped_over(probe: _Probe, facts: Facts) -> Finding:
    if facts["noticed"]:
        return probe.finding("absent", "a scan of it is refused")
    return probe.finding("excludes", "not noticed", f"{probe.guests} lose writes")


def _judge_locked(probe: _Probe, facts: Facts) -> Finding:
    if facts["emptied"] and facts["kept"]:
        return probe.finding("absent", "page tables are emptied, pages kept")
    found = "MADV_DONTNEED_LOCKED loses pages" if facts["emptied"] else "no MADV_DONTNEED_LOCKED (Linux 5.18)"
    return probe.finding("excludes", found, f"{probe.guests} are refused")


def _judge_hole(probe: _Probe, _facts: Facts) -> Finding:
    return probe.finding("absent", "comes back")


def _tracking(kind: str, label: str) -> _Probe:
    return _Probe(f"tracking-{kind}", f"tracking of {label}", "source", _judge_tracking, f"guests on {label}")


_PROBES = (
    _tracking("anonymous", "private memory"),
    _tracking("transparent", "private memory on transparent huge pages"),
    _tracking("shmem", "shared 4 KiB pages"),
    _tracking("2M", "2 MiB pages"),
    _tracking("1G", "1 GiB pages"),
    _Probe(
        "mapped-over",
        "memory mapped over while it is tracked",
        "source",
        _judge_mapped_over,
        "guests that remap memory",
    ),
    _Probe("locked", "unmapping locked memory", "target", _judge_locked, "incoming guests with mem-lock=on"),
)
_HOLE = _Probe("rearming-a-hole", "re-arming huge pages that are not there", "source", _judge_hole, "")
_HOLE_HANDLED = "the agent never has PAGEMAP_SCAN re-arm what is not there"


def findings(*, hanging: bool = False) -> list[Finding]:
    """Run the probes, all at the same time.

    ``hanging``: also run the one that leaves an unkillable process behind on some kernels.
    """
    answers = run([probe.key for probe in (*_PROBES, *([_HOLE] if hanging else []))])
    found = [_judged(probe, answers[probe.key]) for probe in _PROBES]
    return [*found, _judged_hole(answers.get(_HOLE.key))]


def _judged(probe: _Probe, answer: Facts | Failure) -> Finding:
    if isinstance(answer, Failure):
        return probe.finding("excludes", f"the probe {answer.text}", f"{probe.guests} cannot be migrated")
    if "untested" in answer:
        return probe.finding("untested", f"not tested: {answer['untested']}")
    return probe.judge(probe, answer)


def _judged_hole(answer: Facts | Failure | None) -> Finding:
    if answer is None:
        found = "not tested: `migrated check --hanging` tries it"
        return _HOLE.finding("untested", found, _HOLE_HANDLED)
    if isinstance(answer, Failure):
        return _HOLE.finding("handled", f"the probe {answer.text}", _HOLE_HANDLED)
    return _judged(_HOLE, answer)


def run(
    keys: Sequence[str], *, command: Sequence[str] = _COMMAND, limit_seconds: float = _LIMIT_SECONDS
) -> dict[str, Facts | Failure]:
    """Return each probe's answer, once all have answered, exited, or reached their common time limit."""
    started = {
        key: subprocess.Popen(
            [*command, key], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for key in keys
    }
    deadline = time.monotonic() + limit_seconds
    return {key: _answer(process, deadline, limit_seconds) for key, process in started.items()}


def _answer(process: subprocess.Popen[bytes], deadline: float, limit_seconds: float) -> Facts | Failure:
    try:
        output, _ = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return _end(process, limit_seconds)
    if process.returncode < 0:
        return Failure(f"was killed by signal {-process.returncode}")
    with contextlib.suppress(ValueError):
        answer = json.loads(output)
        if process.returncode == 0 and isinstance(answer, dict):
            return answer
    return Failure(f"exited with status {process.returncode}")


def _end(process: subprocess.Popen[bytes], limit_seconds: float) -> Failure:
    process.kill()
    if process.stdout is not None:
        process.stdout.close()
    try:
        process.wait(_KILLED_SECONDS)
    except subprocess.TimeoutExpired:
        return Failure(f"hangs in the kernel: process {process.pid} stays until the host is rebooted")
    return Failure(f"did not answer within {limit_seconds:g} s")
