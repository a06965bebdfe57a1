"""Control messages and what their fields may hold: msgspec structs carried in length-prefixed msgpack frames (framing.py).

S→T: source to target, T→S: target to source.  Pages never travel here: they have connections of their own.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

PROTOCOL_VERSION = 2

SESSION_BYTES = 16
TOKEN_BYTES = 32
SECRET_BYTES = 4104  # MGD_SECRET_BYTES
MAX_REGIONS = 128  # MGD_MAX_REGIONS
MAX_STREAMS = 16  # MGD_MAX_STREAMS
MAX_REGION_BYTES = 1 << 50
PAGE_SIZES: Final = (4096, 2 << 20, 1 << 30)
MODES: Final = ("hybrid", "precopy", "postcopy")
STANDINGS: Final = ("loaded", "running", "done")
MAX_NAME_CHARACTERS = 255
MAX_CODE_CHARACTERS = 64
MAX_TEXT_CHARACTERS = 4096
MAX_CHUNK_BYTES = 1 << 20  # of guest state in a message: the driver contract's limit of a read
MAX_BITS_BYTES = 1 << 20  # of a map in a message: 8 Mi pages
MAX_NUMBER = (1 << 63) - 1
CODE = "[a-z0-9]+(-[a-z0-9]+)*"

# Every text must be printable as well (bounds.py).
Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
Session = Annotated[bytes, Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
Token = Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
Secret = Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)]
Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARACTERS)]
Region = Annotated[int, Meta(ge=0, lt=MAX_REGIONS)]
FirstPage = Annotated[int, Meta(ge=0, le=MAX_NUMBER, multiple_of=8)]
Bits = Annotated[bytes, Meta(min_length=1, max_length=MAX_BITS_BYTES)]  # lowest bit first


class Message(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True):
    """Base of all control messages; on the wire a map with the tag in ``t``."""


class RegionInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region as the source has it."""

    name: Name
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_REGION_BYTES)]
    page_bytes: int
    device: bool = False  # memory of a device or of the firmware


class Hello(Message, frozen=True, tag="hello"):
    """S→T, first message of a new migration."""

    version: int
    session: Session  # 16 bytes, random
    token: Token  # 32 bytes, random: page connections and reconnects show it
    guest: Name
    driver: Name
    mode: Annotated[str, Meta(pattern=f"^({'|'.join(MODES)})\\Z")]
    streams: Annotated[int, Meta(ge=1, le=MAX_STREAMS)]
    block_secret: Secret  # MGD_SECRET_BYTES, key of the block hash
    regions: Annotated[tuple[RegionInfo, ...], Meta(min_length=1, max_length=MAX_REGIONS)]
    agent: Name  # "migrated 0.1.0", for people
    description: dict[str, Any] = {}  # what the source's driver says of the guest; checked by the target's driver


class Ready(Message, frozen=True, tag="ready"):
    """T→S: memory reserved, guest process up, fault server armed."""

    page_bytes: Annotated[
        tuple[int, ...], Meta(min_length=1, max_length=MAX_REGIONS)
    ]  # host page size of each region, in the order of Hello.regions


class Populated(Message, frozen=True, tag="populated"):
    """S→T: host pages that will come (a piece of the map): the target may have them ready."""

    region: Region
    first_page: FirstPage
    bits: Bits  # little end first


class Round(Message, frozen=True, tag="round"):
    """S→T, for people: a pre-copy round begins."""

    number: Number
    dirty_bytes: Number


class BarrierAck(Message, frozen=True, tag="barrier-ack"):
    """T→S: everything sent before this barrier on every bulk stream is in memory."""

    barrier: Number


class Switchover(Message, frozen=True, tag="switchover"):
    """S→T: the guest is paused.  StaleMap pieces follow, then StaleMapEnd."""

    stale_pages: Number


class StaleMap(Message, frozen=True, tag="stale-map"):
    """S→T: a piece of a region's stale map, one bit a host page."""

    region: Region
    first_page: FirstPage
    bits: Bits


class StaleMapEnd(Message, frozen=True, tag="stale-map-end"):
    """S→T: the stale map is whole: faults are served from here on."""


class StateChunk(Message, frozen=True, tag="state"):
    """Both ways: bytes of the guest state, driver to driver."""

    data: Annotated[bytes, Meta(min_length=1, max_length=MAX_CHUNK_BYTES)]


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

    code: Annotated[str, Meta(pattern=f"^{CODE}\\Z", max_length=MAX_CODE_CHARACTERS)]
    message: Text
    hint: Text = ""


class Aborted(Message, frozen=True, tag="aborted"):
    """T→S: answer to Abort: no process and no memory of the guest is left on the target."""


class Ping(Message, frozen=True, tag="ping"):
    """Both ways: asks for a sign of life."""

    sequence: Number


class Pong(Message, frozen=True, tag="pong"):
    """Both ways: the answer to Ping, with its number."""

    sequence: Number


class Resume(Message, frozen=True, tag="resume"):
    """S→T, first message of a reconnect: the same session goes on.  ``committed``: COMMIT was (or may have been) sent."""

    version: int
    session: Session
    token: Token
    committed: bool


class Resumed(Message, frozen=True, tag="resumed"):
    """T→S: where the target stands: ``loaded``, ``running`` or ``done``.  Lacking pieces follow, then LackingEnd."""

    state: Annotated[str, Meta(pattern=f"^({'|'.join(STANDINGS)})\\Z")]
    lacking_pages: Number


class Lacking(Message, frozen=True, tag="lacking"):
    """T→S: a piece of the map of pages the target does not have."""

    region: Region
    first_page: FirstPage
    bits: Bits


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
