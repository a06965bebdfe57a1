"""What an agent was doing, on disk: whole or not at all, and believed only when there is every reason to."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from migrated.errors import ConfigError, HostError
from migrated.recovery import state
from migrated.recovery.journal import Journal, JournalError, SourceEntry, TargetEntry
from tests.rig import supervisor
from tests.unit.recovery.entries import SOURCE, TARGET

Edit = Callable[[dict[str, Any]], None]
ID = "00010203"


@pytest.fixture
def journal(tmp_path: Path) -> Journal[TargetEntry]:
    return Journal(tmp_path / "journal", TargetEntry)


def path_of(journal: Journal[TargetEntry]) -> Path:
    return journal.directory / f"{ID}.journal"


def names(journal: Journal[TargetEntry]) -> list[str]:
    return sorted(entry.name for entry in journal.directory.iterdir())


@pytest.mark.parametrize("memory", [True, False], ids=["tmpfs", "disk"])
async def test_only_what_may_wait_for_a_device_is_handed_to_a_thread(
    journal: Journal[TargetEntry], monkeypatch: pytest.MonkeyPatch, memory: bool
) -> None:
    threads: list[Callable[..., object]] = []

    async def in_thread(work: Callable[..., object], *arguments: object) -> object:
        threads.append(work)
        return work(*arguments)

    monkeypatch.setattr(state, "in_thread", in_thread)
    monkeypatch.setattr("migrated.recovery.journal._on_tmpfs", lambda _: memory)
    await state.RecoveryState(journal, cast("Any", None), ID).write(TARGET)
    assert len(threads) == (not memory)
    assert journal.find(ID) == TARGET


def test_a_tmpfs_is_told_from_other_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr("migrated.recovery.journal.MOUNTS", mounts)
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /run rw,nosuid shared:5 -"
    for kind, memory in (("tmpfs tmpfs rw", True), ("ext4 /dev/tmpfs rw", False)):
        mounts.write_text(f"21 20 0:5 / /proc rw - proc proc rw\n{line} {kind}\n")
        assert Journal(tmp_path, TargetEntry).in_memory is memory
    mounts.write_text("")
    assert not Journal(tmp_path, TargetEntry).in_memory
    assert not Journal(tmp_path / "mountinfo" / "below", TargetEntry).in_memory


def loaded(journal: Journal[TargetEntry]) -> tuple[dict[str, TargetEntry], list[str]]:
    """The entries that are believed, and what was said of the others."""
    with capture_logs() as logs:
        entries = journal.load()
    return entries, [log["problem"] for log in logs]


def test_an_entry_comes_back_as_it_was(journal: Journal[TargetEntry], tmp_path: Path) -> None:
    journal.write(ID, TARGET)
    assert loaded(journal) == ({ID: TARGET}, [])
    source = Journal(tmp_path / "other", SourceEntry)
    source.write("a", SOURCE)
    source.write("b", SOURCE)
    assert source.load() == {"a": SOURCE, "b": SOURCE}


def test_an_agent_that_does_not_trace_writes_what_those_before_it_can_read(tmp_path: Path) -> None:
    for entry, kind in ((SOURCE, SourceEntry), (TARGET, TargetEntry)):
        here: Journal[Any] = Journal(tmp_path / kind.__name__, kind)
        here.write(ID, entry)
        assert b"traceparent" not in path_of(here).read_bytes()


def test_it_is_nobody_elses_to_read(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)  # it holds the token
    assert journal.directory.stat().st_mode & 0o777 == 0o700
    assert path_of(journal).stat().st_mode & 0o777 == 0o600


def test_no_directory_is_no_entries(journal: Journal[TargetEntry]) -> None:
    assert loaded(journal) == ({}, [])


def test_an_entry_is_replaced_whole(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    before = path_of(journal).open("rb")
    with before:
        was = os.fstat(before.fileno()).st_size
        later = TargetEntry(hello=TARGET.hello, stage="running", peer="elsewhere:1")
        journal.write(ID, later)
        assert os.fstat(before.fileno()).st_nlink == 0  # another file has its name now
        assert len(before.read()) == was
    assert journal.load() == {ID: later}
    assert names(journal) == [f"{ID}.journal"]


def test_a_removed_entry_is_gone_and_removing_it_twice_is_fine(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    journal.remove(ID)
    journal.remove(ID)
    assert loaded(journal) == ({}, [])


def rewrite(journal: Journal[TargetEntry], edit: Edit) -> None:
    """Change the entry and make its checksum fit."""
    table = json.loads(path_of(journal).read_bytes().partition(b"\n")[2])
    edit(table)
    body = json.dumps(table).encode()
    path_of(journal).write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body + b"\n")


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda table: table.update(version=1), "of version 1, this agent reads 2"),
        (lambda table: table["entry"].update(pid="many"), "Expected `int`"),
        (lambda table: table["entry"].update(of_a_later_version=1), "unknown field"),
        (lambda table: table["entry"].pop("hello"), "missing required field"),
        (lambda table: table.pop("entry"), "missing required field"),
    ],
    ids=["version", "type", "unknown", "lacking", "no-entry"],
)
def test_what_another_version_wrote_stays_until_that_version_reads_it(
    journal: Journal[TargetEntry], edit: Edit, problem: str
) -> None:
    journal.write(ID, TARGET)
    rewrite(journal, edit)
    for _ in range(2):
        with pytest.raises(ConfigError, match=problem) as refusal:
            journal.load()
        assert refusal.value.code == "journal-version"
    assert names(journal) == [f"{ID}.journal"]
    assert journal.find(ID) is None


def test_what_was_before_the_last_boot_is_reported_and_set_aside(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    rewrite(journal, lambda table: table.update(boot_id="another"))
    entries, problems = loaded(journal)
    assert entries == {}
    assert len(problems) == 1
    assert "before the last boot" in problems[0]
    assert names(journal) == [f"{ID}.refused"]
    assert journal.refused() == {ID}
    assert loaded(journal) == ({}, [])  # said once


def test_an_entry_that_cannot_be_read_now_is_neither_believed_nor_set_aside(
    journal: Journal[TargetEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.write(ID, TARGET)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", out_of_descriptors)
        with pytest.raises(HostError, match="cannot be read"):
            journal.load()
    assert journal.load() == {ID: TARGET}


def out_of_descriptors(_: Path) -> bytes:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_what_was_half_written_is_swept(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    (journal.directory / f"{ID}.new").write_bytes(b"half")
    journal.remove_leftovers()
    assert names(journal) == [f"{ID}.journal"]


@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_any_flipped_bit_is_noticed(journal: Journal[TargetEntry], position: str) -> None:
    journal.write(ID, TARGET)
    data = bytearray(path_of(journal).read_bytes())
    index = {"first": 0, "middle": len(data) // 2, "last": len(data) - 3}[position]
    data[index] ^= 1
    path_of(journal).write_bytes(data)
    entries, problems = loaded(journal)
    assert entries == {}
    assert "corrupt" in problems[0]


def test_every_truncation_is_noticed(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    whole = path_of(journal).read_bytes()
    for length in [*range(70), *range(70, len(whole) - 1, 37), len(whole) - 2]:
        path_of(journal).write_bytes(whole[:length])
        entries, problems = loaded(journal)
        assert entries == {}
        assert len(problems) == 1
    path_of(journal).write_bytes(whole[:-1])  # the last line's end says nothing
    assert journal.load() == {ID: TARGET}


def test_one_bad_entry_takes_no_other_with_it(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    journal.write("ffff", TARGET)
    path_of(journal).write_bytes(b"\xff" * 10)
    entries, problems = loaded(journal)
    assert list(entries) == ["ffff"]
    assert len(problems) == 1


def test_a_write_that_was_cut_short_leaves_the_entry_before(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    (journal.directory / f"{ID}.new").write_bytes(b"half an ent")  # what a crash leaves
    assert journal.load() == {ID: TARGET}


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few pages."""
    mount = tmp_path / "tiny"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(mount)], capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    with supervisor.undoing("umount", "-l", str(mount)):
        yield mount
        subprocess.run(["umount", str(mount)], check=True, timeout=30)


