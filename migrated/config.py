"""Read an agent's configuration: one TOML file, checked strictly.  Every error names the file, the table and the key.

Each table is a class, and each key a field of it (see `migrated.settings`).
"""

from __future__ import annotations

import fnmatch
import os
import socket
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from migrated.address import Address, parse_address
from migrated.errors import ConfigError
from migrated.guests.libvirt.config import (
    LibvirtSection,
    LibvirtSourceConfig,
    LibvirtSourceSection,
    LibvirtTargetConfig,
    LibvirtTargetSection,
)
from migrated.guests.process.config import ProcessSourceConfig, ProcessTargetConfig
from migrated.guests.qemu.config import QemuSourceConfig, QemuTargetConfig
from migrated.options import EvacuationOptions, MigrationOptions
from migrated.paths import CONFIG_DIRECTORY, CONTROL_SOCKET_NAME, STATE_DIRECTORY, TLS_DIRECTORY
from migrated.settings import GuestName, GuestTable, Seconds, Table, Text, Timeouts, TlsFiles, read, refuse

Role = Literal["source", "target"]

DEFAULT_PORT: Final = 7440
# Two agents on one host must not collide by default.
DEFAULT_STATUS: Final = {"target": Address("127.0.0.1", 7441), "source": Address("127.0.0.1", 7442)}

#: What SIGHUP changes in a running agent: what only later migrations use.
RELOADABLE: Final = frozenset({"evacuation", "guests", "hooks", "libvirt", "migration"})

# The control socket's path must fit sockaddr_un.sun_path: 108 bytes with the NUL.
_STATE_DIRECTORY_MAX_BYTES: Final = 90


def _parse_state_directory(text: str) -> Path:
    if not text.startswith("/"):
        raise ConfigError(f"{text!r} is not absolute", hint="give an absolute path")
    if len(text.encode()) > _STATE_DIRECTORY_MAX_BYTES:
        problem = f"{text!r} is longer than {_STATE_DIRECTORY_MAX_BYTES} bytes"
        raise ConfigError(problem, hint="Unix socket paths are short: give a shorter path")
    return Path(text)


def _parse_listen_address(text: str) -> Address | None:
    return parse_address(text, listening=True) if text else None


def _parse_file(text: str) -> Path:
    if not text.startswith("/"):
        raise ConfigError(f"{text!r} is not absolute", hint="give an absolute path")
    return Path(text)


StateDirectory = Annotated[Path, Text(_parse_state_directory, "path", "an absolute path of at most 90 bytes")]
ListenAddress = Annotated[
    Address, Text(lambda text: parse_address(text, listening=True), "host:port", "HOST:PORT, IPv6 in brackets")
]
StatusAddress = Annotated[Address, Text(_parse_listen_address, "host:port", 'HOST:PORT, or "" for no status site')]
ControlAddress = Annotated[Address, Text(_parse_listen_address, "host:port", 'HOST:PORT, or "" for no remote control')]
File = Annotated[Path, Text(_parse_file, "path", "an absolute path")]
HostName = Annotated[str, Field(max_length=255), AfterValidator(lambda name: name or socket.gethostname())]
SourceGuest = Annotated[QemuSourceConfig | LibvirtSourceConfig | ProcessSourceConfig, Field(discriminator="driver")]
TargetGuest = Annotated[QemuTargetConfig | LibvirtTargetConfig | ProcessTargetConfig, Field(discriminator="driver")]


class AgentSection(Table):
    """``[agent]``: the agent's name and its state directory."""

    state_dir: StateDirectory | None = Field(
        default=None, description="directory of the control socket, the journals and one directory per guest"
    )
    name: HostName = Field(
        default="", validate_default=True, description='name of this host in logs and records; `""`: its host name'
    )


class ListenSection(Table):
    """``[listen]``, target only: where source agents connect."""

    address: ListenAddress | None = Field(default=None, description="where source agents connect")


