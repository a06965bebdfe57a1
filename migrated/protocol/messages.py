"""Control messages, as msgspec structs carried in length-prefixed msgpack frames (framing.py).

S→T: source to target, T→S: target to source.  Pages never travel here: they have connections of their own.
"""

from __future__ import annotations

from typing import Any

import msgspec

PROTOCOL_VERSION = 2


class Message(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True):
    """Base of all control messages; on the wire a map with the tag in ``t``."""


class RegionInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region as the source has it."""

    name: str
    size_bytes: int
    page_bytes: int
    device: bool = False  # memory of a device or of the firmware


class Hello(Message, frozen=True, tag="hello"):
    """S→T, first message of a new migration."""

    version: int
    session: bytes  # 16 bytes, random
    token: bytes  # 32 bytes, random: page connections and reconnects show it
    guest: str
    driver: str
    mode: str
    streams: int
    block_secret: bytes  # MGD_SECRET_BYTES, key of the block hash
    regions: tuple[RegionInfo, ...]
    agent: str  # "migrated 0.1.0", for people
    description: dict[str, Any] = {}  # what the source's driver says of the guest; checked by the target's driver


class Ready(Message, frozen=True, tag="ready"):
    """T→S: memory reserved, guest process up, fault server armed."""

    page_bytes: tuple[int, ...]  # host page size of each region, in the order of Hello.regions


class Populated(Message, frozen=True, tag="populated"):
    """S→T: host pages that will come (a piece of the map): the target may have them ready."""

    region: int
    first_page: int
    bits: bytes  # little end first


class Round(Message, frozen=True, tag="round"):
    """S→T, for people: a pre-copy round begins."""

    number: int
    dirty_bytes: int


class BarrierAck(Message, frozen=True, tag="barrier-ack"):
    """T→S: everything sent before this barrier on every bulk stream is in memory."""

    barrier: int


class Switchover(Message, frozen=True, tag="switchover"):
    """S→T: the guest is paused.  StaleMap pieces follow, then StaleMapEnd."""

    stale_pages: int


class StaleMap(Message, frozen=True, tag="stale-map"):
    """S→T: a piece of a region's stale map, one bit a host page."""

    region: int
    first_page: int
    bits: bytes


class StaleMapEnd(Message, frozen=True, tag="stale-map-end"):
    """S→T: the stale map is whole: faults are served from here on."""


class StateChunk(Message, frozen=True, tag="state"):
    """Both ways: bytes of the guest state, driver to driver."""

    data: bytes


class StateEnd(Message, frozen=True, tag="state-end"):
    """Both ways: no more state bytes from here."""


class Loaded(Message, frozen=True, tag="loaded"):
    """T→S: the guest state is in; the guest could run."""


class Commit(Message, frozen=True, tag="commit"):
    """S→T: the point of no return: the source will never run the guest again by itself."""


class Running(Message, frozen=True, tag="running"):
    """T→S: the guest runs here."""


class Done(Message, frozen=True, tag="done"):
    """T→S: every page is current, the guest needs nobody any more."""


class Released(Message, frozen=True, tag="released"):
    """S→T: the source has let go.  Last message."""


#: ``code`` of the Abort by which a target of this session says that the guest has ended there.
GUEST_LOST = "guest-lost"
#: … and of one that speaks another version.
VERSION_MISMATCH = "version-mismatch"


class Abort(Message, frozen=True, tag="abort"):
    """The session is over, and why: from the source before COMMIT, from the target before Loaded.

    From the target in answer to Resume(committed=True): it cannot go on, and why; nothing else changes.
    """

    code: str
    message: str
    hint: str = ""


class Aborted(Message, frozen=True, tag="aborted"):
    """T→S: answer to Abort: no process and no memory of the guest is left on the target."""


class Ping(Message, frozen=True, tag="ping"):
    """Both ways: asks for a sign of life."""

    sequence: int


class Pong(Message, frozen=True, tag="pong"):
    """Both ways: the answer to Ping, with its number."""

    sequence: int


class Resume(Message, frozen=True, tag="resume"):
    """S→T, first message of a reconnect: the same session goes on.  ``committed``: COMMIT was (or may have been) sent."""

    version: int
    session: bytes
    token: bytes
    committed: bool


class Resumed(Message, frozen=True, tag="resumed"):
    """T→S: where the target stands: ``loaded``, ``running`` or ``done``.  Lacking pieces follow, then LackingEnd."""

    state: str
    lacking_pages: int


class Lacking(Message, frozen=True, tag="lacking"):
    """T→S: a piece of the map of pages the target does not have."""

    region: int
    first_page: int
    bits: bytes


class LackingEnd(Message, frozen=True, tag="lacking-end"):
    """T→S: that was all."""


AnyMessage = (
    Hello
    | Ready
    | Populated
    | Round
    | BarrierAck
    | Switchover
    | StaleMap
    | StaleMapEnd
    | StateChunk
    | StateEnd
    | Loaded
    | Commit
    | Running
    | Done
    | Released
    | Abort
    | Aborted
    | Ping
    | Pong
    | Resume
    | Resumed
    | Lacking
    | LackingEnd
)