@pytest.mark.root
def test_a_full_disk_is_an_error_and_the_entry_before_stays(tiny: Path) -> None:
    journal = Journal(tiny / "journal", TargetEntry)
    journal.write(ID, TARGET)
    size = tiny / "filler"
    with pytest.raises(OSError, match="No space"):
        size.write_bytes(bytes(1 << 16))
    later = TargetEntry(hello=TARGET.hello, stage="running", peer="elsewhere:1")
    with pytest.raises(HostError, match="No space left") as caught:
        journal.write(ID, later)
    assert caught.value.code == "journal"
    assert caught.value.hint
    assert names(journal) == [f"{ID}.journal"]
    assert journal.load() == {ID: TARGET}
    size.unlink()
    journal.write(ID, later)
    assert journal.load() == {ID: later}


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("a file")
    with pytest.raises(HostError, match="cannot be written"):
        Journal(tmp_path / "journal", TargetEntry).write(ID, TARGET)


def test_a_closed_entry_is_only_an_answer(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    journal.close(ID)
    assert loaded(journal) == ({}, [])
    assert journal.find(ID) is None
    assert journal.closed(ID) == TARGET
    journal.remove_leftovers()
    assert names(journal) == [f"{ID}.done"]
    journal.remove(ID)
    assert names(journal) == []


def test_answers_for_peers_of_before_the_last_boot_are_swept(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    rewrite(journal, lambda table: table.update(boot_id="another"))
    journal.close(ID)
    journal.remove_leftovers()
    assert names(journal) == []


def test_an_answer_that_another_version_wrote_stays_until_that_version_reads_it(journal: Journal[TargetEntry]) -> None:
    """Without it, a source that asks late is told that nothing is known of its guest."""
    journal.write(ID, TARGET)
    rewrite(journal, lambda table: table.update(version=99))
    journal.close(ID)
    for _ in range(2):
        with pytest.raises(ConfigError, match="version 99") as refusal:
            journal.remove_leftovers()
        assert refusal.value.code == "journal-version"
    assert names(journal) == [f"{ID}.done"]


def test_an_answer_that_cannot_be_read_now_stays(
    journal: Journal[TargetEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.write(ID, TARGET)
    journal.close(ID)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", out_of_descriptors)
        with pytest.raises(HostError, match="cannot be read"):
            journal.remove_leftovers()
    assert journal.closed(ID) == TARGET


def test_what_another_version_wrote_before_the_last_boot_is_in_nobodys_way(journal: Journal[TargetEntry]) -> None:
    journal.write(ID, TARGET)
    rewrite(journal, lambda table: table.update(version=99, boot_id="another"))
    entries, problems = loaded(journal)
    assert (entries, len(problems)) == ({}, 1)
    assert names(journal) == [f"{ID}.refused"]


@pytest.mark.parametrize(("call", "replaced"), [("open", False), ("fsync", False), ("replace", False)])
def test_a_write_that_fails_says_whether_it_is_found_nevertheless(
    journal: Journal[TargetEntry], monkeypatch: pytest.MonkeyPatch, call: str, replaced: bool
) -> None:
    journal.write(ID, TARGET)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "replace" else os, call, fail)
        with pytest.raises(JournalError) as failure:
            journal.write(ID, TargetEntry(hello=TARGET.hello, stage="running", peer="elsewhere:1"))
    assert failure.value.replaced is replaced
    assert journal.find(ID) == TARGET
