"""An agent's configuration: one TOML file, decoded strictly.

Unknown keys are refused, since a misspelt limit that is silently ignored is worse than a daemon that does not start.
Every error says which file, which key, what is wrong with it and what is allowed; the last comes from the
``description`` beside each field, which docs/configuration.md repeats.
"""

from __future__ import annotations

import difflib
import functools
import re
import socket
import tomllib
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from migrated import units
from migrated.address import Address, parse_address
from migrated.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

Role = Literal["source", "target"]
T = TypeVar("T", bound=msgspec.Struct)
Mode = Literal["hybrid", "precopy", "postcopy"]
Compression = Literal["off", "zstd"]
MODES: Final[tuple[str, ...]] = typing.get_args(Mode)
COMPRESSIONS: Final[tuple[str, ...]] = typing.get_args(Compression)

CONFIG_DIRECTORY: Final = Path("/etc/migrated")
STATE_DIRECTORY: Final = Path("/run/migrated")
CONTROL_SOCKET_NAME: Final = "control.sock"
# Two agents on one host must not collide by default.
DEFAULT_STATUS: Final[dict[str, str]] = {"target": "127.0.0.1:7441", "source": "127.0.0.1:7442"}

_DAY: Final = 86400
GUEST_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
# The control socket's path must fit sockaddr_un.sun_path: 108 bytes with the NUL.
_STATE_DIRECTORY_MAX_BYTES: Final = 90

Seconds = Annotated[float, Meta(gt=0, le=_DAY, description="seconds, more than 0, at most 86400")]
SecondsOrNever = Annotated[float, Meta(ge=0, le=30 * _DAY, description="seconds, 0 for never, at most 2592000")]


