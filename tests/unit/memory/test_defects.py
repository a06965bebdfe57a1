"""The probes of kernel defects: what they find here, and what is made of what they find elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from migrated.errors import PoolError
from migrated.memory import defect_probe, defects, memfd
from migrated.memory.defects import Facts, Failure, Finding

#: A probe that behaves as its name says.
CHILD = """
import json, os, signal, sys, time
name = sys.argv[1]
if name == "hangs":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    print("{", flush=True)
    while True:
        time.sleep(1)
if name == "crashes":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "fails":
    sys.exit("no reason")
print("nonsense" if name == "babbles" else json.dumps({"name": name}))
"""
AS_IT_SHOULD_BE: Facts = {
    "exact": True,
    "rearmed": True,
    "written_again": True,
    "zapped_category_mask": True,
    "zapped_category_anyof_mask": True,
    "engine": True,
}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    path = tmp_path / "probe.py"
    path.write_text(CHILD)
    return [sys.executable, "-S", str(path)]


def test_a_probe_that_answers_is_heard(command: list[str]) -> None:
    assert defects.run(["one", "two"], command=command) == {"one": {"name": "one"}, "two": {"name": "two"}}


def test_a_probe_imports_nothing_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a checkout, where the README has `migrated check` run, there is a package `migrated` without a C core.
    for module in ("migrated", "struct"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('this must not run')\n")
    monkeypatch.chdir(tmp_path)
    answer = defects.run(["mapped-over"])["mapped-over"]
    assert not isinstance(answer, Failure), answer


def test_a_probe_that_crashes_fails_or_babbles_is_an_answer(command: list[str]) -> None:
    answers = defects.run(["crashes", "fails", "babbles", "one"], command=command)
    assert answers == {
        "crashes": Failure("was killed by signal 11"),
        "fails": Failure("exited with status 1"),
        "babbles": Failure("exited with status 0"),
        "one": {"name": "one"},
    }


def test_a_probe_that_hangs_is_ended_and_the_others_are_heard(command: list[str]) -> None:
    # The one that answers is asked first, so that the limit cuts off nothing but the one that hangs.
    assert defects.run(["one"], command=command) == {"one": {"name": "one"}}
    assert defects.run(["hangs"], command=command, limit_seconds=0.2) == {
        "hangs": Failure("did not answer within 0.2 s")
    }


def test_a_probe_that_no_signal_ends_is_left(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        left: list[subprocess.Popen[bytes]] = []
        patched.setattr(defects, "_KILLED_SECONDS", 0.1)
        # Not left.append: what is no Python function is no method.
        patched.setattr("subprocess.Popen.kill", lambda process: left.insert(0, process))
        answer = defects.run(["hangs"], command=command, limit_seconds=0.2)["hangs"]
    (process,) = left
    process.kill()
    process.wait()
    assert answer == Failure(f"hangs in the kernel: process {process.pid} stays until the host is rebooted")


def judged(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Facts | Failure], *, hanging: bool = False
) -> dict[str, Finding]:
    """The findings if the probes answered so."""
    every: dict[str, Facts | Failure] = {
        **{f"tracking-{kind}": AS_IT_SHOULD_BE for kind in ("anonymous", "transparent", "shmem", "2M", "1G")},
        "mapped-over": {"noticed": True},
        "locked": {"emptied": True, "kept": True},
        "rearming-a-hole": {"hangs": False},
        **answers,
    }
    asked: list[str] = []

    def run(keys: list[str]) -> dict[str, Facts | Failure]:
        asked.extend(keys)
        return {key: every[key] for key in keys}

    monkeypatch.setattr(defects, "run", run)
    found = {finding.name: finding for finding in defects.findings(hanging=hanging)}
    assert ("rearming-a-hole" in asked) == hanging
    assert set(asked) | {"rearming-a-hole"} == set(defect_probe.PROBES)
    return found


def test_a_kernel_without_defects(monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(monkeypatch, {}, hanging=True)
    assert {finding.state for finding in found.values()} == {"absent"}
    assert not any(finding.effect for finding in found.values())


@pytest.mark.parametrize(
    ("facts", "state", "says"),
    [
        ({"zapped_category_mask": False}, "handled", "finds such pages"),
        ({"rearmed": False}, "handled", "UFFDIO_WRITEPROTECT"),
        (
            {"zapped_category_mask": False, "engine": False},
            "excludes",
            "guests on 2 MiB pages lose writes if they give",
        ),
        ({"engine": False}, "excludes", "guests on 2 MiB pages lose writes"),
        ({"exact": False}, "excludes", "guests on 2 MiB pages cannot be migrated"),
        ({"written_again": False}, "excludes", "guests on 2 MiB pages cannot be migrated"),
    ],
)
def test_each_defect_of_tracking_is_told_with_what_follows(
    monkeypatch: pytest.MonkeyPatch, facts: Facts, state: str, says: str
) -> None:
    found = judged(monkeypatch, {"tracking-2M": {**AS_IT_SHOULD_BE, **facts}})
    assert found["tracking of 2 MiB pages"].state == state
    assert says in found["tracking of 2 MiB pages"].effect
    assert found["tracking of private memory"].state == "absent"


@pytest.mark.parametrize(
    ("answers", "name", "state", "says"),
    [
        ({"tracking-1G": {"untested": "no free 1G pages"}}, "tracking of 1 GiB pages", "untested", "no free 1G pages"),
        ({"tracking-2M": Failure("was killed by signal 9")}, "tracking of 2 MiB pages", "excludes", "signal 9"),
        ({"mapped-over": {"noticed": False}}, "memory mapped over while it is tracked", "excludes", "not noticed"),
        ({"locked": {"emptied": False, "kept": True}}, "unmapping locked memory", "excludes", "MADV_DONTNEED_LOCKED"),
        ({"locked": {"emptied": True, "kept": False}}, "unmapping locked memory", "excludes", "loses pages"),
    ],
)
def test_what_else_is_found(
    monkeypatch: pytest.MonkeyPatch, answers: dict[str, Facts | Failure], name: str, state: str, says: str
) -> None:
    finding = judged(monkeypatch, answers)[name]
    assert finding.state == state
    assert says in finding.found


def test_the_hang_is_tried_only_on_request_and_excludes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "re-arming huge pages that are not there"
    assert judged(monkeypatch, {})[name].state == "untested"
    hung = judged(monkeypatch, {"rearming-a-hole": Failure("hangs in the kernel")}, hanging=True)[name]
    assert (hung.state, hung.found) == ("handled", "the probe hangs in the kernel")


# ---------------------------------------------------------------- this kernel


def facts_here(key: str) -> Facts:
    answer = defects.run([key])[key]
    assert isinstance(answer, dict)
    if "untested" in answer:
        pytest.skip(str(answer["untested"]))
    return answer


@pytest.mark.parametrize("kind", ["anonymous", "transparent", "shmem"])
def test_small_pages_are_tracked_here(kind: str) -> None:
    facts = facts_here(f"tracking-{kind}")
    assert facts["exact"]
    assert facts["written_again"]
    assert facts["engine"]


@pytest.mark.root
@pytest.mark.hugepages
def test_huge_pages_are_tracked_here(huge_pages: Callable[[int], None]) -> None:
    huge_pages(4)
    facts = facts_here("tracking-2M")
    assert facts["exact"]
    assert facts["written_again"]
    assert facts["engine"]  # whatever the kernel reports of zapped pages


def test_a_mapping_put_over_tracked_memory_is_noticed_here() -> None:
    assert facts_here("mapped-over")["noticed"]


def test_locked_memory_can_be_unmapped_here() -> None:
    assert facts_here("locked") == {"emptied": True, "kept": True}


def test_without_huge_pages_nothing_is_said_of_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exit_here(status: int) -> None:
        assert status == 0

    def refuse(*_: object) -> int:
        raise PoolError("none")

    monkeypatch.setattr(os, "_exit", exit_here)
    monkeypatch.setattr(memfd, "allocate", refuse)
    defect_probe.main("tracking-2M")
    assert json.loads(capsys.readouterr().out) == {"untested": "no free 2M pages"}
