"""Define the driver contract: what an agent asks of a guest of any kind.

A *driver* has two classes: one for the host where the guest already runs (`SourceGuest`) and one for the host that
takes it over (`TargetGuest`).  The agent calls the methods in the order written here and never two at a time, except
`died`, which runs beside all others.  Every method raises `GuestError` (or `GuestRefusedError`, when the guest cannot
be moved as it is) with a code, a message that names the guest, and a hint.  No method may hang: each has a time limit
of its own.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, Protocol

from migrated.memory.regions import Mapping, Region, SourceMemory, TargetMemory

#: Plain values that belong to one driver.  The agent keeps them in the journal.
Memento = dict[str, int | str | bool]
#: What a driver's source side sends to its target side before any transfer: plain values, which the target checks.
Description = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class FaultSource:
    """The incoming guest's userfaultfd and the addresses where its memory is mapped.

    UFFDIO_API is done, the mappings are registered MISSING|MINOR, and the process's page tables hold none of their
    pages.  They are not registered WP: to lift it, unregistering would walk all page tables of the running guest.
    ``uffd`` belongs to the driver, which closes it in `TargetGuest.close`.  The guest process holds a descriptor of its
    own, so that its threads keep waiting when the agent dies.
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
    """A two-way byte pipe to the same driver on the other host, for the guest state (everything except memory)."""

    async def read(self) -> bytes:
        """Return the peer's next bytes, at most 1 MiB; ``b""`` at end of stream.  Raises ConnectionLostError."""
        ...

    async def write(self, data: bytes) -> None:
        """Send bytes to the peer's driver.  Raises ConnectionLostError."""
        ...

    async def close_write(self) -> None:
        """End our stream."""
        ...


class SourceGuest(abc.ABC):
    """A guest that runs here and is to move away."""

    #: ``time.monotonic()`` when the guest stopped.  `pause` sets it where the driver knows it better than the caller.
    paused_at: float | None = None
    #: The same clock when the guest stood still.  After that, `pause` was saving the guest's state.
    stopped_at: float | None = None

    @abc.abstractmethod
    async def open(self) -> SourceMemory:
        """Connect, inspect, and refuse by name what cannot be moved.  Change nothing in the guest."""

    def describe(self) -> Description:
        """Return what the target's driver compares with its own guest.  Call after `open`; it travels in the hello."""
        return {}

    @abc.abstractmethod
    async def outline(self) -> Outline:
        """Return what is known of the guest after `open`, also if `open` refused it.  Changes nothing in the guest."""

    @property
    @abc.abstractmethod
    def needs_quiesced_scans(self) -> bool:
        """Whether buffers may be pinned (direct I/O): pre-copy then ends with its own quiesced scan (design, 5)."""

    @abc.abstractmethod
    async def tracking_uffd(self) -> int:
        """Return a userfaultfd of the guest process; UFFDIO_API is done, with tracking.

        QEMU: made by injection; process: handed over by the client.  The driver owns it until `release_tracking`.
        """

    @abc.abstractmethod
    async def release_tracking(self) -> None:
        """Close the descriptor here and in the guest process.  Idempotent; also works on a dead guest."""

    @abc.abstractmethod
    async def quiesce(self) -> None:
        """Stop the guest for a moment, with none of its I/O in flight."""

    @abc.abstractmethod
    async def unquiesce(self) -> None:
        """Let the guest run on after `quiesce`."""

    @abc.abstractmethod
    async def pause(self, channel: StateChannel) -> None:
        """Stop the guest for good and drain its I/O: its memory is frozen when this returns.

        Whatever saving the guest state may write to memory has been written by then.  A driver may already send the
        state here: loading it on the target then overlaps with the last scan.
        """

    @abc.abstractmethod
    async def send_state(self, channel: StateChannel) -> None:
        """Send the rest of the guest state, and check that the guest is still stopped.

        Returns when the peer's driver has all of it (the target then reports `Loaded`).
        """

    @abc.abstractmethod
    async def resume(self) -> None:
        """Run the guest on here after a failure before COMMIT, whatever was done before.

        The agent calls this only when the target's guest is known to be dead or was never able to run.
        """

    @abc.abstractmethod
    async def release(self) -> None:
        """After `done`, end what is left of the guest here: it runs elsewhere and needs nothing of ours."""

    @abc.abstractmethod
    def memento(self) -> Memento:
        """Return what a restarted agent needs beside pid and memory to take up this guest (`reclaim`, `adopt`)."""

    @abc.abstractmethod
    async def reclaim(self, memento: Memento) -> None:
        """In a new object, after a restart of the agent before COMMIT: run the guest on here, untracked.

        Works whatever was under way.
        """

    @abc.abstractmethod
    async def adopt(self, pid: int, memento: Memento) -> None:
        """In a new object, after a restart of the agent after COMMIT: prepare for `release` and `died`.

        ``pid`` may have exited meanwhile.  Its memory is in other hands.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Close descriptors and connections.  Does not touch the guest.  Idempotent."""

    @abc.abstractmethod
    async def died(self) -> str:
        """Wait until the guest process has ended; return how, as text for people ("exited with status 1")."""


class TargetGuest(abc.ABC):
    """A guest that is to run here."""

    @abc.abstractmethod
    async def check(self, regions: tuple[Region, ...], description: Description) -> None:
        """Refuse what cannot work (other region names or sizes, missing command) before memory is reserved.

        ``regions`` and ``description`` are the source's; names and sizes must match ours.
        """

    @abc.abstractmethod
    async def start(self, memory: tuple[TargetMemory, ...]) -> FaultSource:
        """Start (or find) the guest process on this memory, ready to take the guest state, not running."""

    @abc.abstractmethod
    async def load_state(self, channel: StateChannel) -> None:
        """Take the guest state from the channel; return when it is loaded.

        The agent calls this at the start and runs it beside the pre-copy: bytes may arrive early.  Loading may touch
        guest memory, which waits until the agent has the stale map.
        """

    @abc.abstractmethod
    async def resume(self) -> None:
        """Run the guest.  Called only after COMMIT, and again if the agent was restarted in between (idempotent)."""

    @abc.abstractmethod
    async def release(self) -> None:
        """Close the descriptor in the guest process too: every page is current and the range is unregistered."""

    @abc.abstractmethod
    async def kill(self) -> None:
        """End the guest process (before COMMIT only) and wait until it is gone.  Idempotent."""

    async def end_left_over(self) -> None:  # noqa: B027 - most leave nothing but their process
        """In a new object, after a restart before the guest was loaded: end what `kill` ends beside the process."""

    @abc.abstractmethod
    def memento(self) -> Memento:
        """Return what a restarted agent needs beside pid, memory and userfaultfd to take up this guest (`adopt`)."""

    @abc.abstractmethod
    async def adopt(self, pid: int, uffd: int, memory: tuple[TargetMemory, ...], memento: Memento) -> FaultSource:
        """In a new object, after a restart of the agent: take back the guest process.  ``uffd`` becomes the driver's.

        Must not wait for the guest, which may be waiting for a page.  Raises GuestError ``guest-gone`` when ``pid`` is
        not it.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Close descriptors and connections.  Does not touch the guest process.  Idempotent."""

    @abc.abstractmethod
    async def died(self) -> str:
        """Wait until the guest process has ended; return how, as text for people."""