class _Section(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Base of the sections: what is not known is refused."""


class AgentSection(_Section, frozen=True):
    """``[agent]``: who we are and where we keep things."""

    state_dir: Annotated[str, Meta(description="an absolute path of at most 90 bytes")] = ""  # filled in by role
    name: Annotated[str, Meta(max_length=255, description="a name people know this host by")] = ""  # host name


class ListenSection(_Section, frozen=True):
    """``[listen]``, target only: where source agents connect."""

    address: Annotated[str, Meta(description="HOST:PORT")] = "0.0.0.0:7440"


class HttpSection(_Section, frozen=True):
    """``[http]``: the read-only status site."""

    status: Annotated[str, Meta(description='HOST:PORT, or "" for no status site')] | None = None  # filled in by role


class TlsSection(_Section, frozen=True):
    """``[tls]``.  TLS comes in a later version; until then the operator says in so many words that there is none."""

    insecure: Annotated[bool, Meta(description="true or false")] = False


class MigrationSection(_Section, frozen=True):
    """``[migration]``: defaults of ``migrated start``."""

    mode: Annotated[Mode, Meta(description="hybrid, precopy or postcopy")] = "hybrid"
    downtime_limit_ms: Annotated[
        float, Meta(gt=0, le=60_000, description="milliseconds, more than 0, at most 60000")
    ] = 50.0
    max_rounds: Annotated[int, Meta(ge=1, le=1000, description="a whole number from 1 to 1000")] = 8
    streams: Annotated[int, Meta(ge=1, le=16, description="a whole number from 1 to 16")] = 2
    max_bandwidth: Annotated[str, Meta(description=units.RATE_EXAMPLES)] = "0"
    drain_bandwidth: Annotated[str, Meta(description=units.RATE_EXAMPLES)] = "0"
    compression: Annotated[Compression, Meta(description="off or zstd")] = "off"


class Timeouts(_Section, frozen=True):
    """``[timeouts]``: limits of every wait, in seconds."""

    connect: Seconds = 10.0  # one attempt to reach the target
    handshake: Seconds = 10.0  # a peer's first message, or a page connection's preface
    guest_start: Seconds = 60.0  # the incoming guest process is up and mapped; memory is reserved
    guest_command: Seconds = 10.0  # one QMP command, or one request to a co-operative guest
    guest_pause: Seconds = 10.0  # the guest has stopped, its I/O drained
    guest_state: Seconds = 60.0  # the guest state is saved, moved and loaded
    switchover: Seconds = 30.0  # barrier, stale map and commit, each
    abort: Seconds = 10.0  # the target has cleaned up after an abort
    release: Seconds = 30.0  # the end of a migration: both sides have let go
    heartbeat_interval: Seconds = 1.0  # a ping after so much silence
    heartbeat_limit: Seconds = 10.0  # a peer silent for so long is lost
    reconnect: SecondsOrNever = 0.0  # a paused post-copy gives up after so long; 0: never
    reconnect_interval: Seconds = 0.5  # first pause between attempts; doubles …
    reconnect_interval_limit: Seconds = 15.0  # … up to this
    shutdown: Seconds = 20.0  # SIGTERM: aborts and farewells


class LimitsSection(_Section, frozen=True):
    """``[limits]``: how much at once."""

    # at once
    max_migrations: Annotated[int, Meta(ge=1, le=1024, description="a whole number from 1 to 1024")] = 8
    # of peers that have not said who they are
    max_connections: Annotated[int, Meta(ge=4, le=65536, description="a whole number from 4 to 65536")] = 256
    # of migrations that are over, kept for `list --all`
    max_records: Annotated[int, Meta(ge=0, le=100_000, description="a whole number from 0 to 100000")] = 200


class _File(_Section, frozen=True):
    """What a file may hold."""

    agent: AgentSection = AgentSection()
    listen: ListenSection | None = None
    http: HttpSection = HttpSection()
    tls: TlsSection = TlsSection()
    migration: MigrationSection = MigrationSection()
    timeouts: Timeouts = Timeouts()
    limits: LimitsSection = LimitsSection()
    guests: Annotated[dict[str, dict[str, Any]], Meta(description="a table [guests.NAME] a guest")] = {}


class AgentConfig(msgspec.Struct, kw_only=True, frozen=True):
    """A checked configuration.  ``guests`` are raw tables, decoded by their drivers."""

    role: Role
    path: str  # for messages
    agent: AgentSection
    listen: ListenSection
    http: HttpSection
    tls: TlsSection
    migration: MigrationSection
    timeouts: Timeouts
    limits: LimitsSection
    guests: dict[str, dict[str, Any]]

    @property
    def state_dir(self) -> Path:
        """Control socket, journals, one directory a guest."""
        return Path(self.agent.state_dir)

    @property
    def control_socket(self) -> Path:
        """Where the CLI finds this agent."""
        return self.state_dir / CONTROL_SOCKET_NAME

    @property
    def listen_address(self) -> Address:
        """Target: where sources connect."""
        return parse_address(self.listen.address, listening=True)

    @property
    def status_address(self) -> Address | None:
        """Where the read-only status site listens, if anywhere."""
        return parse_address(self.http.status, listening=True) if self.http.status else None


def default_path(role: Role) -> Path:
    """``/etc/migrated/ROLE.toml``."""
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
    try:
        file = msgspec.convert(table, _File)
    except msgspec.ValidationError as error:
        raise _explained(error, path) from error
    if file.listen is not None and role == "source":
        raise _bad(path, "listen", "only a target listens", "remove the [listen] table, or run this file as a target")
    state_dir = file.agent.state_dir or str(STATE_DIRECTORY / role)
    status = DEFAULT_STATUS[role] if file.http.status is None else file.http.status
    config = AgentConfig(
        role=role,
        path=path,
        agent=AgentSection(state_dir=state_dir, name=file.agent.name or socket.gethostname()),
        listen=file.listen or ListenSection(),
        http=HttpSection(status=status),
        tls=file.tls,
        migration=file.migration,
        timeouts=file.timeouts,
        limits=file.limits,
        guests=file.guests,
    )
    _check(config)
    return config


def _check(config: AgentConfig) -> None:
    """Refuse what types alone cannot: raise ConfigError."""
    path = config.path
    if not config.state_dir.is_absolute():
        raise _bad(path, "agent.state_dir", f"{config.agent.state_dir!r} is not absolute", "give an absolute path")
    if len(bytes(config.state_dir)) > _STATE_DIRECTORY_MAX_BYTES:
        problem = f"{config.agent.state_dir!r} is longer than {_STATE_DIRECTORY_MAX_BYTES} bytes"
        raise _bad(path, "agent.state_dir", problem, "Unix socket paths are short: give a shorter path")
    if not config.tls.insecure:
        raise _bad(path, "tls.insecure", "connections would need TLS, which this version does not have yet", _TLS_HINT)
    _check_text(path, "migration.max_bandwidth", units.parse_rate, config.migration.max_bandwidth)
    _check_text(path, "migration.drain_bandwidth", units.parse_rate, config.migration.drain_bandwidth)
    listening = functools.partial(parse_address, listening=True)
    _check_text(path, "listen.address", listening, config.listen.address)
    if config.http.status:
        _check_text(path, "http.status", listening, config.http.status)
    limit, interval = config.timeouts.heartbeat_limit, config.timeouts.heartbeat_interval
    if limit < 2 * interval:
        problem = f"{limit:g} s is less than two heartbeat intervals of {interval:g} s"
        hint = "one late heartbeat must not end a session: give more"
        raise _bad(path, "timeouts.heartbeat_limit", problem, hint)
    for name, table in config.guests.items():
        _check_guest(path, name, table)


def _check_text(path: str, key: str, parse: Callable[[str], object], text: str) -> None:
    try:
        parse(text)
    except ConfigError as error:
        raise _bad(path, key, error.message, error.hint) from error


def _check_guest(path: str, name: str, table: dict[str, Any]) -> None:
    if GUEST_NAME.fullmatch(name) is None:
        allowed = "up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        raise _bad(path, f"guests.{name}", f"{name!r} cannot be a guest's name", f"allowed: {allowed}")
    if not isinstance(table.get("driver"), str):
        problem = "not a string" if "driver" in table else "the driver is missing"
        hint = 'say what kind of guest it is: driver = "qemu" or "process"'
        raise _bad(path, f"guests.{name}.driver", problem, hint)


_TLS_HINT: Final = (
    "[tls] may only say insecure = true, which sends guest memory unencrypted to whoever answers: "
    "use it on loopback or on a network of your own (WireGuard, IPsec, a dedicated link)"
)


def _bad(path: str, key: str, problem: str, hint: str) -> ConfigError:
    return ConfigError(f"{path}: {key}: {problem}", hint=hint)


def decode_guest(path: str, name: str, table: dict[str, Any], kind: type[T]) -> T:
    """Decode a ``[guests.NAME]`` table as its driver wants it.  Raises ConfigError naming ``path``, table and key."""
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise _explained(error, path, kind, table=f"guests.{name}") from error


_UNKNOWN_FIELD: Final = re.compile(r"Object contains unknown field `(?P<field>.*)`", re.DOTALL)

_MISSING_FIELD: Final = re.compile(r"Object missing required field `(?P<field>.*)`", re.DOTALL)


def _explained(
    error: msgspec.ValidationError, path: str, root: type[msgspec.Struct] = _File, table: str = ""
) -> ConfigError:
    """Msgspec's message in our words: ``FILE: KEY: problem``, with what is allowed as the hint."""
    problem, _, where = str(error).rpartition(" - at `$")
    if not problem:
        problem, where = str(error), ""
    key = where.removesuffix("`").removeprefix(".").replace("[...]", ".*")
    full = ".".join(part for part in (table, key) if part)
    if unknown := _UNKNOWN_FIELD.fullmatch(problem):
        field = unknown["field"]
        allowed = [entry.encode_name for entry in msgspec.structs.fields(_struct_at(root, key))]
        close = difflib.get_close_matches(field, allowed, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        return _bad(
            path, f"{full}.{field}".removeprefix("."), "no such key", f"{meant}allowed here: {', '.join(allowed)}"
        )
    if missing := _MISSING_FIELD.fullmatch(problem):
        key = f"{key}.{missing['field']}".removeprefix(".")
        full = ".".join(part for part in (table, key) if part)
        problem = "it is missing"
    problem = problem[0].lower() + problem[1:].replace("`", "")
    description = _description_at(root, key)
    hint = f"allowed: {description}" if description else "see docs/configuration.md"
    return _bad(path, full or "the file", problem, hint)


def _struct_at(root: type[msgspec.Struct], key: str) -> type[msgspec.Struct]:
    for field in msgspec.structs.fields(root):
        if key and field.name == key:
            for candidate in (field.type, *typing.get_args(field.type)):
                if isinstance(candidate, type) and issubclass(candidate, msgspec.Struct):
                    return candidate
    return root


def _description_at(root: type[msgspec.Struct], key: str) -> str:
    section, _, name = key.partition(".")
    struct = _struct_at(root, section)
    wanted = name.partition("[")[0] if struct is not root else section.partition("[")[0]
    if not wanted:
        return "a table: [" + section + "]" if struct is not root else ""
    for field in msgspec.structs.fields(struct):
        if field.name == wanted:
            return _description(field.type)
    return ""


def _description(annotation: object) -> str:
    for piece in (annotation, *typing.get_args(annotation)):
        for meta in getattr(piece, "__metadata__", ()):
            if isinstance(meta, Meta) and meta.description:
                return meta.description
    return ""
