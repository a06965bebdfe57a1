"""Define tables of keys: the base class of configuration tables and requests, and the kinds of value they share.

A key is declared once, as a field.  Validation enforces its type, errors state what the type allows, and the command
line parses by it.  docs/configuration.md and ``--help`` show its default and description.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import reprlib
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from migrated import units
from migrated.errors import ConfigError

T = TypeVar("T", bound="Table")

_DAY: Final = 86400
GUEST_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_SOCKET_PATH_MAX_BYTES: Final = 107  # sockaddr_un.sun_path has 108, with the NUL
#: How errors and documentation state the bounds of a number and the length of a text.
_BOUNDS: Final = {"gt": "above {:,}", "ge": "from {:,}", "le": "to {:,}", "max_length": "of at most {} characters"}


class Table(BaseModel):
    """A table of keys.  Unknown keys are refused: silently ignoring a misspelt limit would be worse."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Annotates a value that is written as text.  ``parse`` raises ConfigError; ``--help`` shows ``name``."""

    parse: Callable[[str], Any]
    name: str
    allowed: str
    write: Callable[[Any], str] = str

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return how pydantic validates and serializes the value."""
        written = core_schema.plain_serializer_function_ser_schema(self.write, when_used="json")
        return core_schema.no_info_plain_validator_function(self._read, serialization=written)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe the value: text, of which a schema cannot say more."""
        return {"type": "string", "title": self.name, "description": self.allowed}

    def _read(self, value: object) -> Any:
        if not isinstance(value, str):
            refuse(f"{reprlib.repr(value)} is not a string", f"allowed: {self.allowed}")
        try:
            return self.parse(value)
        except ConfigError as error:
            refuse(error.message, error.hint or f"allowed: {self.allowed}")


def refuse(problem: str, hint: str) -> NoReturn:
    """Refuse a value in a validator: `explain` passes both texts on."""
    raise PydanticCustomError("refused", "{problem}", {"problem": problem, "hint": hint})


def _parse_socket_path(text: str) -> str:
    if not text.startswith("/") or len(text.encode()) > _SOCKET_PATH_MAX_BYTES:
        raise ConfigError(f"{text!r} is not an absolute path of at most {_SOCKET_PATH_MAX_BYTES} bytes")
    return text


def _check_guest_name(name: str) -> str:
    if GUEST_NAME.fullmatch(name) is None:
        allowed = "up to 64 letters, digits, '.', '_' and '-', the first a letter or digit"
        refuse(f"{name!r} cannot be a guest's name", f"allowed: {allowed}")
    return name


Seconds = Annotated[float, Field(gt=0, le=_DAY)]
SecondsOrNever = Annotated[float, Field(ge=0, le=30 * _DAY)]
Rate = Annotated[
    int, Text(units.parse_rate, "rate", units.RATE_EXAMPLES, lambda rate: f"{rate}B" if rate else "0")
]  # bytes a second; 0: no limit
PageSize = Annotated[int, Text(units.parse_size, "size", '"4K", "2M" or "1G"', lambda size: f"{size}")]  # bytes
SocketPath = Annotated[
    str, Text(_parse_socket_path, "path", f"an absolute path of at most {_SOCKET_PATH_MAX_BYTES} bytes")
]
OptionalSocketPath = Annotated[
    str, Text(lambda text: text and _parse_socket_path(text), "path", 'an absolute path of at most 107 bytes, or ""')
]
GuestName = Annotated[str, AfterValidator(_check_guest_name)]
Command = Annotated[list[str], Field(min_length=1)]


TLS_CA_FILE: Final = "ca-cert.pem"


