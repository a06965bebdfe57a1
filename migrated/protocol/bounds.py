"""What the fields of a message may hold: nothing from the network is believed.

`check` needs nothing but the message; `Geometry` holds page numbers against the regions of the session.  Both raise
ValueError with a sentence; framing and session turn it into LocalProtocolError or RemoteProtocolError.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Final

from migrated.errors import MigratedError
from migrated.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    AnyMessage,
    BarrierAck,
    Hello,
    Lacking,
    Ping,
    Pong,
    Populated,
    Ready,
    Resume,
    Resumed,
    Round,
    StaleMap,
    StateChunk,
    Switchover,
)

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

_CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class WrongVersionError(ValueError):
    """The message's ``version`` is not ours."""


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def _length(field: str, data: bytes, wanted: int) -> None:
    _require(len(data) == wanted, f"{field} must be {wanted} bytes, not {len(data)}")


def _number(field: str, value: int, low: int = 0, high: int = MAX_NUMBER) -> None:
    _require(low <= value <= high, f"{field} must be from {low} to {high}, not {value}")


def _name(field: str, value: str) -> None:
    _require(
        0 < len(value) <= MAX_NAME_CHARACTERS and value.isprintable(),
        f"{field} must be 1 to {MAX_NAME_CHARACTERS} printable characters, not {value[:MAX_NAME_CHARACTERS]!r}",
    )


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{field} must be one of {', '.join(allowed)}, not {value[:MAX_NAME_CHARACTERS]!r}")


def _page_bytes(field: str, value: int) -> None:
    _require(value in PAGE_SIZES, f"{field} must be one of {', '.join(map(str, PAGE_SIZES))}, not {value}")


def _version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        msg = f"the peer speaks protocol version {version}, we speak {PROTOCOL_VERSION}"
        raise WrongVersionError(msg)


def _hello(message: Hello) -> None:
    _version(message.version)
    _length("session", message.session, SESSION_BYTES)
    _length("token", message.token, TOKEN_BYTES)
    _length("block_secret", message.block_secret, SECRET_BYTES)
    _name("guest", message.guest)
    _name("driver", message.driver)
    _name("agent", message.agent)
    _one_of("mode", message.mode, MODES)
    _number("streams", message.streams, 1, MAX_STREAMS)
    _number("the number of regions", len(message.regions), 1, MAX_REGIONS)
    for region in message.regions:
        _name("a region's name", region.name)
        _page_bytes(f"page_bytes of region {region.name}", region.page_bytes)
        _number(f"size_bytes of region {region.name}", region.size_bytes, 1, MAX_REGION_BYTES)
        _require(
            region.size_bytes % region.page_bytes == 0,
            f"size_bytes of region {region.name} must be a multiple of its page size {region.page_bytes}, "
            f"not {region.size_bytes}",
        )
    names = [region.name for region in message.regions]
    _require(len(set(names)) == len(names), f"region names must differ: {', '.join(names)}"[:MAX_TEXT_CHARACTERS])


def _ready(message: Ready) -> None:
    _number("the number of page sizes", len(message.page_bytes), 1, MAX_REGIONS)
    for page_bytes in message.page_bytes:
        _page_bytes("page_bytes", page_bytes)


def _map_piece(message: Populated | StaleMap | Lacking) -> None:
    _number("region", message.region, 0, MAX_REGIONS - 1)
    _number("first_page", message.first_page)
    _require(message.first_page % 8 == 0, f"first_page must be a multiple of 8, not {message.first_page}")
    _number("the length of bits", len(message.bits), 1, MAX_BITS_BYTES)


def _text(field: str, value: str) -> None:
    _require(
        len(value) <= MAX_TEXT_CHARACTERS, f"{field} must be at most {MAX_TEXT_CHARACTERS} characters, not {len(value)}"
    )
    _require(value.isprintable(), f"{field} must be printable, not {value[:MAX_NAME_CHARACTERS]!r}")


def _abort(message: Abort) -> None:
    _require(
        len(message.code) <= MAX_CODE_CHARACTERS and _CODE.fullmatch(message.code) is not None,
        f"code must be small letters, digits and dashes, not {message.code[:MAX_CODE_CHARACTERS]!r}",
    )
    _text("message", message.message)
    _text("hint", message.hint)


