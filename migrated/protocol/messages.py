"""The control messages and the limits of their fields, as msgspec structs.

framing.py carries them in length-prefixed msgpack frames.  Pages never travel here: they have their own connections.
S→T means source to target, T→S target to source.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

PROTOCOL_VERSION = 3

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
MAX_CHUNK_BYTES = 1 << 20  # of guest state per message: the driver contract's limit for one read
MAX_ASKED = 32  # guests in one Inquire: the first message of a connection must be small
MAX_POOLS = 16  # huge page sizes of a host
MAX_BITS_BYTES = 1 << 20  # of a bitmap per message: 8 Mi pages
MAX_NUMBER = (1 << 63) - 1
CODE = "[a-z0-9]+(-[a-z0-9]+)*"

# Every text must also be printable (bounds.py).
Number = Annotated[int, Meta(ge=0, le=MAX_NUMBER)]
Session = Annotated[bytes, Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
Token = Annotated[bytes, Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
Secret = Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARACTERS)]
Text = Annotated[str, Meta(max_length=MAX_TEXT_CHARACTERS)]
Region = Annotated[int, Meta(ge=0, lt=MAX_REGIONS)]
FirstPage = Annotated[int, Meta(ge=0, le=MAX_NUMBER, multiple_of=8)]
Code = Annotated[str, Meta(pattern=f"^{CODE}\\Z", max_length=MAX_CODE_CHARACTERS)]
TraceParent = Annotated[str, Meta(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?\Z")]
Bits = Annotated[bytes, Meta(min_length=1, max_length=MAX_BITS_BYTES)]  # least significant bit first


class Message(msgspec.Struct, frozen=True, tag_field="t", forbid_unknown_fields=True):
    """Base of all control messages; on the wire, a map with the tag in ``t``."""


class RegionInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A region, as on the source."""

    name: Name
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_REGION_BYTES)]
    page_bytes: int
    device: bool = False  # memory of a device or of the firmware


class Hello(Message, frozen=True, tag="hello", omit_defaults=True):
    """S→T: the first message of a new migration."""

    version: int
    session: Session  # 16 bytes, random
    token: Token  # 32 bytes, random: authenticates page connections and reconnects
    guest: Name
    driver: Name
    mode: Annotated[str, Meta(pattern=f"^({'|'.join(MODES)})\\Z")]
    streams: Annotated[int, Meta(ge=1, le=MAX_STREAMS)]
    block_secret: Secret  # MGD_SECRET_BYTES, key of the block hash
    regions: Annotated[tuple[RegionInfo, ...], Meta(min_length=1, max_length=MAX_REGIONS)]
    agent: Name  # "migrated 0.1.0", for people
    description: dict[str, Any] = {}  # the source driver's description of the guest; checked by the target's driver
    traceparent: TraceParent = ""  # of a source that traces its migrations, as in the header of W3C Trace Context


class Ready(Message, frozen=True, tag="ready"):
    """T→S: the memory is reserved, the guest process is running, the fault server is armed."""

    page_bytes: Annotated[
        tuple[int, ...], Meta(min_length=1, max_length=MAX_REGIONS)
    ]  # host page size of each region, in the order of Hello.regions


class Populated(Message, frozen=True, tag="populated"):
    """S→T: a piece of the map of host pages that will arrive, so that the target can populate them in advance."""

    region: Region
    first_page: FirstPage
    bits: Bits  # least significant bit first


class Round(Message, frozen=True, tag="round"):
    """S→T: a pre-copy round begins.  For display only."""

    number: Number
    dirty_bytes: Number


class BarrierAck(Message, frozen=True, tag="barrier-ack"):
    """T→S: everything sent before this barrier, on every bulk stream, is in memory."""

    barrier: Number


class Switchover(Message, frozen=True, tag="switchover"):
    """S→T: the guest is paused.  StaleMap pieces follow, then StaleMapEnd."""

    stale_pages: Number


class StaleMap(Message, frozen=True, tag="stale-map"):
    """S→T: a piece of a region's stale map, one bit per host page."""

    region: Region
    first_page: FirstPage
    bits: Bits


class StaleMapEnd(Message, frozen=True, tag="stale-map-end"):
    """S→T: the stale map is complete.  Faults are served from here on."""