class TlsFiles(NamedTuple):
    """Paths of PEM files: the authorities that sign peers' certificates, our own certificate, and its key."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def conventional(cls, role: str, directory: Path) -> TlsFiles:
        """Return the files of a role in a directory, with the names that QEMU uses: the target is the TLS server."""
        kind = "server" if role == "target" else "client"
        return cls(directory / TLS_CA_FILE, directory / f"{kind}-cert.pem", directory / f"{kind}-key.pem")


class Timeouts(Table):
    """``[timeouts]``: limits of every wait, in seconds."""

    connect: Seconds = Field(default=10.0, description="one attempt to reach the target")
    handshake: Seconds = Field(default=10.0, description="a peer's first message, or a page connection's preface")
    guest_start: Seconds = Field(default=60.0, description="the target has reserved memory and started its side")
    guest_command: Seconds = Field(default=10.0, description="one command to a guest")
    guest_pause: Seconds = Field(default=10.0, description="the guest has stopped and drained its I/O")
    guest_state: Seconds = Field(default=60.0, description="the guest state is saved, sent and loaded")
    switchover: Seconds = Field(default=30.0, description="barrier, stale map and commit, each")
    abort: Seconds = Field(default=10.0, description="the target has cleaned up after an abort")
    release: Seconds = Field(default=30.0, description="both sides have released the guest at the end")
    heartbeat_interval: Seconds = Field(default=1.0, description="a ping is sent after this much silence")
    heartbeat_limit: Seconds = Field(
        default=10.0,
        validate_default=True,
        description="a peer that is silent for this long is lost; at least two intervals",
    )
    reconnect: SecondsOrNever = Field(
        default=0.0, description="a paused post-copy fails after this long; 0: never, the guest waits"
    )
    reconnect_interval: Seconds = Field(
        default=0.5, description="first pause between attempts; it doubles after each failure …"
    )
    reconnect_interval_limit: Seconds = Field(default=15.0, description="… up to this")
    shutdown: Seconds = Field(
        default=20.0,
        description="after SIGTERM: aborting migrations and closing connections. A guest in post-copy is served as long as it needs",
    )

    @field_validator("heartbeat_limit")
    @classmethod
    def _two_heartbeats(cls, limit: float, info: ValidationInfo) -> float:
        interval = info.data.get("heartbeat_interval", 0.0)
        if limit < 2 * interval:
            refuse(
                f"{limit:g} s is less than two heartbeat intervals of {interval:g} s",
                "one late heartbeat must not end a session: give more",
            )
        return limit


class GuestTable(Table):
    """``[guests.NAME]``; the base class of the drivers' tables."""

    driver: str


class MemoryTable(GuestTable):
    """A guest whose memory the agent makes.

    ``reserve``: false if the host has less memory than the guest (see memory/memfd.py).
    """

    page_size: PageSize | None = Field(
        default=None, description="page size of the guest's memory; by default 2M, or 4K if the host lacks huge pages"
    )
    reserve: bool = Field(
        default=True, description="`false`: pages are taken as they are needed, for guests larger than the host"
    )


# ---------------------------------------------------------------- errors


def read(kind: type[T], values: object, where: str, **context: object) -> T:
    """Check ``values`` and return them as a table.  Raises ConfigError with ``where`` first in its message."""
    try:
        return kind.model_validate(values, context=context)
    except ValidationError as error:
        problem, hint = explain(error, kind)
        raise ConfigError(f"{where}: {problem}", hint=hint) from error


