"""Define the commands that ask an agent about migrations: start, status, list, wait, abort and the other verbs.

`Client` carries their requests, and an option per key comes from the tables of `migrated.options`.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
import typing
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

import click
import msgspec
from rich.live import Live

from migrated import settings, units
from migrated.cli import failure, progress, rendering
from migrated.cli.following import Following, OnTimeout
from migrated.client import Client, Record, SetRequest, StartRequest, parse_address
from migrated.errors import ConfigError
from migrated.options import DomainOptions, Limits, MigrationOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from pydantic.fields import FieldInfo

F = TypeVar("F", bound="Callable[..., Any]")

_WATCH_SECONDS: Final = 1.0


class _Value(click.ParamType[Any]):
    """The value of a key, checked here as the agent will check it and passed on as in JSON."""

    def __init__(self, field: FieldInfo) -> None:
        text = settings.text_of(field)
        self.name = text.name if text is not None else {int: "n", float: "ms"}[cast("type", field.annotation)]
        self._field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return settings.parse_argument(self._field, value)
        except ConfigError as error:
            self.fail(f"{error.message}; {error.hint}", param, ctx)


def options(table: type[settings.Table], *names: str) -> Callable[[F], F]:
    """Add a flag for each key of the table, or for those with these names."""

    def add(function: F) -> F:
        for name in reversed(names or tuple(table.model_fields)):
            field = table.model_fields[name]
            if field.annotation is bool:  # three states: left out, too
                both = f"{_flag(name)}/{_flag(f'no_{name}')}"
                function = click.option(both, name, default=None, help=_help(field))(function)
                continue
            values = typing.get_args(field.annotation)
            function = click.option(
                _flag(name),
                name,
                type=click.Choice(values) if typing.get_origin(field.annotation) is Literal else _Value(field),
                required=field.is_required(),
                help=_help(field),
            )(function)
        return function

    return add


def _flag(name: str) -> str:
    return f"--{name.removesuffix('_ms').replace('_', '-')}"


def _help(field: FieldInfo) -> str:
    """Return what a key is for, and which values it may have."""
    text = field.description or ""
    return f"{text[:1].upper()}{text[1:]} ({settings.allowed(field)})."


def agent_verb(function: Callable[..., Coroutine[Any, Any, int]]) -> Callable[..., int]:
    """Make a command of a coroutine function: add ``--agent`` and pass a connected client as first argument."""

    @functools.wraps(function)
    def command(agent: str | None, **arguments: Any) -> int:
        async def call() -> int:
            async with Client(agent or click.get_current_context().find_root().obj) as client:
                return await function(client, **arguments)

        return asyncio.run(call())

    option = click.option(
        "--agent",
        metavar="PATH|URL",
        envvar="MIGRATED_AGENT",
        help="Control socket or state directory of the agent, or URL of its status site "
        "(default: this host's source, else its target).",
    )
    decorated: Callable[..., int] = option(command)
    return decorated


def json_flag(function: F) -> F:
    """Add ``--json``."""
    decorated: F = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)
    return decorated


def _show(record: Record, *, as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        rendering.console().print(rendering.summary(record))


def print_json(value: Any) -> None:
    """Print one JSON object on one line."""
    print(msgspec.json.encode(value).decode(), flush=True)


# ---------------------------------------------------------------- start, wait

_timeout_option: Final = click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Wait at most so long."
)


@click.command()
@click.argument("guest")
@options(StartRequest, "to")
@options(MigrationOptions)
@options(DomainOptions)
@click.option("--wait", is_flag=True, help="Wait until it has ended, and show progress.")
@_timeout_option
@click.option(
    "--on-timeout",
    type=click.Choice(typing.get_args(OnTimeout)),
    help="What to do then (default: stop waiting, exit code 124). abort: abort the migration if it still can be. "
    "postcopy: end pre-copy and switch over. pause: end pre-copy, and send the rest while the guest is paused.",
)
@json_flag
@agent_verb
async def start(
    client: Client, *, wait: bool, timeout: float | None, on_timeout: OnTimeout | None, as_json: bool, **request: Any
) -> int:
    """Move GUEST to another host; prints the migration's id.  Options left out are the configuration's.

    --timeout waits, too.
    """
    body = {key: value for key, value in request.items() if value is not None}
    if on_timeout is not None and timeout is None:
        raise click.UsageError("--on-timeout needs --timeout", click.get_current_context())
    if on_timeout == "postcopy" and body.setdefault("mode", "hybrid") == "precopy":
        raise click.UsageError("in mode precopy there is no post-copy to switch to", click.get_current_context())
    record = await client.start(StartRequest.model_validate(body))
    if not wait and timeout is None:
        print_json(record) if as_json else print(record.id)
        return failure.DONE
    if not as_json:
        print(record.id, flush=True)
    following = Following(
        client, record, quiet=as_json, timeout_seconds=timeout, on_timeout=on_timeout, ask=not as_json
    )
    return await _follow(following, as_json=as_json)


@click.command()
@click.argument("id")
@_timeout_option
@click.option("--quiet", is_flag=True, help="No progress.")
@json_flag
@agent_verb
async def wait(client: Client, *, id: str, timeout: float | None, quiet: bool, as_json: bool) -> int:
    """Wait until a migration has ended; the exit code says how it ended."""
    record = await client.migration(id)
    following = Following(client, record, quiet=quiet or as_json, timeout_seconds=timeout)
    return await _follow(following, as_json=as_json)


async def _follow(following: Following, *, as_json: bool) -> int:
    """Wait until the migration has ended, then show its summary."""
    record = await following.run()
    if record is None:
        return failure.INTERRUPTED
    _show(record, as_json=as_json)
    return failure.exit_code_of_record(record)


# ---------------------------------------------------------------- status, list


@click.command()
@click.argument("id", required=False)
@click.option(
    "--watch", is_flag=True, help="Repeat until it has ended or is interrupted (with --json: one object per line)."
)
@json_flag
@agent_verb
async def status(client: Client, *, id: str | None, watch: bool, as_json: bool) -> int:
    """Show one migration, or the agent and its active migrations."""
    if id is not None:
        return await _status_of_one(client, id, watch=watch, as_json=as_json)
    if not watch:
        await _print_agent(client, as_json=as_json)
        return failure.DONE
    return await _watch_agent(client, as_json=as_json)


async def _status_of_one(client: Client, migration: str, *, watch: bool, as_json: bool) -> int:
    record = await client.migration(migration)
    if not watch:
        _show(record, as_json=as_json)
    elif not as_json:
        return await _follow(Following(client, record), as_json=False)
    else:
        async for latest in client.events(migration):
            record = latest
            print_json(record)
    return failure.exit_code_of_record(record)


async def _print_agent(client: Client, *, as_json: bool) -> None:
    about = await client.about()
    if as_json:
        print_json(msgspec.structs.replace(about, migrations=await client.migrations()))
        return
    print(rendering.agent_line(about))
    print(f"guests: {', '.join(about.guests) or 'none'}")
    if about.migrations:
        rendering.console().print(rendering.migrations_table(about.migrations))
    else:
        print("no migration is under way")


async def _watch_agent(client: Client, *, as_json: bool) -> int:
    out = rendering.console()
    if as_json or not out.is_terminal:
        while True:
            await _print_agent(client, as_json=as_json)
            await asyncio.sleep(_WATCH_SECONDS)
    with Live(console=out, auto_refresh=False) as live:
        while True:
            live.update(progress.table(await client.migrations(ended=False)), refresh=True)
            await asyncio.sleep(_WATCH_SECONDS)


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Include migrations that have ended.")
@json_flag
@agent_verb
async def list_(client: Client, *, everything: bool, as_json: bool) -> int:
    """List the active migrations, or all that the agent remembers."""
    records = await client.migrations(ended=everything)
    if as_json:
        print_json({"migrations": records})
        return failure.DONE
    if records:
        rendering.console().print(rendering.migrations_table(records))
    else:
        print("no migrations" if everything else "no migration is under way; --all shows those that have ended")
    return failure.DONE


# ---------------------------------------------------------------- verbs on one migration


@click.command()
@click.argument("id")
@json_flag
@agent_verb
async def abort(client: Client, *, id: str, as_json: bool) -> int:
    """End a migration before the switchover; the guest runs on at the source."""
    return _done(await client.abort(id), as_json=as_json, word="aborting")


@click.command()
@click.argument("id")
@json_flag
@agent_verb
async def switchover(client: Client, *, id: str, as_json: bool) -> int:
    """End pre-copy after the current round, and move the guest."""
    return _done(await client.switchover(id), as_json=as_json, word="switching over")


@click.command()
@click.argument("id")
@click.option(
    "--to", type=_Value(StartRequest.model_fields["to"]), help="Where the target agent is now, if it has moved."
)
@json_flag
@agent_verb
async def resume(client: Client, *, id: str, to: str | None, as_json: bool) -> int:
    """Reconnect a paused post-copy now."""
    address = None if to is None else parse_address(to)
    return _done(await client.resume(id, to=address), as_json=as_json, word="reconnecting")


@click.command("set")
@click.argument("id")
@options(Limits)
@json_flag
@agent_verb
async def set_(client: Client, *, id: str, as_json: bool, **values: Any) -> int:
    """Change limits of an active migration."""
    body = {key: value for key, value in values.items() if value is not None}
    if not body:
        message = f"nothing to set: give at least one of {', '.join(map(_flag, Limits.model_fields))}"
        raise click.UsageError(message, click.get_current_context())
    return _done(await client.set(id, SetRequest.model_validate(body)), as_json=as_json, word="set")


def _confirmed_verb(
    verb: str,
    act: Callable[..., Coroutine[Any, Any, Record]],
    *,
    word: str,
    risk: str,
    warning: Callable[[Record], str],
    text: str,
) -> click.Command:
    """Make a command that does harm if it is wrong, and asks for the guest's name first."""

    @click.command(verb, help=text)
    @click.argument("id")
    @click.option("--confirm", metavar="GUEST", help="The guest's name, instead of being asked for it.")
    @json_flag
    @agent_verb
    async def command(client: Client, *, id: str, confirm: str | None, as_json: bool) -> int:
        record = await client.migration(id)
        if confirm is None:
            if as_json or not sys.stdin.isatty():
                message = f"{verb} {risk} and must be confirmed"
                raise ConfigError(message, code="not-confirmed", hint=f"give --confirm {record.guest}")
            click.echo(warning(record))
            # This blocks the loop, which has nothing else to do.
            confirm = str(click.prompt(f"Type the guest's name ({record.guest}) to go on"))
        if confirm != record.guest:
            message = f"{confirm!r} is not the guest's name: nothing was done"
            raise ConfigError(message, code="not-confirmed", hint=f"the guest is {record.guest}")
        return _done(await act(client, record, confirm=confirm), as_json=as_json, word=word)

    return command