class ControlSection(Table):
    """``[control]``: who may use the control socket, beside root and the agent's user, and who may from other hosts."""

    owner: str = Field(default="", description="user that owns the control socket, and may do everything")
    group: str = Field(default="", description="group whose members may do everything")
    read_group: str = Field(default="", description="group whose members may read, but give no commands")
    listen: ControlAddress | None = Field(
        default=None, description='where other hosts may give commands, over mutual TLS only; `""`: nowhere'
    )
    peers: list[str] = Field(
        default=[],
        description="whose commands are obeyed there: the certificate must have one of these names; shell patterns",
    )

    @model_validator(mode="after")
    def _for_somebody(self) -> Self:
        if self.listen is not None and not self.peers:
            refuse("listen without peers would obey nobody", "name the certificates that may give commands in peers")
        return self


class HttpSection(Table):
    """``[http]``: the read-only status site."""

    status: StatusAddress | None = Field(default=None, description='address of the status site; `""`: no status site')


class TlsSection(Table):
    """``[tls]``: how the agents know each other.  Without TLS, both settings at the end are needed to leave loopback."""

    ca: File | None = Field(default=None, description="certificates of the authorities that sign the peers' (PEM)")
    cert: File | None = Field(
        default=None,
        description="certificate of this agent, followed by intermediate authorities if there are any (PEM)",
    )
    key: File | None = Field(default=None, description="its private key, unencrypted (PEM)")
    peers: list[str] = Field(
        default=[],
        description="a peer's certificate must have one of these names; shell patterns. `[]`: any peer that an authority has signed",
    )
    insecure: bool = Field(default=False, description="`true`: no TLS, on loopback only")
    trusted_network: bool = Field(
        default=False,
        description="`true`, with `insecure`: on any network. Whoever reaches it can read and replace guests",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = self.model_fields_set & {"ca", "cert", "key", "peers"}
        if self.insecure and given:
            refuse(f"insecure = true makes {', '.join(sorted(given))} useless", "remove insecure, or the others")
        if self.trusted_network and not self.insecure:
            refuse("trusted_network = true is only for insecure = true", "remove it: with TLS no network is trusted")
        return self


class LimitsSection(Table):
    """``[limits]``: how much the agent handles at once."""

    max_migrations: Annotated[int, Field(ge=1, le=1024)] = Field(default=8, description="migrations at the same time")
    max_connections: Annotated[int, Field(ge=4, le=65536)] = Field(
        default=256,
        description="connections from peers that have not identified themselves; beyond it, the peer with the most loses its oldest",
    )
    max_records: Annotated[int, Field(ge=0, le=100_000)] = Field(
        default=200, description="finished migrations that `migrated list --all` shows"
    )


def _parse_program(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or not path.is_file() or not os.access(path, os.X_OK):
        raise ConfigError(f"{text!r} is not an executable file", hint="give the absolute path of a program")
    return path


Program = Annotated[Path, Text(_parse_program, "path", "the absolute path of an executable file")]
StateName = Literal[
    "precopy", "switchover", "postcopy", "postcopy-paused", "recovering", "completed", "aborted", "failed"
]
_BEFORE: Final = "phases before which it is asked: if it fails, the migration is rolled back"


class HooksSection(Table):
    """``[hooks]``: the operator's program, and when the agent runs it."""

    program: Program | None = Field(default=None, description="run as `PROGRAM before PHASE` or `PROGRAM on STATE`")
    timeout: Seconds = Field(default=10.0, description="seconds; a hook that takes longer has failed and is killed")
    before: Sequence[str] = []
    on: list[StateName] = Field(default=[], description="states which it is told that the migration has entered")

    @model_validator(mode="after")
    def _has_program(self) -> Self:
        if self.program is None and (self.before or self.on):
            refuse("it has no program to run", "add program")
        return self


class SourceHooksSection(HooksSection):
    """``[hooks]`` of a source."""

    before: list[Literal["setup", "precopy", "switchover"]] = Field(default=[], description=_BEFORE)


class TargetHooksSection(HooksSection):
    """``[hooks]`` of a target."""

    before: list[Literal["setup", "precopy", "postcopy"]] = Field(default=[], description=_BEFORE)


class GuestRank(Table):
    """One entry of ``[[evacuation.guests]]``."""

    match: str = Field(description='pattern of guests\' names: `"*"`, `"web-*"`')
    priority: Annotated[int, Field(ge=-1000, le=1000)] = Field(
        default=0, description="order of evacuation, the highest first; of the first entry that matches"
    )
    labels: list[GuestName] = Field(
        default=[], description="words for `--only label=…` and `--except label=…`; of all entries that match"
    )


class EvacuationSection(EvacuationOptions):
    """``[evacuation]``, source only: the defaults of ``migrated evacuate``, and the ranks of guests."""

    guests: list[GuestRank] = Field(default=[], description="priorities and labels, see below")

    def rank(self, guest: str) -> tuple[int, list[str]]:
        """Return a guest's priority and labels."""
        ranks = [rank for rank in self.guests if fnmatch.fnmatchcase(guest, rank.match)]
        labels = dict.fromkeys(label for rank in ranks for label in rank.labels)
        return (ranks[0].priority if ranks else 0), list(labels)


class TracingSection(Table):
    """``[tracing]``: whether to trace migrations with OpenTelemetry, whose own variables (OTEL_*) say all else."""

    enabled: bool = Field(
        default=False,
        description="`true`: send a span for each phase of a migration to an OpenTelemetry collector; needs the extra `otel`",
    )


class AgentConfig(Table):
    """A configuration file."""

    role: ClassVar[Role]

    agent: AgentSection = AgentSection()
    listen: ListenSection = ListenSection()
    control: ControlSection = ControlSection()
    http: HttpSection = HttpSection()
    tls: TlsSection = TlsSection()
    migration: MigrationOptions = MigrationOptions()
    timeouts: Timeouts = Timeouts()
    limits: LimitsSection = LimitsSection()
    hooks: HooksSection = HooksSection()
    tracing: TracingSection = TracingSection()
    libvirt: LibvirtSection = LibvirtSection()
    evacuation: EvacuationSection = EvacuationSection()
    guests: Mapping[GuestName, GuestTable] = {}

    _path: str = ""

    def model_post_init(self, context: Any) -> None:
        """Store the file's path for messages."""
        self._path = (context or {}).get("path", "")

    @property
    def path(self) -> str:
        """The file's path, for messages."""
        return self._path

    def reloaded(self, new: AgentConfig) -> tuple[Self, list[str]]:
        """Return this configuration with what a running agent takes over of ``new``, and the names of the tables that wait.

        The latter have changed as well, and count from the agent's next start on.
        """
        changed = [name for name in type(self).model_fields if getattr(self, name) != getattr(new, name)]
        now = {name: getattr(new, name) for name in changed if name in RELOADABLE}
        return self.model_copy(update=now), [name for name in changed if name not in RELOADABLE]

    def guest_table(self, name: str) -> GuestTable | None:
        """Return ``[guests.NAME]``, or its substitute from ``[libvirt]``; None: no such guest."""
        return self.guests.get(name) or self.libvirt.table(name)

    @property
    def state_dir(self) -> Path:
        """The directory of the control socket and the journals, with one directory per guest."""
        return self.agent.state_dir or STATE_DIRECTORY / self.role

    @property
    def control_socket(self) -> Path:
        """The control socket, where the CLI finds this agent."""
        return self.state_dir / CONTROL_SOCKET_NAME

    @property
    def listen_address(self) -> Address:
        """The address where a target listens for sources: without TLS on loopback, unless the network is trusted."""
        if self.listen.address is not None:
            return self.listen.address
        return Address("127.0.0.1" if self.loopback_only else "0.0.0.0", DEFAULT_PORT)

    @property
    def loopback_only(self) -> bool:
        """Whether nothing protects the connections, so that they may not leave this host."""
        return self.tls.insecure and not self.tls.trusted_network

    @property
    def tls_files(self) -> TlsFiles | None:
        """The files of TLS: those that are configured, else systemd's credentials, else those in `TLS_DIRECTORY`."""
        if self.tls.insecure:
            return None
        files = self._found_tls_files(self.role)
        return TlsFiles(self.tls.ca or files.ca, self.tls.cert or files.cert, self.tls.key or files.key)

    @property
    def control_tls_files(self) -> TlsFiles | None:
        """The files of TLS for remote control, where every agent is a server."""
        if self.role == "target" or self.tls.insecure:
            return self.tls_files
        files = self._found_tls_files("target")
        # Beside those that are configured, if any are.
        if self.tls.cert is not None:
            files = TlsFiles.conventional("target", self.tls.cert.parent)
        return TlsFiles(self.tls.ca or files.ca, files.cert, files.key)

    @staticmethod
    def _found_tls_files(role: Role) -> TlsFiles:
        files = TlsFiles.conventional(role, TLS_DIRECTORY)
        credentials = os.environ.get("CREDENTIALS_DIRECTORY")
        if credentials:
            ours = TlsFiles.conventional(role, Path(credentials))
            files = TlsFiles(*(own if own.exists() else file for own, file in zip(ours, files, strict=True)))
        return files

    @model_validator(mode="after")
    def _remote_control_needs_tls(self) -> Self:
        if self.control.listen is not None and self.tls.insecure:
            refuse("control.listen needs TLS, and tls.insecure does without", "remove one of them")
        return self

    @property
    def status_address(self) -> Address | None:
        """The address of the read-only status site, if there is one."""
        return self.http.status if "status" in self.http.model_fields_set else DEFAULT_STATUS[self.role]


class SourceConfig(AgentConfig):
    """``source.toml``."""

    role = "source"

    hooks: SourceHooksSection = SourceHooksSection()
    libvirt: LibvirtSourceSection = LibvirtSourceSection()
    guests: Mapping[GuestName, SourceGuest] = {}

    @field_validator("listen")
    @classmethod
    def _listens_nowhere(cls, _listen: ListenSection) -> NoReturn:
        refuse("only a target listens", "remove the [listen] table, or run this file as a target")


class TargetConfig(AgentConfig):
    """``target.toml``."""

    role = "target"

    hooks: TargetHooksSection = TargetHooksSection()
    libvirt: LibvirtTargetSection = LibvirtTargetSection()
    guests: Mapping[GuestName, TargetGuest] = {}

    @field_validator("evacuation")
    @classmethod
    def _evacuates_nothing(cls, _evacuation: EvacuationSection) -> NoReturn:
        refuse("guests leave through a source", "remove the [evacuation] table, or run this file as a source")

    @model_validator(mode="after")
    def _protected(self) -> Self:
        if self.loopback_only and not self.listen_address.is_loopback:
            refuse(
                f"tls.insecure: it would listen on {self.listen_address} without TLS",
                "let it listen on loopback, give it certificates (`migrated certificates --help`), or, on a network "
                "that nobody else can reach, set trusted_network = true",
            )
        return self


KINDS: Final[dict[Role, type[AgentConfig]]] = {"source": SourceConfig, "target": TargetConfig}


def default_path(role: Role) -> Path:
    """Return ``/etc/migrated/ROLE.toml``."""
    return CONFIG_DIRECTORY / f"{role}.toml"


def load(path: str | Path | None, role: Role) -> AgentConfig:
    """Read, decode and check a file; ``None``: `default_path`.  Raises ConfigError."""
    file = default_path(role) if path is None else Path(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        message = f"{file}: no such configuration file"
        hint = f"write one (docs/configuration.md, config/{role}.toml) or give --config"
        raise ConfigError(message, hint=hint) from error
    except OSError as error:
        message = f"{file}: {error.strerror}"
        raise ConfigError(message, hint="the configuration must be a file this user may read") from error
    except UnicodeDecodeError as error:
        message = f"{file}: not UTF-8 at byte {error.start}"
        raise ConfigError(message, hint="TOML files are UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        message = f"{file}: not TOML: {error}"
        raise ConfigError(message, hint="see https://toml.io; strings need quotes, tables are [name]") from error
    return decode(table, role, path=str(file))


def decode(table: dict[str, Any], role: Role, *, path: str = "<memory>") -> AgentConfig:
    """Decode and check a table that is already in memory (tests, the demo).  Raises ConfigError naming ``path``."""
    return read(KINDS[role], table, path, path=path)
