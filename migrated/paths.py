"""Where an agent's files are, unless its configuration says otherwise: agents and their clients agree on these."""

from __future__ import annotations

from pathlib import Path
from typing import Final

CONFIG_DIRECTORY: Final = Path("/etc/migrated")
TLS_DIRECTORY: Final = CONFIG_DIRECTORY / "tls"
#: Of each agent, in a directory with the name of its role.
STATE_DIRECTORY: Final = Path("/run/migrated")
CONTROL_SOCKET_NAME: Final = "control.sock"
