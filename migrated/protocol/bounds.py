"""Check message fields beyond what their types enforce, since nothing from the network is trusted.

`check` needs only the message; `Geometry` checks page numbers against the regions of the session.  Both raise
ValueError with a sentence, which framing and session turn into LocalProtocolError or RemoteProtocolError.
"""

from __future__ import annotations

import dataclasses
import re

import msgspec

from migrated.errors import as_migrated_error
from migrated.protocol.messages import (
    CODE,
    MAX_CODE_CHARACTERS,
    MAX_NAME_CHARACTERS,
    MAX_TEXT_CHARACTERS,
    PAGE_SIZES,
    PROTOCOL_VERSION,
    Abort,
    AnyMessage,
    Capacity,
    Hello,
    Inquire,
    Lacking,
    Populated,
    Ready,
    RegionInfo,
    Resume,
    Resumed,
    StaleMap,
    Switchover,
)


class WrongVersionError(ValueError):
    """The message's ``version`` is not ours."""


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise ValueError(sentence)


def check(message: AnyMessage) -> None:
    """Check what the field types cannot express.  Raises ValueError (WrongVersionError) with a sentence."""
    if isinstance(message, Hello | Resume | Inquire) and message.version != PROTOCOL_VERSION:
        raise WrongVersionError(f"the peer speaks protocol version {message.version}, we speak {PROTOCOL_VERSION}")
    _check_texts(message)
    if isinstance(message, Hello):
        for region in message.regions:
            _check_texts(region)
            _check_page_bytes(region.page_bytes)
            _check_multiple(region, region.page_bytes)
        names = [region.name for region in message.regions]
        _require(len(set(names)) == len(names), f"region names must differ: {', '.join(names)}"[:MAX_TEXT_CHARACTERS])
    elif isinstance(message, Ready):
        for page_bytes in message.page_bytes:
            _check_page_bytes(page_bytes)
    elif isinstance(message, Inquire):
        for asked in message.guests:
            _check_texts(asked)
    elif isinstance(message, Capacity):
        for verdict in message.guests:
            if verdict.page_bytes:
                _check_page_bytes(verdict.page_bytes)
            if verdict.refusal is not None:
                _check_texts(verdict.refusal)


def _check_texts(message: msgspec.Struct) -> None:
    for field in message.__struct_fields__:
        value = getattr(message, field)
        if isinstance(value, str):
            _require(value.isprintable(), f"{field} must be printable, not {value[:MAX_NAME_CHARACTERS]!r}")


def _check_page_bytes(page_bytes: int) -> None:
    _require(page_bytes in PAGE_SIZES, f"page_bytes must be one of {', '.join(map(str, PAGE_SIZES))}, not {page_bytes}")


def _check_multiple(region: RegionInfo, page_bytes: int) -> None:
    _require(
        region.size_bytes % page_bytes == 0,
        f"region {region.name} has {region.size_bytes} bytes, not a multiple of the page size {page_bytes}",
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """Number of host pages in each region, known once Ready has been sent."""

    pages: tuple[int, ...]

    @classmethod
    def of(cls, hello: Hello, ready: Ready) -> Geometry:
        """Derive the geometry.  Raises ValueError if Ready does not match that Hello."""
        _require(
            len(ready.page_bytes) == len(hello.regions),
            f"page sizes for {len(ready.page_bytes)} regions, but the guest has {len(hello.regions)}",
        )
        for region, page_bytes in zip(hello.regions, ready.page_bytes, strict=True):
            _check_multiple(region, page_bytes)
        sizes = zip(hello.regions, ready.page_bytes, strict=True)
        return cls(tuple(region.size_bytes // page_bytes for region, page_bytes in sizes))

    def check(self, message: AnyMessage) -> None:
        """Check page numbers and counts against the regions.  Raises ValueError with a sentence."""
        match message:
            case Populated() | StaleMap() | Lacking():
                self._check_piece(message.region, message.first_page, message.bits)
            case Switchover():
                self._check_count("stale_pages", message.stale_pages)
            case Resumed():
                self._check_count("lacking_pages", message.lacking_pages)
            case _:
                pass

    def _check_count(self, field: str, pages: int) -> None:
        _require(pages <= sum(self.pages), f"{field} must be from 0 to {sum(self.pages)}, not {pages}")

    def _check_piece(self, region: int, first_page: int, bits: bytes) -> None:
        _require(region < len(self.pages), f"region must be from 0 to {len(self.pages) - 1}, not {region}")
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


def abort_of(failure: BaseException) -> Abort:
    """Return the Abort that reports an error to the peer, shortened and reduced to printable characters."""
    error = as_migrated_error(failure)
    code = error.code if len(error.code) <= MAX_CODE_CHARACTERS and re.fullmatch(CODE, error.code) else "internal"
    return Abort(code=code, message=_printable(error.message), hint=_printable(error.hint))


def _printable(text: str) -> str:
    cleaned = "".join(character if character.isprintable() else " " for character in text)
    return cleaned if len(cleaned) <= MAX_TEXT_CHARACTERS else cleaned[: MAX_TEXT_CHARACTERS - 1] + "…"
