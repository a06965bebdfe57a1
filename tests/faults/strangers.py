"""Thousands of hostile connections: ``python -m tests.faults.strangers TARGET STATUS SESSION``, each HOST:PORT or hex.

They come from other addresses of this machine, in batches, and most stay open until the next batches have come.  After
each batch one connection waits until it is refused: by then the agent has accepted the whole batch, so that the kernel's
queue never overflows, however short it is.  When all are through, it writes one line and waits for the end of its input
with the last of them still open.
"""

from __future__ import annotations

import collections
import contextlib
import random
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from typing import Final

from migrated.protocol.preamble import PREFACE_BYTES, TLS_MAGIC, Preamble, Purpose, encode

ON_TARGET: Final = 10_000
ON_STATUS: Final = 3_000
BATCH: Final = 100
OPEN: Final = 900  # more than max_connections, though half of them are refused at once
PATIENCE_SECONDS: Final = 60.0
SEED: Final = 20261126

draw = random.Random(SEED)
Address = tuple[str, int]


def connect(address: Address) -> socket.socket:
    """From one of a few other addresses."""
    end = socket.create_connection(
        address, timeout=PATIENCE_SECONDS, source_address=(f"127.0.0.{draw.randrange(2, 10)}", 0)
    )
    end.setblocking(False)
    return end


def send(end: socket.socket, data: bytes) -> None:
    """As much as it takes; the agent may have closed it."""
    with contextlib.suppress(OSError):
        end.send(data)


def reset(end: socket.socket) -> None:
    """Close it with a reset."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def ended(end: socket.socket) -> None:
    """Wait until the agent has closed it."""
    end.settimeout(PATIENCE_SECONDS)
    with contextlib.suppress(ConnectionError):
        while end.recv(1 << 16):
            pass
    end.close()


def on_target(session: bytes) -> list[Callable[[socket.socket], None]]:
    """What strangers do on the migration port."""
    token = draw.randbytes(32)
    other = draw.randbytes(16)
    garbage = draw.randbytes(200)
    hello = encode(Preamble(Purpose.CONTROL, other, token))
    preface = TLS_MAGIC + hello[len(TLS_MAGIC) : PREFACE_BYTES]
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
    client_hello = outgoing.read()
    return [
        lambda end: send(end, preface),
        lambda end: send(end, preface + garbage),
        lambda end: send(end, preface + client_hello[:99]),
        lambda end: send(end, preface + client_hello),
        lambda end: send(end, preface + client_hello + garbage),
        lambda end: None,
        lambda end: send(end, b"M"),
        lambda end: send(end, garbage),
        lambda end: send(end, hello[:33]),
        lambda end: send(end, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + garbage),
        lambda end: send(end, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        lambda end: send(end, encode(Preamble(Purpose.CONTROL, session, token))),
        lambda end: send(end, encode(Preamble(Purpose.BULK, session, token)) + garbage),
        lambda end: send(end, encode(Preamble(Purpose.URGENT, session, token)) + garbage),
        lambda end: send(end, encode(Preamble(Purpose.BULK, other, token))),
        lambda end: send(end, hello),
        lambda end: send(end, hello + b"\x00\xff\xff\xff" + garbage),
        lambda end: send(end, hello + b"\x00\x00\x00\x05hello"),
        socket.socket.close,
        reset,
    ]


def on_status() -> list[Callable[[socket.socket], None]]:
    """What strangers do on the status site."""
    request = b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n"
    garbage = draw.randbytes(200)
    return [
        lambda end: None,
        lambda end: send(end, b"G"),
        lambda end: send(end, garbage),
        lambda end: send(end, request[:-2]),
        lambda end: send(end, request * 50),
        lambda end: send(end, b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n"),
        lambda end: send(end, b"POST /v1/migrations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999\r\n\r\n{"),
        lambda end: send(end, b"GET /v1/migrations/vm/events HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        socket.socket.close,
        reset,
    ]


def main() -> None:
    """All of them, the two ports in turn."""
    (target, status), session = map(_address, sys.argv[1:3]), bytes.fromhex(sys.argv[3])
    left = {target: ON_TARGET, status: ON_STATUS}
    kinds = {target: on_target(session), status: on_status()}
    alive: collections.deque[socket.socket] = collections.deque()
    while any(left.values()):
        for address, behave in kinds.items():
            count = min(BATCH, left[address])
            left[address] -= count
            for _ in range(count):
                end = connect(address)
                if draw.random() < 0.5:  # the others say nothing
                    draw.choice(behave)(end)
                alive.append(end)
                send(draw.choice(alive), b"M")  # a slow one goes on
            if count:
                last = connect(address)
                send(last, b"not for you" * 9 + b"\r\n\r\n")
                ended(last)
            while len(alive) > OPEN:
                alive.popleft().close()
    sys.stdout.write(f"{ON_TARGET} and {ON_STATUS}\n")
    sys.stdout.flush()
    sys.stdin.read()


def _address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    main()
