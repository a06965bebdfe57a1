"""The image that libvirt restores: its head, its reader's mistakes, and an agent that dies while it is read."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path

import pytest

from migrated.guests.libvirt.save_image import SaveImage, abandon_left_over, head

XML = "<domain><name>vm</name></domain>"


def read_head(fd: int) -> str:
    """The XML, read as libvirt reads it."""
    magic, version, length, *rest = struct.unpack("<16s19I", os.read(fd, 92))
    assert (magic, version, rest) == (b"LibvirtQemudSave", 2, [0] * 17)
    body = os.read(fd, length)
    assert body.endswith(b"\0")
    return body.rstrip(b"\0").decode()


def test_the_head_is_what_libvirt_reads() -> None:
    assert len(head(XML)) == 92 + len(XML) + 1


async def test_a_reader_that_opens_it_twice_finds_the_head_twice(tmp_path: Path) -> None:
    """libvirt 11.3 does so: once for the XML, once for QEMU."""
    image = SaveImage.create(tmp_path / "vm.image", XML)
    try:
        first = os.open(image.path, os.O_RDONLY)
        assert read_head(first) == XML
        assert not image.write_head_again()
        os.close(first)
        assert image.write_head_again()
        second = os.open(image.path, os.O_RDONLY)
        assert read_head(second) == XML
        assert image.open_in(os.getpid())
        await image.write(b"QEVM")
        assert os.read(second, 100) == b"QEVM"
        os.close(second)
    finally:
        image.close()
    assert not image.path.exists()


async def test_more_than_a_pipe_holds_is_written_as_it_is_read(tmp_path: Path) -> None:
    image = SaveImage.create(tmp_path / "vm.image", XML)
    try:
        reader = os.open(image.path, os.O_RDONLY | os.O_NONBLOCK)
        read_head(reader)
        data = os.urandom(4 << 20)
        writing = asyncio.ensure_future(image.write(data))
        got = b""
        while len(got) < len(data):
            await asyncio.sleep(0)
            try:
                got += os.read(reader, 1 << 16)
            except BlockingIOError:
                continue
        await writing
        assert got == data
        os.close(reader)
    finally:
        image.close()


def test_one_that_is_given_up_is_no_image_and_no_stream(tmp_path: Path) -> None:
    image = SaveImage.create(tmp_path / "vm.image", XML)
    reader = os.open(image.path, os.O_RDONLY)
    try:
        read_head(reader)
        image.abandon()
        assert os.read(reader, 92).startswith(b"abandoned")
    finally:
        image.close()
        os.close(reader)


def test_a_reader_that_a_dead_agent_left_is_made_to_give_up(tmp_path: Path) -> None:
    path = tmp_path / "vm.image"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        abandon_left_over(path)
        assert os.read(reader, 92).startswith(b"abandoned")
    finally:
        os.close(reader)
    assert not path.exists()


@pytest.mark.parametrize("there", [True, False])
def test_nobody_reads_any_more(there: bool, tmp_path: Path) -> None:
    path = tmp_path / "vm.image"
    if there:
        os.mkfifo(path)
    abandon_left_over(path)
    assert not path.exists()