class StateChunk(Message, frozen=True, tag="state"):
    """Both ways: guest-state bytes, from driver to driver."""

    data: Annotated[bytes, Meta(min_length=1, max_length=MAX_CHUNK_BYTES)]


class StateEnd(Message, frozen=True, tag="state-end"):
    """Both ways: this side sends no more guest-state bytes."""


class Loaded(Message, frozen=True, tag="loaded"):
    """T→S: the guest state is loaded; the guest could run."""


class Commit(Message, frozen=True, tag="commit"):
    """S→T: the point of no return.  The source will never again run the guest by itself."""


class Running(Message, frozen=True, tag="running"):
    """T→S: the guest runs here."""


class Done(Message, frozen=True, tag="done"):
    """T→S: every page is current; the guest no longer needs the source."""


class Released(Message, frozen=True, tag="released"):
    """S→T: the source has released the guest.  The last message."""


#: ``code`` of the Abort with which this session's target reports that the guest has ended there.
GUEST_LOST = "guest-lost"
#: ``code`` of the Abort of a peer that speaks another version.
VERSION_MISMATCH = "version-mismatch"


class Abort(Message, frozen=True, tag="abort"):
    """End the session and say why.  The source may send it before COMMIT, the target before Loaded.

    From the target in answer to Resume(committed=True): it cannot continue, and why; nothing else changes.
    """

    code: Code
    message: Text
    hint: Text = ""


class Aborted(Message, frozen=True, tag="aborted"):
    """T→S: the answer to Abort.  No process and no memory of the guest is left on the target."""


class Ping(Message, frozen=True, tag="ping"):
    """Both ways: a heartbeat that asks for a Pong."""

    sequence: Number


class Pong(Message, frozen=True, tag="pong"):
    """Both ways: the answer to a Ping, with its sequence number."""

    sequence: Number


class Resume(Message, frozen=True, tag="resume"):
    """S→T: the first message of a reconnect of the same session.  ``committed``: COMMIT was (or may have been) sent."""

    version: int
    session: Session
    token: Token
    committed: bool


class Resumed(Message, frozen=True, tag="resumed"):
    """T→S: the target's standing: ``loaded``, ``running`` or ``done``.  Lacking pieces follow, then LackingEnd."""

    state: Annotated[str, Meta(pattern=f"^({'|'.join(STANDINGS)})\\Z")]
    lacking_pages: Number


class Lacking(Message, frozen=True, tag="lacking"):
    """T→S: a piece of the map of pages that the target lacks."""

    region: Region
    first_page: FirstPage
    bits: Bits


class LackingEnd(Message, frozen=True, tag="lacking-end"):
    """T→S: the map of lacking pages is complete."""


class AskedGuest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A guest that the source would like to migrate to this target."""

    guest: Name
    driver: Name


class Inquire(Message, frozen=True, tag="inquire"):
    """S→T: the first message of a connection that asks about the target's host.  Nothing changes there."""

    version: int
    session: Session  # of this connection only
    token: Token
    guests: Annotated[tuple[AskedGuest, ...], Meta(max_length=MAX_ASKED)]


class PagePool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The huge pages of one size that new guests can have, summed over the NUMA nodes."""

    page_bytes: Annotated[int, Meta(ge=1, le=MAX_REGION_BYTES)]
    pages: Number


class Refusal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why the target would refuse a guest."""

    code: Code
    message: Text
    hint: Text = ""


class Verdict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the target's configuration accepts a guest, and which memory it would give it."""

    page_bytes: int = 0  # 0: the largest pages that are available
    reserve: bool = True  # all of the memory is reserved at the start
    refusal: Refusal | None = None


class Capacity(Message, frozen=True, tag="capacity"):
    """T→S: the answer to Inquire, and the last message."""

    agent: Name  # "migrated 0.1.0", for people
    memory_bytes: Number  # available without huge pages
    pools: Annotated[tuple[PagePool, ...], Meta(max_length=MAX_POOLS)]
    migrations: Number  # active ones
    max_migrations: Number
    guests: Annotated[tuple[Verdict, ...], Meta(max_length=MAX_ASKED)]  # in the order of Inquire.guests


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
    | Inquire
    | Capacity
)
