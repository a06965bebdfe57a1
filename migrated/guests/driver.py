"""The driver contract: what an agent asks of a guest, whatever kind of guest it is.

A *driver* has two classes: one for the side where the guest already runs (`SourceGuest`) and one for the side where it is
to run (`TargetGuest`).  The agent calls the methods in the order written here, never two at a time (`died` excepted, which
runs beside everything).  Every method raises `GuestError` (or `GuestRefusedError`, when the guest cannot be moved as it
is) with a code, a message that names the guest, and a hint.  No method may hang: each has a limit of its own.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Protocol

from migrated.memory.regions import Mapping, Region, SourceMemory, TargetMemory

#: Plain values of a driver's own, kept in the journal.
Memento = dict[str, int | str | bool]
#: What a driver's source side tells its target side before anything is transferred: plain values, checked by the target.
Description = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class FaultSource:
    """The incoming guest's userfaultfd and where its memory is mapped.

    UFFDIO_API done, the mappings registered MISSING|MINOR, no page of them in the process's page tables.  Not WP: to lift
    it, unregistering would walk all of the running guest's page tables.  ``uffd`` belongs to the driver (closed in
    `TargetGuest.close`); the guest process holds a descriptor of its own, so that our death leaves its threads waiting.
    """

    pid: int
    uffd: int
    mappings: tuple[Mapping, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Outline:
    """What a list of guests says of one: its run state, and the memory that its owner gave it."""

    state: str
    memory_bytes: int


class StateChannel(Protocol):
    """Byte pipe for the guest state (what is not memory), both ways, to the same driver on the other host."""

    async def read(self) -> bytes:
        """Next bytes from the peer's driver, at most 1 MiB; ``b""`` at its end of stream.  Raises ConnectionLostError."""
        ...

    async def write(self, data: bytes) -> None:
        """Send bytes to the peer's driver.  Raises ConnectionLostError."""
        ...

    async def close_write(self) -> None:
        """End of our stream."""
        ...


class SourceGuest(abc.ABC):
    """A guest running here, to be moved away."""

    #: ``time.monotonic()`` when the guest stopped, set by `pause` where the driver knows it better than its caller.
    paused_at: float | None = None
    #: Likewise, when it stood still: what `pause` did after that was saving its state.
    stopped_at: float | None = None

    @abc.abstractmethod
    async def open(self) -> SourceMemory:
        """Connect, inspect, refuse by name what cannot be moved.  Changes nothing in the guest."""

    def describe(self) -> Description:
        """After `open`: what the target's driver compares with its own guest.  Travels in the hello."""
        return {}

    @abc.abstractmethod
    async def outline(self) -> Outline:
        """Return what is known of the guest after `open`, also if `open` refused it.  Changes nothing in the guest."""

    @property
    @abc.abstractmethod
    def needs_quiesced_scans(self) -> bool:
        """Whether buffers may be pinned (direct I/O): then pre-copy ends with a quiesced scan of its own (design, 5)."""

    @abc.abstractmethod
    async def tracking_uffd(self) -> int:
        """A userfaultfd of the guest process, UFFDIO_API done with tracking; owned by the driver.

        QEMU: made by injection; process: handed over by the client.  Until `release_tracking`.
        """

    @abc.abstractmethod
    async def release_tracking(self) -> None:
        """Close the descriptor here and in the guest process.  Idempotent; also works on a dead guest."""

    @abc.abstractmethod
    async def quiesce(self) -> None:
        """Stop the guest with none of its I/O in flight, for a moment."""

    @abc.abstractmethod
    async def unquiesce(self) -> None:
        """Run on after `quiesce`."""

    @abc.abstractmethod
    async def pause(self, channel: StateChannel) -> None:
        """Stop the guest for good, I/O drained: its memory is frozen when this returns.

        Whatever saving the guest state may write to memory has been written by then.  The state may be sent already: loading it
        on the target then overlaps with the last scan.
        """

    @abc.abstractmethod
    async def send_state(self, channel: StateChannel) -> None:
        """Send what is left of the guest state, and see that the guest is still stopped.

        Returns when the peer's driver has all of it (the target then reports `Loaded`).
        """

    @abc.abstractmethod
    async def resume(self) -> None:
        """After a failure before COMMIT: run on here, whatever was done before.

        Called only when the target's guest is known dead or was never able to run.
        """

    @abc.abstractmethod
    async def release(self) -> None:
        """After `done`: the guest runs elsewhere and needs nothing of ours; end what is left of it here."""

    @abc.abstractmethod
    def memento(self) -> Memento:
        """What a restarted agent needs to take this guest up again (`reclaim`, `adopt`), beside its pid and memory."""

    @abc.abstractmethod
    async def reclaim(self, memento: Memento) -> None:
        """In a new object, after the agent was restarted before COMMIT: run on here, untracked, whatever was under way."""

    @abc.abstractmethod
    async def adopt(self, pid: int, memento: Memento) -> None:
        """In a new object, after the agent was restarted after COMMIT: so that `release` and `died` work.

        ``pid`` may have ended meanwhile; its memory is in other hands.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of descriptors and connections.  Does not touch the guest.  Idempotent."""

    @abc.abstractmethod
    async def died(self) -> str:
        """Wait until the guest process has ended; returns how, for people ("exited with status 1")."""


class TargetGuest(abc.ABC):
    """A guest that is to run here."""

    @abc.abstractmethod
    async def check(self, regions: tuple[Region, ...], description: Description) -> None:
        """Refuse what cannot work (region names or sizes that differ, missing command) before memory is reserved.

        ``regions`` and ``description`` are the source's; names and sizes must fit ours.
        """

    @abc.abstractmethod
    async def start(self, memory: tuple[TargetMemory, ...]) -> FaultSource:
        """Start (or find) the guest process on this memory, ready to take the guest state, not running."""

    @abc.abstractmethod
    async def load_state(self, channel: StateChannel) -> None:
        """Take the guest state from the channel; returns when it is loaded.

        The agent calls it at the start and runs it beside the pre-copy: bytes may arrive early.  Loading may touch guest
        memory, which waits until the agent has the stale map.
        """

    @abc.abstractmethod
    async def resume(self) -> None:
        """Run.  Called after COMMIT only; again if the agent was restarted in between (idempotent)."""

    @abc.abstractmethod
    async def release(self) -> None:
        """Every page is current and the range unregistered: close the descriptor in the guest process too."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """End the guest process (before COMMIT only) and wait until it is gone.  Idempotent."""

    async def end_left_over(self) -> None:  # noqa: B027 - most leave nothing but their process
        """In a new object, after the agent was restarted before the guest was loaded: what `kill` would end beside the process."""

    @abc.abstractmethod
    def memento(self) -> Memento:
        """What a restarted agent needs to take this guest up again (`adopt`), beside its pid, memory and userfaultfd."""

    @abc.abstractmethod
    async def adopt(self, pid: int, uffd: int, memory: tuple[TargetMemory, ...], memento: Memento) -> FaultSource:
        """In a new object, after the agent was restarted: take back the guest process.  ``uffd`` becomes the driver's.

        Must not wait for the guest: it may be waiting for a page.  GuestError ``guest-gone`` when ``pid`` is not it.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of descriptors and connections.  Does not touch the guest process.  Idempotent."""

    @abc.abstractmethod
    async def died(self) -> str:
        """Wait until the guest process has ended; returns how, for people."""