def _resume(message: Resume) -> None:
    _version(message.version)
    _length("session", message.session, SESSION_BYTES)
    _length("token", message.token, TOKEN_BYTES)


def _resumed(message: Resumed) -> None:
    _one_of("state", message.state, STANDINGS)
    _number("lacking_pages", message.lacking_pages)


def _round(message: Round) -> None:
    _number("number", message.number)
    _number("dirty_bytes", message.dirty_bytes)


_CHECKS: Final[dict[type, Callable[[Any], None]]] = {
    Hello: _hello,
    Ready: _ready,
    Populated: _map_piece,
    StaleMap: _map_piece,
    Lacking: _map_piece,
    Round: _round,
    BarrierAck: lambda message: _number("barrier", message.barrier),
    Switchover: lambda message: _number("stale_pages", message.stale_pages),
    StateChunk: lambda message: _number("the length of data", len(message.data), 1, MAX_CHUNK_BYTES),
    Abort: _abort,
    Ping: lambda message: _number("sequence", message.sequence),
    Pong: lambda message: _number("sequence", message.sequence),
    Resume: _resume,
    Resumed: _resumed,
}


def check(message: AnyMessage) -> None:
    """Hold a message's fields against what they may be.  ValueError (WrongVersionError) with a sentence."""
    of_type = _CHECKS.get(type(message))
    if of_type is not None:
        of_type(message)


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Host pages of each region, known once Ready was said."""

    pages: tuple[int, ...]

    @classmethod
    def of(cls, hello: Hello, ready: Ready) -> Geometry:
        """ValueError when Ready does not answer that Hello."""
        _require(
            len(ready.page_bytes) == len(hello.regions),
            f"page sizes for {len(ready.page_bytes)} regions, but the guest has {len(hello.regions)}",
        )
        for region, page_bytes in zip(hello.regions, ready.page_bytes, strict=True):
            _require(
                region.size_bytes % page_bytes == 0,
                f"region {region.name} has {region.size_bytes} bytes, no multiple of the page size {page_bytes}",
            )
        sizes = zip(hello.regions, ready.page_bytes, strict=True)
        return cls(tuple(region.size_bytes // page_bytes for region, page_bytes in sizes))

    def check(self, message: AnyMessage) -> None:
        """Hold page numbers and counts against the regions.  ValueError with a sentence."""
        match message:
            case Populated() | StaleMap() | Lacking():
                self._check_piece(message.region, message.first_page, message.bits)
            case Switchover():
                _number("stale_pages", message.stale_pages, 0, sum(self.pages))
            case Resumed():
                _number("lacking_pages", message.lacking_pages, 0, sum(self.pages))
            case _:
                pass

    def _check_piece(self, region: int, first_page: int, bits: bytes) -> None:
        _number("region", region, 0, len(self.pages) - 1)
        pages = self.pages[region]
        _require(first_page < pages, f"first_page {first_page} is beyond region {region}, which has {pages} pages")
        last_bytes, last_bits = divmod(pages - first_page, 8)
        room = last_bytes + (last_bits > 0)
        _require(
            len(bits) <= room,
            f"{len(bits)} bytes of bits from page {first_page} on exceed region {region}: {pages} pages",
        )
        if last_bits and len(bits) == room:
            _require(bits[-1] >> last_bits == 0, f"bits beyond the last page of region {region} must be 0")


def abort_of(error: MigratedError) -> Abort:
    """The Abort that tells the peer of an error: shortened and cleaned to what may travel."""
    code = error.code if len(error.code) <= MAX_CODE_CHARACTERS and _CODE.fullmatch(error.code) else "internal"
    return Abort(code=code, message=_printable(error.message), hint=_printable(error.hint))


def _printable(text: str) -> str:
    cleaned = "".join(character if character.isprintable() else " " for character in text)
    return cleaned if len(cleaned) <= MAX_TEXT_CHARACTERS else cleaned[: MAX_TEXT_CHARACTERS - 1] + "…"
