"""Both ends of a control connection: two links, or a link and a stranger who says what the test likes."""

from __future__ import annotations

import asyncio
import socket

from migrated.link.control_link import ControlLink
from migrated.protocol import framing
from migrated.protocol.heartbeat import Heartbeat
from migrated.protocol.messages import PROTOCOL_VERSION, AnyMessage, Hello, Ready, RegionInfo

HELLO = Hello(
    version=PROTOCOL_VERSION,
    session=bytes(range(16)),
    token=bytes(range(32)),
    guest="vm1",
    driver="process",
    mode="hybrid",
    streams=1,
    block_secret=bytes(4104),
    regions=(RegionInfo("ram", 1 << 20, 4096),),
    agent="a test",
)
READY = Ready((4096,))
#: Nothing waits this long unless something is broken.
PATIENCE_SECONDS = 30.0


def sockets() -> tuple[socket.socket, socket.socket]:
    """A connected pair."""
    pair = socket.socketpair()
    for one in pair:
        one.setblocking(False)
    return pair


async def link_on(sock: socket.socket, received: bytes = b"", beat: tuple[float, float] = (5.0, 30.0)) -> ControlLink:
    """A link, not started; ``beat``: interval and limit of its heartbeat, in seconds."""
    reader, writer = await asyncio.open_connection(sock=sock)
    now = asyncio.get_running_loop().time()
    heartbeat = Heartbeat(*beat, now)
    return ControlLink(reader, writer, heartbeat=heartbeat, received=received)


class Stranger:
    """The other end, without any manners of its own: bytes out, messages in."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._decoder = framing.FrameDecoder()
        self._heard: list[AnyMessage] = []

    async def say(self, *messages: AnyMessage | bytes) -> None:
        data = b"".join(m if isinstance(m, bytes) else framing.encode(m) for m in messages)
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def hear(self, kind: type[AnyMessage]) -> AnyMessage:
        """The next message of this kind; what comes before it is dropped."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                while self._heard:
                    message = self._heard.pop(0)
                    if isinstance(message, kind):
                        return message
                data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
                if not data:
                    raise EOFError
                self._heard += self._decoder.feed(data)
