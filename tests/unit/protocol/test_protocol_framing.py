"""Bytes to messages and back: however they are cut, and whatever they are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError, MigratedError, RemoteProtocolError
from migrated.link.listener import FIRST_MESSAGE_MAX_BYTES
from migrated.protocol import bounds
from migrated.protocol import messages as limits
from migrated.protocol.framing import LENGTH_BYTES, MAX_FRAME_BYTES, FrameDecoder, encode
from migrated.protocol.messages import (
    PROTOCOL_VERSION,
    Abort,
    Aborted,
    AnyMessage,
    AskedGuest,
    BarrierAck,
    Commit,
    Hello,
    Inquire,
    Lacking,
    LackingEnd,
    PagePool,
    Ping,
    Pong,
    Populated,
    Ready,
    Refusal,
    RegionInfo,
    Resume,
    Resumed,
    Round,
    StaleMap,
    StateChunk,
    StateEnd,
    Switchover,
    Verdict,
)
from tests.unit.protocol.wired_sessions import CAPACITY, HELLO, INQUIRE, READY, SESSION, TOKEN

numbers = st.integers(0, limits.MAX_NUMBER)
names = st.text(min_size=1, max_size=255).filter(str.isprintable)
texts = st.text(max_size=300).filter(str.isprintable)
page_sizes = st.sampled_from(limits.PAGE_SIZES)
pieces = st.tuples(st.integers(0, 63), numbers.map(lambda page: page & ~7), st.binary(min_size=1, max_size=600))
regions = st.builds(
    lambda name, pages, page_bytes: RegionInfo(name, pages * page_bytes, page_bytes),
    names,
    st.integers(1, 1000),
    page_sizes,
)
codes = st.from_regex(r"[a-z0-9]{1,20}(-[a-z]{1,9}){0,2}", fullmatch=True)
verdicts = st.builds(
    Verdict,
    st.sampled_from((0, *limits.PAGE_SIZES)),
    st.booleans(),
    st.none() | st.builds(Refusal, codes, texts, texts),
)
messages: st.SearchStrategy[AnyMessage] = st.one_of(
    st.builds(
        lambda guest, mode, streams, secret, infos: msgspec.structs.replace(
            HELLO, guest=guest, mode=mode, streams=streams, block_secret=secret, regions=tuple(infos)
        ),
        names,
        st.sampled_from(limits.MODES),
        st.integers(1, 16),
        st.binary(min_size=24, max_size=24).map(lambda piece: piece * (limits.SECRET_BYTES // 24)),
        st.lists(regions, min_size=1, max_size=4, unique_by=lambda region: region.name),
    ),
    st.lists(page_sizes, min_size=1, max_size=64).map(lambda sizes: Ready(tuple(sizes))),
    pieces.map(lambda piece: Populated(*piece)),
    pieces.map(lambda piece: StaleMap(*piece)),
    pieces.map(lambda piece: Lacking(*piece)),
    st.builds(Round, numbers, numbers),
    st.builds(BarrierAck, numbers),
    st.builds(Switchover, numbers),
    st.binary(min_size=1, max_size=5000).map(StateChunk),
    st.builds(Abort, codes, texts, texts),
    st.lists(st.builds(AskedGuest, names, names), max_size=limits.MAX_ASKED).map(
        lambda guests: msgspec.structs.replace(INQUIRE, guests=tuple(guests))
    ),
    st.builds(
        lambda memory, pools, guests: msgspec.structs.replace(
            CAPACITY, memory_bytes=memory, pools=tuple(pools), guests=tuple(guests)
        ),
        numbers,
        st.lists(st.builds(PagePool, page_sizes, numbers), max_size=limits.MAX_POOLS),
        st.lists(verdicts, max_size=limits.MAX_ASKED),
    ),
    st.builds(Ping, numbers),
    st.builds(Pong, numbers),
    st.builds(lambda committed: Resume(PROTOCOL_VERSION, SESSION, TOKEN, committed), st.booleans()),
    st.builds(Resumed, st.sampled_from(limits.STANDINGS), numbers),
    st.sampled_from([StateEnd(), Commit(), Aborted(), LackingEnd()]),
)


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """The data in pieces of these sizes, over and over."""
    start = turn = 0
    while start < len(data):
        size = sizes[turn % len(sizes)]
        yield data[start : start + size]
        start += size
        turn += 1


def raw(value: Any) -> bytes:
    """A frame around any msgpack value."""
    return framed(msgspec.msgpack.encode(value))


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def decode_all(data: bytes) -> list[AnyMessage]:
    return list(FrameDecoder().feed(data))


@given(st.lists(messages, max_size=6), st.lists(st.integers(1, 400), min_size=1, max_size=5))
def test_any_split_of_the_bytes_gives_the_same_messages(sent: list[AnyMessage], sizes: list[int]) -> None:
    decoder = FrameDecoder()
    received = [message for piece in cut(b"".join(map(encode, sent)), sizes) for message in decoder.feed(piece)]
    assert received == sent
    assert list(decoder.feed(b"")) == []


@given(st.binary(max_size=400))
def test_garbage_is_an_error_of_the_peer_and_nothing_else(data: bytes) -> None:
    for stream in (data, framed(data)):
        with contextlib.suppress(RemoteProtocolError):
            decode_all(stream)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
tags = st.sampled_from([variant.__struct_config__.tag for variant in AnyMessage.__args__])
fields = st.sampled_from(sorted({field for variant in AnyMessage.__args__ for field in variant.__struct_fields__}))


@given(tags, st.dictionaries(fields, json_like, max_size=5))
def test_wrong_fields_are_an_error_of_the_peer_and_nothing_else(tag: str, values: dict[str, Any]) -> None:
    try:
        (message,) = decode_all(raw({"t": tag, **values}))
    except RemoteProtocolError:
        return
    bounds.check(message)


@given(messages, st.data())
def test_a_flipped_byte_is_a_message_within_bounds_or_an_error_of_the_peer(
    message: AnyMessage, data: st.DataObject
) -> None:
    frame = bytearray(encode(message))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        received = decode_all(bytes(frame))
    except RemoteProtocolError:
        return
    for found in received:
        bounds.check(found)


def test_messages_before_a_malformed_one_are_not_lost() -> None:
    decoder = FrameDecoder()
    arriving = decoder.feed(encode(Ping(1)) + encode(Ping(2)) + raw({"t": "nonsense"}) + encode(Ping(3)))
    assert next(arriving) == Ping(1)
    assert next(arriving) == Ping(2)
    with pytest.raises(RemoteProtocolError, match="nonsense"):
        next(arriving)
    with pytest.raises(RemoteProtocolError, match="nonsense"):
        list(decoder.feed(encode(Ping(4))))


def test_bytes_are_kept_when_the_iterator_is_not_used_up() -> None:
    decoder = FrameDecoder()
    decoder.feed(encode(Ping(1)))
    assert next(decoder.feed(encode(Ping(2)))) == Ping(1)
    assert list(decoder.feed(b"")) == [Ping(2)]


def test_a_frame_of_sixteen_mebibytes_is_taken_and_one_byte_more_is_refused_before_it_is_kept() -> None:
    decoder = FrameDecoder()
    assert list(decoder.feed(MAX_FRAME_BYTES.to_bytes(4, "big"))) == []
    with pytest.raises(RemoteProtocolError, match="16777217 bytes"):
        decode_all((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(RemoteProtocolError, match="0 bytes"):
        decode_all(bytes(4))


def test_another_protocol_on_the_port_is_shown() -> None:
    with pytest.raises(RemoteProtocolError, match="b'GET / HT'"):
        decode_all(b"GET / HTTP/1.1\r\n")


HELLO_FIELDS: dict[str, Any] = {
    "t": "hello",
    **msgspec.structs.asdict(HELLO),
    "regions": [msgspec.structs.asdict(region) for region in HELLO.regions],
}


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_source_that_does_not_trace_sends_what_targets_without_tracing_know() -> None:
    assert b"traceparent" not in encode(HELLO)
    traced = msgspec.structs.replace(HELLO, traceparent=TRACEPARENT)
    assert decode_all(encode(traced)) == [traced]


def region(**changes: Any) -> list[dict[str, Any]]:
    return [{"name": "ram", "size_bytes": 4 << 20, "page_bytes": 2 << 20, **changes}]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"session": bytes(15)}, "length >= 16 - at `$.session`"),
        ({"token": bytes(33)}, "length <= 32 - at `$.token`"),
        ({"block_secret": b""}, "length >= 4104 - at `$.block_secret`"),
        ({"streams": 0}, "`int` >= 1 - at `$.streams`"),
        ({"streams": 17}, "`int` <= 16 - at `$.streams`"),
        ({"streams": True}, "Expected `int`"),
        ({"mode": "fast"}, "(hybrid|precopy|postcopy)\\\\Z' - at `$.mode`"),
        ({"guest": ""}, "length >= 1 - at `$.guest`"),
        ({"guest": "x" * 256}, "length <= 255 - at `$.guest`"),
        ({"guest": "a\x1b[2J"}, "guest must be printable"),
        ({"driver": "\n"}, "driver must be printable"),
        ({"agent": ""}, "length >= 1 - at `$.agent`"),
        ({"traceparent": "01-" + TRACEPARENT[3:]}, "at `$.traceparent`"),
        ({"traceparent": TRACEPARENT + "\n"}, "at `$.traceparent`"),
        ({"traceparent": TRACEPARENT.upper()}, "at `$.traceparent`"),
        ({"regions": []}, "length >= 1 - at `$.regions`"),
        ({"regions": [{**region()[0], "name": str(index)} for index in range(129)]}, "length <= 128 - at `$.regions`"),
        ({"regions": region() * 2}, "region names must differ"),
        ({"regions": region(name="")}, "length >= 1 - at `$.regions[0].name`"),
        ({"regions": region(name="\n")}, "name must be printable"),
        ({"regions": region(size_bytes=0)}, "`int` >= 1 - at `$.regions[0].size_bytes`"),
        ({"regions": region(size_bytes=-4096)}, "`int` >= 1 - at `$.regions[0].size_bytes`"),
        ({"regions": region(size_bytes=3 << 20)}, "not a multiple of the page size 2097152"),
        ({"regions": region(size_bytes=1 << 62)}, "`$.regions[0].size_bytes`"),
        ({"regions": region(page_bytes=8192)}, "page_bytes must be one of 4096, 2097152, 1073741824, not 8192"),
        ({"regions": region(color="red")}, "color"),
        ({"surprise": 1}, "surprise"),
        ({"version": "1"}, "Expected `int`"),
    ],
)
def test_a_wrong_hello_is_refused_by_the_name_of_the_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        decode_all(raw({**HELLO_FIELDS, **changes}))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (Ready(()), r"length >= 1 - at `\$\.page_bytes`"),
        (Ready((4097,)), "page_bytes must be one of"),
        (Populated(128, 0, b"1"), r"<= 127 - at `\$\.region`"),
        (StaleMap(0, 4, b"1"), r"multiple of 8 - at `\$\.first_page`"),
        (Lacking(0, -8, b"1"), r">= 0 - at `\$\.first_page`"),
        (Lacking(0, 0, b""), r"length >= 1 - at `\$\.bits`"),
        (StaleMap(0, 0, bytes(limits.MAX_BITS_BYTES + 1)), r"length <= 1048576 - at `\$\.bits`"),
        (StateChunk(b""), r"length >= 1 - at `\$\.data`"),
        (StateChunk(bytes(limits.MAX_CHUNK_BYTES + 1)), r"length <= 1048576 - at `\$\.data`"),
        (Round(-1, 0), r">= 0 - at `\$\.number`"),
        (Round(0, -1), r">= 0 - at `\$\.dirty_bytes`"),
        (BarrierAck(-1), r">= 0 - at `\$\.barrier`"),
        (Ping(1 << 63), r"<= 9223372036854775807 - at `\$\.sequence`"),
        (Resumed("asleep", 0), r"at `\$\.state`"),
        (Resume(PROTOCOL_VERSION, b"", TOKEN, committed=True), r"length >= 16 - at `\$\.session`"),
        (Abort("No Good", "x"), r"at `\$\.code`"),
        (Abort("good\n", "x"), r"at `\$\.code`"),
        (Abort("x" * 65, "x"), r"length <= 64 - at `\$\.code`"),
        (Abort("x", "\x07"), "message must be printable"),
        (Abort("x", "y", "z" * 4097), r"length <= 4096 - at `\$\.hint`"),
        (msgspec.structs.replace(INQUIRE, token=b""), r"length >= 32 - at `\$\.token`"),
        (msgspec.structs.replace(INQUIRE, guests=33 * (AskedGuest("a", "b"),)), r"length <= 32 - at `\$\.guests`"),
        (msgspec.structs.replace(INQUIRE, guests=(AskedGuest("a\n", "b"),)), "guest must be printable"),
        (msgspec.structs.replace(INQUIRE, guests=(AskedGuest("a", ""),)), r"length >= 1 - at `\$\.guests"),
        (msgspec.structs.replace(CAPACITY, memory_bytes=-1), r">= 0 - at `\$\.memory_bytes`"),
        (msgspec.structs.replace(CAPACITY, pools=17 * (PagePool(4096, 0),)), r"length <= 16 - at `\$\.pools`"),
        (msgspec.structs.replace(CAPACITY, pools=(PagePool(0, 1),)), r">= 1 - at `\$\.pools"),
        (msgspec.structs.replace(CAPACITY, guests=(Verdict(4097),)), "page_bytes must be one of"),
        (msgspec.structs.replace(CAPACITY, guests=33 * (Verdict(),)), r"length <= 32 - at `\$\.guests`"),
        (
            msgspec.structs.replace(CAPACITY, guests=(Verdict(refusal=Refusal("a", "\x1b")),)),
            "message must be printable",
        ),
        (msgspec.structs.replace(CAPACITY, guests=(Verdict(refusal=Refusal("A", "b")),)), r"refusal\.code`"),
    ],
)
def test_fields_out_of_range_are_neither_sent_nor_taken(message: AnyMessage, named: str) -> None:
    with pytest.raises(LocalProtocolError, match=named):
        encode(message)
    with pytest.raises(RemoteProtocolError, match=named):
        decode_all(framed(msgspec.msgpack.encode(message)))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"\xc1", "malformed control message of 1 bytes"),
        (b"\x81", "malformed"),
        (msgspec.msgpack.encode([1, 2]), "Expected `object`"),
        (msgspec.msgpack.encode({"t": "commit"}) + b"\x00", "extra data"),
        (b"\x91" * 100_000, "StackError"),
        (b"\x93" + (b"\xdc\x00\x7f" + b"\x90" * 127) * 3, "more than 272 arrays and maps"),
        (b"\xdd\x00\xff\xff\xf0" + b"\xc0" * 0xFFFFF0, "max_array_len"),
        (msgspec.msgpack.encode({"t": "resume", "session": "AAAA"}), "Expected `bytes`, got `str`"),
        (msgspec.msgpack.encode({"t": 7}), "Expected `str`"),
        (msgspec.msgpack.encode({}), "missing required field `t`"),
        (b"\x91" * 20000, "malformed"),
        (b"\x81\xa1t\xa2\xff\xfe", "malformed"),
    ],
)
def test_malformed_bodies_are_named(body: bytes, named: str) -> None:
    with pytest.raises(RemoteProtocolError, match=named):
        decode_all(framed(body))


@pytest.mark.parametrize("opening", [HELLO, Resume(PROTOCOL_VERSION, SESSION, TOKEN, committed=True), INQUIRE])
def test_another_version_names_both(opening: Hello | Resume | Inquire) -> None:
    body = msgspec.msgpack.encode(msgspec.structs.replace(opening, version=9))
    with pytest.raises(
        RemoteProtocolError, match=f"peer speaks protocol version 9, we speak {PROTOCOL_VERSION}"
    ) as caught:
        decode_all(framed(body))
    assert caught.value.code == "version-mismatch"
    assert caught.value.hint


def test_the_longest_question_fits_a_first_message() -> None:
    longest = "\U0001f600" * limits.MAX_NAME_CHARACTERS  # four bytes each
    guests = limits.MAX_ASKED * (AskedGuest(longest, longest),)
    assert len(encode(msgspec.structs.replace(INQUIRE, guests=guests))) <= FIRST_MESSAGE_MAX_BYTES


@given(st.text(max_size=80), st.text(max_size=5000), st.text(max_size=5000))
def test_every_error_can_be_told_to_the_peer(code: str, message: str, hint: str) -> None:
    abort = bounds.abort_of(MigratedError(message, code=code, hint=hint))
    assert decode_all(encode(abort)) == [abort]


def test_geometry_holds_pages_against_the_regions() -> None:
    geometry = bounds.Geometry.of(HELLO, READY)
    assert geometry.pages == (32, 3)
    geometry.check(StaleMap(0, 24, b"\xff"))
    geometry.check(Lacking(1, 0, b"\x07"))
    geometry.check(Switchover(35))
    for wrong in (
        StaleMap(2, 0, b"\x01"),
        StaleMap(0, 32, b"\x01"),
        StaleMap(0, 24, b"\xff\x00"),
        Populated(1, 0, b"\x08"),
        Switchover(36),
        Resumed("running", 36),
    ):
        with pytest.raises(ValueError, match=r"region|page"):
            geometry.check(wrong)
    with pytest.raises(ValueError, match="page sizes for 1 regions, but the guest has 2"):
        bounds.Geometry.of(HELLO, Ready((4096,)))
    with pytest.raises(ValueError, match="not a multiple of the page size 1073741824"):
        bounds.Geometry.of(HELLO, Ready((1 << 30, 4096)))


def test_messages_are_values() -> None:
    with pytest.raises(AttributeError):
        Ping(1).sequence = 2  # type: ignore[misc]
    assert not dataclasses.is_dataclass(Ping)
