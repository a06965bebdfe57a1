"""The first 64 bytes of a connection."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.protocol.framing import FrameDecoder
from migrated.protocol.messages import PROTOCOL_VERSION, Abort
from migrated.protocol.preamble import PREAMBLE_BYTES, Preamble, Purpose, VersionMismatchError, decode, encode, refusal
from tests.unit.protocol.wired_sessions import SESSION, TOKEN

VERSION = PROTOCOL_VERSION.to_bytes(2, "big")


@given(
    st.sampled_from(Purpose),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 15),
)
def test_there_and_back(purpose: Purpose, session: bytes, token: bytes, stream: int) -> None:
    preamble = Preamble(purpose, session, token, stream if purpose is Purpose.BULK else 0)
    data = encode(preamble)
    assert len(data) == PREAMBLE_BYTES
    assert decode(data) == preamble


def test_the_layout_is_what_the_documents_say() -> None:
    data = encode(Preamble(Purpose.BULK, SESSION, TOKEN, stream=3))
    assert data == b"MGRT" + VERSION + b"\x01\x03" + SESSION + TOKEN + bytes(8)


@given(st.binary(max_size=80))
def test_garbage_is_an_error_of_the_peer_and_nothing_else(data: bytes) -> None:
    for stream in (data, b"MGRT" + VERSION + data):
        with contextlib.suppress(RemoteProtocolError):
            decode(stream)


def test_another_protocol_is_shown() -> None:
    with pytest.raises(RemoteProtocolError, match=r"not a migrated connection: got b'GET / HTTP/1'"):
        decode(b"GET / HTTP/1.1\r\nHost: x\r\n".ljust(64))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not a migrated connection"),
        (b"MG", "2 of 64 bytes"),
        (b"MGRT" + VERSION + b"\x03\x00" + SESSION + TOKEN + bytes(8), "unknown purpose 3"),
        (b"MGRT" + VERSION + b"\x01\x10" + SESSION + TOKEN + bytes(8), "stream must be from 0 to 15"),
        (b"MGRT" + VERSION + b"\x02\x01" + SESSION + TOKEN + bytes(8), "stream must be from 0 to 0 on a urgent"),
        (b"MGRT" + VERSION + b"\x00\x00" + SESSION + TOKEN + b"1".rjust(8, b"\x00"), "padding must be zero"),
    ],
)
def test_what_is_wrong_is_named(data: bytes, named: str) -> None:
    with pytest.raises(RemoteProtocolError, match=named):
        decode(data)


def test_another_version_is_answered_so_that_any_peer_can_read_it() -> None:
    with pytest.raises(VersionMismatchError, match=f"version 513, we speak {PROTOCOL_VERSION}") as caught:
        decode(b"MGRT\x02\x01" + bytes(range(58)))
    (answer,) = FrameDecoder().feed(refusal(caught.value))
    assert isinstance(answer, Abort)
    assert answer.code == "version-mismatch"
    assert "513" in answer.message
    assert answer.hint


@pytest.mark.parametrize(
    "preamble",
    [
        Preamble(Purpose.BULK, SESSION, TOKEN, stream=16),
        Preamble(Purpose.URGENT, SESSION, TOKEN, stream=1),
        Preamble(Purpose.CONTROL, SESSION[:-1], TOKEN),
        Preamble(Purpose.CONTROL, SESSION, b""),
    ],
)
def test_a_wrong_preamble_is_not_sent(preamble: Preamble) -> None:
    with pytest.raises(LocalProtocolError):
        encode(preamble)
