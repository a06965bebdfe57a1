"""The device state on its way: the header of ours before it, and the migration stream that is made of it."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import RemoteProtocolError
from migrated.guests.qemu.config import Description
from migrated.guests.qemu.state import STREAM_HEAD, HeaderDecoder, StateHeader, encode_header, ram_section, stream_begin

HEADER = StateHeader(runs=True, machine="pc-q35-7.2", used_bytes={"pc.ram": 1 << 28, "/rom@etc/acpi/tables": 0x20000})


@given(cuts=st.lists(st.integers(0, 400), max_size=8), tail=st.binary(max_size=40))
def test_the_header_is_read_however_the_bytes_come(cuts: list[int], tail: bytes) -> None:
    data = encode_header(HEADER) + STREAM_HEAD + tail
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    decoder = HeaderDecoder()
    complete = [decoder.feed(data[a:b]) for a, b in itertools.pairwise(bounds) if not decoder.header]
    assert complete[-1]
    assert decoder.header == HEADER
    # What came after the piece that completed the header was not fed.
    assert (STREAM_HEAD + tail).startswith(STREAM_HEAD + decoder.rest)


@pytest.mark.parametrize(
    "data",
    [
        STREAM_HEAD * 4,
        b"MGQS" + bytes(40),
        encode_header(HEADER)[:6] + b"\xff\xff\xff\xff" + bytes(8),
        encode_header(HEADER) + b"QEVM\0\0\0\2",
        encode_header(HEADER)[:10] + b"\xc1" * (len(encode_header(HEADER)) - 10) + STREAM_HEAD,
    ],
    ids=["no header", "version", "length", "stream version", "not msgpack"],
)
def test_what_is_no_state_is_the_peers_mistake(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        HeaderDecoder().feed(data)


def test_the_stream_begins_with_configuration_and_lengths() -> None:
    stream = stream_begin("pc-i440fx-7.2") + ram_section({"pc.ram": 0x1000, "/rom@etc/acpi/rsdp": 0x2000})
    assert (
        stream
        == bytes.fromhex(
            "5145564d00000003"  # QEVM, version 3
            "070000000d"
            + b"pc-i440fx-7.2".hex()
            + "01000100000372616d0000000000000004"  # section 65536: ram, version 4
            "0000000000003004"  # 0x3000 bytes
            "06" + b"pc.ram".hex() + "0000000000001000" + "12" + b"/rom@etc/acpi/rsdp".hex() + "0000000000002000"
            "0000000000000010"
            "7e00010000"
        )
    )


def test_a_description_survives_the_journey() -> None:
    description = Description(machine="pc-q35-10.0", version=(10, 0, 13), backends=("ram0", "ram1"))
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(description.encode()))
    assert Description.decode(wire) == description


@pytest.mark.parametrize("values", [{}, {"machine": 1, "version": [1, 2, 3], "backends": []}, {"machine": "pc"}])
def test_a_malformed_description_is_the_peers_mistake(values: dict[str, object]) -> None:
    with pytest.raises(RemoteProtocolError):
        Description.decode(values)