abandon = _confirmed_verb(
    "abandon",
    Client.abandon,
    word="abandoned",
    risk="destroys guest memory",
    warning=lambda record: (
        f"{format_loss(record)}\nThis cannot be undone. If the source can come back, wait for it instead."
    ),
    text="""Give up a source that is lost for good: memory it had not sent is LOST.

    Pages that never arrived are poisoned: the guest gets a memory error where it touches one, instead of waiting for ever.
    """,
)
force_run = _confirmed_verb(
    "force-run",
    Client.force_run,
    word="runs here",
    risk="can run a guest twice",
    warning=lambda record: (
        f"Guest {record.guest} is {record.state.value} here, and may run at {record.peer or 'the other host'}.\n"
        "If it does, it runs twice and destroys its disks. Make sure that the other host is off."
    ),
    text="""Run the guest on this host because the other host is gone for good.

    Only the other host knows whether the guest runs there. If it does, the guest runs twice and destroys its disks.
    """,
)
discard = _confirmed_verb(
    "discard",
    Client.discard,
    word="discarded",
    risk="destroys guest memory",
    warning=lambda record: f"Guest {record.guest} is {record.state.value} here. What this host has of it will be LOST.",
    text="""End what is left of a guest on this host because it runs on the other host or is not wanted any more.

    The guest's memory on this host is LOST. If the other host does not have all of it, so is the guest.
    """,
)


def format_loss(record: Record) -> str:
    """Say what `abandon` would destroy."""
    since = units.format_duration(max(0.0, time.time() - record.timeline[-1].at)) if record.timeline else "unknown"
    # Not stale_pages, which is the number at the switchover: much of that has arrived since.
    lost = f"{units.format_size(record.remaining_bytes)} of its {units.format_size(record.total_bytes)} of memory"
    return f"Guest {record.guest} is {record.state.value} (for {since}) and lacks {lost}: that would be lost."


def _done(record: Record, *, as_json: bool, word: str) -> int:
    if as_json:
        print_json(record)
    else:
        print(f"{record.id} {record.guest}: {word} ({record.state.value})")
    return failure.DONE


VERBS: Final = (start, status, list_, wait, abort, switchover, resume, set_, abandon, force_run, discard)