def explain(error: ValidationError, root: type[Table]) -> tuple[str, str]:
    """Return what is wrong as ``("KEY: PROBLEM", HINT)``; of several errors, an unknown key explains the others."""
    found = min(error.errors(include_url=False), key=lambda one: one["type"] != "extra_forbidden")
    context = found.get("ctx", {})
    keys, tables, field = _find(root, found["loc"])
    match found["type"]:
        case "refused":
            problem, hint = context["problem"], context["hint"]
        case "json_invalid":
            problem, hint = f"not JSON: {context['error']}", _keys_of(root)
        case "missing":
            problem, hint = "it is missing", f"allowed: {allowed(field)}" if field is not None else ""
        case "extra_forbidden":
            close = difflib.get_close_matches(keys[-1], tables[0].model_fields, n=1)
            problem, hint = "no such key", (f"did you mean {close[0]!r}? " if close else "") + _keys_of(tables[0])
        case "union_tag_invalid" | "union_tag_not_found":
            keys.append("driver")
            problem = f"{context['tag']!r} is unknown" if "tag" in context else "the driver is missing"
            hint = "say what kind of guest it is: driver = " + _either([f'"{_driver(table)}"' for table in tables])
        case _:
            problem = f"{reprlib.repr(found['input'])} is not allowed"
            hint = f"allowed: {allowed(field)}" if field is not None else _keys_of(root)
    return ": ".join(part for part in (".".join(keys), problem) if part), hint


def parse_argument(field: FieldInfo, text: str) -> Any:
    """Check a command line's value of a key, and return it as in JSON.  Raises ConfigError."""
    annotation: Any = Annotated[field.annotation, *field.metadata]
    kind: TypeAdapter[Any] = TypeAdapter(annotation)
    try:
        return kind.dump_python(kind.validate_strings(text), mode="json")
    except ValidationError as error:
        context = error.errors()[0].get("ctx", {})
        problem, hint = (
            context.get("problem", f"{text!r} is not allowed"),
            context.get("hint", f"allowed: {allowed(field)}"),
        )
        raise ConfigError(problem, hint=hint) from error


def _find(root: type[Table], location: tuple[int | str, ...]) -> tuple[list[str], list[type[Table]], FieldInfo | None]:
    """Return the keys in an error's location, the table (or kinds of table) it leads to, and its last field."""
    tables, field = [root], None
    keys: list[str] = []
    for part in location:
        if len(tables) > 1 and (chosen := [table for table in tables if _driver(table) == part]):
            tables = chosen  # pydantic names the kind of table that it chose, which is no key of the file
            continue
        if part == "[key]":  # the key itself is wrong: the part before
            continue
        keys.append(str(part))
        if len(tables) == 1 and (known := tables[0].model_fields.get(str(part))) is not None:
            field, tables = known, _tables_in(known.annotation)
    return keys, tables, field


def _driver(table: type[Table]) -> object:
    return table.model_fields["driver"].default


def _tables_in(annotation: object) -> list[type[Table]]:
    if inspect.isclass(annotation) and issubclass(annotation, Table):
        return [annotation]
    return [table for part in typing.get_args(annotation) for table in _tables_in(part)]


def _keys_of(table: type[Table]) -> str:
    return f"allowed here: {', '.join(table.model_fields) or 'nothing'}"


def _either(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def allowed(field: FieldInfo) -> str:
    """Return which values a key may have, as text."""
    if (text := text_of(field)) is not None:
        return text.allowed
    if _tables_in(field.annotation):
        return "a list of tables" if typing.get_origin(field.annotation) is list else "a table"
    if typing.get_origin(field.annotation) is dict:
        return "a table of strings"
    if typing.get_origin(field.annotation) is Literal:
        return _either([str(value) for value in typing.get_args(field.annotation)])
    items = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is list else ()
    if items and typing.get_origin(items[0]) is Literal:
        return f"a list of {_either([str(choice) for choice in typing.get_args(items[0])])}"
    bounds = {name: getattr(piece, name) for piece in field.metadata for name in _BOUNDS if hasattr(piece, name)}
    kinds: dict[object, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
    words = [_BOUNDS[name].format(bound) for name, bound in bounds.items() if bound is not None]
    return " ".join([kinds.get(field.annotation, "a list of strings"), *words])


def text_of(field: FieldInfo) -> Text | None:
    """Return how the value is written, if its type defines that."""
    pieces = [*field.metadata]
    for part in typing.get_args(field.annotation):  # PageSize | None
        pieces += getattr(part, "__metadata__", ())
    return next((piece for piece in pieces if isinstance(piece, Text)), None)
