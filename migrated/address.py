"""TCP addresses in the form ``HOST:PORT``, with IPv6 addresses in brackets.

The command line and the configuration files parse theirs here.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, NamedTuple

from migrated.errors import ConfigError

_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?\.?", re.ASCII)
_ALLOWED: Final = "give HOST:PORT, such as host-b.example:7440, 192.0.2.7:7440 or [2001:db8::7]:7440"


class Address(NamedTuple):
    """A TCP address: ``host`` without brackets, ``port`` 1 … 65535 (0, for listening only: any free port)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(text: str, *, listening: bool = False) -> Address:
    """Parse ``"host:7440"`` or ``"[::1]:7440"``.  Port 0 is allowed only when ``listening``.  Raises ConfigError."""
    host, colon, port_text = text.strip().rpartition(":")
    if not colon or not host:
        message = f"{text!r} is not an address: " + ("the port is missing" if not colon else "the host is missing")
        raise ConfigError(message, hint=_ALLOWED)
    host = _checked_host(host, text)
    if not (port_text.isascii() and port_text.isdigit() and len(port_text) <= 5) or int(port_text) > 65535:
        message = f"{text!r} is not an address: port {port_text!r} is not a number up to 65535"
        raise ConfigError(message, hint=_ALLOWED)
    port = int(port_text)
    if port == 0 and not listening:
        message = f"{text!r} is not an address to connect to: the port is 0"
        raise ConfigError(message, hint=_ALLOWED)
    return Address(host, port)


def _checked_host(host: str, text: str) -> str:
    if host.startswith("[") and host.endswith("]"):
        inner = host[1:-1]
        try:
            ipaddress.IPv6Address(inner)  # also accepts a zone (fe80::1%eth0)
        except ValueError as error:
            message = f"{text!r} is not an address: {error}"
            raise ConfigError(message, hint=_ALLOWED) from error
        return inner
    if _HOST.fullmatch(host) is None:
        message = f"{text!r} is not an address: {host!r} is not a host name, and an IPv6 address needs brackets"
        raise ConfigError(message, hint=_ALLOWED)
    return host
