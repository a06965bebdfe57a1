"""Bound the connections of clients that nobody knows yet: how many there are, and whose go first when they are too many.

A newcomer is always let in, and beyond the limit the client with the most connections loses its oldest one.  So a host
that opens thousands pushes out its own.  Those of others stay, and a client that says at once who it is gets through
even if strangers take every place: it is no longer the oldest one's turn before it has left.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Admission(Generic[T]):
    """The connections that are in, by client."""

    def __init__(self, limit: int) -> None:
        """Let at most ``limit`` in."""
        self._limit = limit
        self._clients: dict[Hashable, dict[T, None]] = {}  # each oldest first
        self._client_of: dict[T, Hashable] = {}

    def __len__(self) -> int:
        """Return how many are in."""
        return len(self._client_of)

    def enter(self, client: Hashable, one: T) -> T | None:
        """Let ``one`` in; return the one that had to leave for it, which the caller closes."""
        self._clients.setdefault(client, {})[one] = None
        self._client_of[one] = client
        if len(self) <= self._limit:
            return None
        most = max(self._clients.values(), key=len)
        dropped = next(iter(most))
        self.leave(dropped)
        return dropped

    def leave(self, one: T) -> None:
        """Let ``one`` out, if it is in."""
        client = self._client_of.pop(one, None)
        if client is not None:
            connections = self._clients[client]
            del connections[one]
            if not connections:
                del self._clients[client]


def client_at(host: str) -> str:
    """Return what to count connections from ``host`` under: its address, or its /64 network with IPv6."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
