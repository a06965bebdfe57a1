"""Every command of the documents is run, on hosts that are as the pages say; and every other block is what it claims to be.

`FORMS` binds each command to a setting: what has to be so before it, how it is run, and what has to be so afterwards.  A
command that fits no form fails, so a page cannot gain one that nobody runs.  A comment ``<!-- setting: NAME -->`` before a
block binds all of its commands, and ``script`` runs such blocks of a page in one shell.  `ELSEWHERE` is the whole list of
what is not run here, with the reason, and with a check of what can be checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import click
import pytest
import pytest_asyncio

from migrated import config
from migrated.cli.command import root
from migrated.demo.images import build_linux_guest
from migrated.demo.qemu_guest import QEMU
from migrated.demo.run import cache_directory
from migrated.errors import ConfigError, HostError, MigratedError
from tests.documents.blocks import ALL, COMMANDS, OTHERS, PAGES, ROOT, Block, Command, commands
from tests.documents.stage import (
    PATIENCE_SECONDS,
    DocumentHost,
    Stage,
    StageUnavailableError,
    changed,
    stage,
)

pytestmark = pytest.mark.timeout(300)

#: The page that the hosts are made by.
WALK = [block for block in ALL if block.page.name == "first-migration.md"]
Form = TypeVar("Form")
Run = Callable[[Stage, Command], Awaitable[str]]


# ---------------------------------------------------------------- settings


async def with_agents(stage: Stage, command: Command) -> str:
    """The guest runs on `hosta`, and the agents of all hosts are up."""
    await stage.idle()
    return await stage.hosts[command.host or "hosta"].run(command.text)


async def anywhere(stage: Stage, command: Command) -> str:
    """A host, and exit code 0 or 1: whether all is as it should be depends on this machine."""
    return await stage.hosts[command.host or "hosta"].run(command.text, codes=(0, 1))


async def certificates(stage: Stage, command: Command) -> str:
    """An authority in /root/migrated-ca, and no files yet where the command writes."""
    host = stage.hosts[command.host or "hosta"]
    words = shlex.split(command.text)
    if "new-ca" in words:
        made = words[words.index("new-ca") + 1]
    else:
        authority = words[words.index("--ca") + 1]
        made = words[words.index("--out") + 1] if "--out" in words else f"{authority}/{words[words.index('new') + 1]}"
        await host.run(f"test -e {authority}/ca-key.pem || migrated certificates new-ca {authority}")
    return await host.run(f"rm -rf {made} && {command.text}")


async def active(stage: Stage, command: Command) -> str:
    """A migration of vm1 in pre-copy."""
    migration = await stage.active()
    watch = "--watch" in command.text or " wait " in command.text
    output = await stage.hosta.run(command.text, interrupt=2 if watch else 0, codes=(0, 130) if watch else (0,))
    source = stage.hosta.agent("source")
    if " abort " in command.text:
        assert (await source.wait(migration))["state"] == "aborted"
        await stage.assert_sound(stage.hosta)
    elif " switchover " in command.text or " set " in command.text:
        with contextlib.suppress(MigratedError):  # it may have ended by itself
            await source.request("POST", f"/v1/migrations/{migration}/set", {"max_bandwidth": "0"})
        assert (await source.wait(migration))["state"] == "completed"
        await arrived(stage, stage.hostb)
    return output


async def ended(stage: Stage, command: Command) -> str:
    """A migration of vm1 that has ended, in whatever way."""
    await stage.ended()
    return await stage.hosta.run(command.text, codes=(0, 1, 3))


async def migrated_away(stage: Stage, command: Command) -> str:
    """The guest on `hosta`; afterwards it runs on the target, and its memory is what it wrote."""
    await stage.idle()
    output = await stage.hosta.run(command.text)
    migration = (await stage.newest())["id"]
    assert (await stage.hosta.agent("source").wait(migration))["state"] == "completed"
    target = stage.hosts[command.text.partition("--to ")[2].partition(":")[0]]
    await arrived(stage, target)
    return output


async def arrived(stage: Stage, host: DocumentHost) -> None:
    await stage.assert_sound(host)
    await stage.hosta.until("end of QEMU", lambda: not stage.hosta.processes("qemu-system-x86_64"))


async def evacuated(stage: Stage, command: Command) -> str:
    """The guest on `hosta`; afterwards on one of the other hosts."""
    await stage.idle()
    output = await stage.hosta.run(command.text)
    (there,) = [host for host in (stage.hostb, stage.hostc) if host.processes("qemu-system-x86_64")]
    await arrived(stage, there)
    return output


async def evacuation_begun(stage: Stage, command: Command) -> str:
    """An evacuation that was begun."""
    if not (await stage.hosta.agent("source").request("GET", "/v1/evacuations"))["evacuations"]:
        await stage.idle()
        await stage.hosta.run("migrated evacuate --to hostb:7440")
    return await stage.hosta.run(command.text, codes=(0, 3) if "--abort" not in command.text else (0, 1, 2, 3))


async def process_guest(stage: Stage, command: Command) -> str:
    """The compiled guest of docs/process-guests.md, below an agent that listens at /run/p1.sock."""
    if not (stage.hosta.root / "run/page/process_guest").exists():
        (compiler,) = [
            found.text
            for block in ALL
            if block.language in COMMANDS
            for found in commands(block)
            if found.text.startswith("cc ")
        ]
        await in_checkout(stage, Command(command.where, "", compiler))
    process = await stage.hosta.start(f"env {command.text}", "/run/p1.log")
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                assert process.returncode is None, (stage.hosta.root / "run/p1.log").read_text()
                guests = (await stage.hosta.agent("source").request("GET", "/v1/guests"))["guests"]
                if any(guest["name"] == "p1" and guest["migratable"] for guest in guests):
                    return ""
    finally:
        await stage.hosta.end("process_guest")
        await process.wait()


async def another_guest(stage: Stage, command: Command) -> str:
    """A guest of its own which answers on its monitor."""
    socket = command.text.partition("-qmp unix:")[2].partition(",")[0]
    process = await stage.alone.start(changed(command.text.removesuffix("&")), "/run/another.log")
    path, log = stage.alone.root / socket.lstrip("/"), stage.alone.root / "run/another.log"
    try:
        await stage.alone.until("QEMU's monitor", lambda: path.exists() or process.returncode is not None)
        assert process.returncode is None, log.read_text()
    finally:
        await stage.alone.end("qemu-system-x86_64")
        await process.wait()
    return ""


async def script(stage: Stage, page: Path) -> str:
    """All blocks with this setting, in one shell, in a directory that looks like a checkout after `make demo`."""
    try:
        image = await asyncio.to_thread(build_linux_guest, cache_directory())
    except HostError as error:
        pytest.skip(str(error))
    home = stage.alone.root / "run" / "page"
    (home / ".venv").symlink_to(Path(sys.prefix))
    cache = home / "build" / "cache"
    cache.mkdir(parents=True)
    (cache / image.kernel.parent.name).symlink_to(image.kernel.parent)
    (cache / image.initrd.name).symlink_to(image.initrd)

    def is_run(line: str) -> bool:
        """Whether a line is for this host; a daemon is, if it is put into the background."""
        return line.endswith("&\n") or not form(ELSEWHERE, Command("", "", line.partition(" # ")[0].strip()))

    found = [changed(block.text) for block in ALL if block.page == page and block.setting == SCRIPT]
    pieces = ["".join(line for line in text.splitlines(keepends=True) if is_run(line)) for text in found]
    small = 'for table in /tmp/*/target.toml; do sed -i \'s/page_size = "2M"/page_size = "4K"/\' $table; done\n'
    pieces = [small + text if "migrated target" in text else text for text in pieces]
    try:
        return await stage.alone.script(pieces)
    finally:
        await stage.alone.end("qemu-system-x86_64")


async def in_checkout(stage: Stage, command: Command) -> str:
    """A directory that has what a checkout has, and takes what the command writes."""
    for name in ("native", "migrated"):
        link = stage.hosta.root / "run" / "page" / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    return await stage.hosta.run(command.text)


# ---------------------------------------------------------------- commands that are not run here


def make_target(command: Command) -> None:
    text = re.sub(r"\s(on|for|of|the|every)\b.*", "", command.text)
    done = subprocess.run(
        ["sh", "-c", text.replace("make ", "make --dry-run --question --silent ", 1)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (0, 1), done.stderr
    target = next(word for word in shlex.split(text)[shlex.split(text).index("make") + 1 :] if "=" not in word)
    assert re.search(rf"^(?:\w+ )*{target}(?: \w+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    if target == "bench" and (arguments := re.search(r'ARGS="(.*?)"', text)):
        from benchmarks.__main__ import main

        main.make_context("bench", shlex.split(arguments[1]))


def shipped_units(command: Command) -> None:
    shipped = {path.name for path in (ROOT / "systemd").iterdir()} | {"migrated-guest-*"}
    named = re.findall(r"\bmigrated-[\w*.-]+", command.text)
    assert named or "daemon-reload" in command.text or "systemd-" in command.text
    for unit in named:
        assert {unit, f"{unit}.service", f"{unit}.socket"} & shipped, unit


def debian_packages(command: Command) -> None:
    for package in re.sub(r"^.*?install( -\S+)*", "", command.text).split():
        assert (
            package in {"git", "make"}
            or package.startswith(("./", "build/dist/"))
            or re.search(rf"\b{re.escape(package)}:", (ROOT / "Makefile").read_text())
        ), package


def accepted(command: Command) -> None:
    parse(command.text)


def kernel_setting(command: Command) -> None:
    for key in re.findall(r"\b(vm\.\w+)", command.text):
        assert Path("/proc/sys", *key.split(".")).exists()


def nothing(command: Command) -> None:
    """Nothing of it can be checked."""


#: What is not run here: the form of the command, the reason, and what is checked instead.
ELSEWHERE: dict[str, tuple[str, Callable[[Command], None]]] = {
    r"make (demo|test|bench|soak|simulate|fuzz|test-.*|check|docs|site|pictures)\b.*": (
        "minutes to hours; CI runs what matters of it",
        make_target,
    ),
    r"(\w+=\S+ )+make .*": ("as without the variables", make_target),
    r"make (install|deb|wheel|sbom|lock|deps|venv|clean)\b.*": (
        "tests/packages builds and installs each of them",
        make_target,
    ),
    r"git clone .*": ("the address is the reader's", nothing),
    r"cd \S+": ("part of `git clone`", nothing),
    r"(sudo )?(apt|apt-get) .*": ("it would change this machine", debian_packages),
    r"(systemd-sysusers|systemd-tmpfiles|systemctl|journalctl)\b.*": (
        "needs systemd: tests/systemd boots it and uses each unit",
        shipped_units,
    ),
    r"docker .*": ("needs a container engine; tests/packages carries out the Dockerfile's steps", nothing),
    r"(sudo )?sysctl .*": ("the pool of huge pages is shared with whatever else runs on this machine", kernel_setting),
    r"migrated demo\b.*": (
        "part of `make demo`; it looks for a kernel package in the distribution's archive",
        accepted,
    ),
    r"migrated (resume|abandon|force-run|discard)\b.*": ("needs a host that is lost: tests/faults does it", accepted),
    r"migrated (source|target|helper)\b.*": ("runs until it is stopped: all other commands here need it", accepted),
    r"virsh .*": ("needs libvirt: tests/libvirt has it", nothing),
}

# ---------------------------------------------------------------- commands that are

#: The form of a command, and its setting.  The first one that fits counts.
FORMS: dict[str, Run] = {
    r"migrated certificates .*": certificates,
    r"migrated (check|--version)\b.*": anywhere,
    r"migrated start vm1 .*": migrated_away,
    r"migrated (abort|switchover|set) vm1\b.*": active,
    r"migrated (status|wait) vm1\b.*": active,
    r"migrated (report|logs) vm1\b.*": ended,
    r"migrated (status|list|guests|plan|inspect|config)\b.*": with_agents,
    r"migrated evacuate .*--dry-run.*": with_agents,
    r"migrated evacuate (--status|--resume|--abort).*": evacuation_begun,
    r"migrated evacuate .*": evacuated,
    r"curl .*": with_agents,
    r"qemu-system-x86_64 .*": another_guest,
    r"cc .*": in_checkout,
    r"MIGRATED_SOCKET=/run/p1.sock \./process_guest .*": process_guest,
}
#: For comments in the pages.
SETTINGS: dict[str, Run] = {
    setting.__name__.replace("_", " "): setting
    for setting in (with_agents, anywhere, active, ended, migrated_away, evacuated, in_checkout)
}


#: Blocks that go on with the variables and files of those before.
SCRIPT = "script"


def every_command() -> dict[tuple[str, str], Command]:
    """The commands of all blocks, and README.md's in its text, each once."""
    found: dict[tuple[str, str], Command] = {}
    for block in ALL:
        for command in commands(block) if block.language in COMMANDS and block.setting != SCRIPT else ():
            for text in command.text.split(" && "):
                each = Command(command.where, command.host, text, command.output, command.setting)
                former = found.setdefault((each.host or "hosta", text), each)
                if each.output and not former.output:
                    found[each.host or "hosta", text] = each
    text = (ROOT / "README.md").read_text()
    for span in spans(text):
        if not re.search(r"[A-Z]{2}|…|[<\[]", span):
            found.setdefault(("hosta", span), Command("README.md", "", span))
    return found


def spans(text: str) -> list[str]:
    """The commands in the text of a page, its blocks aside."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = [re.sub(r"\s+", " ", span).replace("\\|", "|") for span in re.findall(r"`([^`]+)`", prose)]
    return [span for span in dict.fromkeys(found) if re.match(r"migrated [a-z-]", span)]


EVERY = every_command()
#: Commands after which another guest has to be booted on `hosta`: the last to be run.
MOVES = re.compile(r"migrated (start|set|switchover|evacuate)(?!.*--dry-run)")


def form(forms: Mapping[str, Form], command: Command) -> Form | None:
    """What the first form that fits a command stands for."""
    return next((found for pattern, found in forms.items() if re.fullmatch(pattern, command.text)), None)


def in_order() -> list[tuple[str, str]]:
    """What is run here: first what needs the guest where it is, then what moves it."""

    def moves(key: tuple[str, str]) -> bool:
        return MOVES.search(key[1]) is not None

    return sorted((key for key, command in EVERY.items() if not form(ELSEWHERE, command)), key=moves)


def parse(text: str) -> None:
    """Have the command line's own parser read a command.  Raises click.ClickException."""
    words = [word for word in shlex.split(re.split(r" [|>&;]|>>", text)[0]) if word]
    context = root.make_context("migrated", words[1:])
    while isinstance(context.command, click.Group):  # each without its own arguments, which are the next one's
        if not (given := [*context._protected_args, *context.args]):
            return
        name, command, rest = context.command.resolve_command(context, given)
        assert command is not None
        context = command.make_context(name, rest, parent=context)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts() -> AsyncIterator[Stage]:
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    try:
        async with stage(WALK) as made:
            yield made
    except StageUnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.root
@pytest.mark.guest
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("key", in_order(), ids=" ".join)
async def test_a_command_does_what_its_page_says(hosts: Stage, key: tuple[str, str]) -> None:
    command = EVERY[key]
    if key in hosts.ran:  # to prepare the hosts
        output = hosts.ran[key]
    else:
        run = SETTINGS[command.setting] if command.setting else form(FORMS, command)
        assert run is not None, f"{command.where}: nobody knows how to run this: {command.text}"
        output = await run(hosts, command)
    header = command.output[0].split() if command.output else []
    if header and all(word.isupper() for word in header):
        assert header in [line.split() for line in output.splitlines()], (
            f"{command.where}: {command.output[0]}\n{output}"
        )


@pytest.mark.root
@pytest.mark.guest
@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "page", dict.fromkeys(block.page for block in ALL if block.setting == SCRIPT), ids=lambda path: path.name
)
async def test_a_page_can_be_followed_from_its_first_block_to_its_last(hosts: Stage, page: Path) -> None:
    await script(hosts, page)


@pytest.mark.parametrize("key", [key for key, command in EVERY.items() if form(ELSEWHERE, command)], ids=" ".join)
def test_a_command_that_is_not_run_here_is_right_as_far_as_can_be_seen(key: tuple[str, str]) -> None:
    found = form(ELSEWHERE, EVERY[key])
    assert found is not None
    reason, check = found
    assert reason
    check(EVERY[key])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_block_says_what_it_is(page: Path) -> None:
    for block in ALL:
        if block.page == page:
            assert block.language in COMMANDS | OTHERS, f"{block.where}: a language: one of {sorted(COMMANDS | OTHERS)}"
            assert block.language in COMMANDS or not re.search(r"^host[a-z][#$] ", block.text, re.MULTILINE), (
                block.where
            )
            assert not block.setting or block.setting in {*SETTINGS, SCRIPT}, block.where


@pytest.mark.parametrize("block", [block for block in ALL if block.language == "toml"], ids=lambda block: block.where)
def test_an_agent_accepts_a_configuration(block: Block) -> None:
    table = tomllib.loads(block.text)
    refusals = []
    for role in ("source", "target"):
        try:
            config.decode(table, role)
        except ConfigError as error:
            refusals.append(f"{role}: {error}")
        else:
            return
    raise AssertionError("\n".join(refusals))


@pytest.mark.parametrize(
    "block", [block for block in ALL if block.language in {"json", "python"}], ids=lambda block: block.where
)
def test_code_can_be_read(block: Block) -> None:
    json.loads(block.text) if block.language == "json" else compile(block.text, block.where, "exec", flags=AWAIT)


#: PyCF_ALLOW_TOP_LEVEL_AWAIT: an example needs no function around it.
AWAIT = 0x2000
#: What pages write for a value.
VALUES = {
    **dict.fromkeys(("SECONDS", "S", "N", "DAYS", "MS", "PID"), "5"),
    **dict.fromkeys(("ID", "GUEST", "NAME", "DOMAIN", "HOST", "PATTERN", "M", "L"), "vm1"),
    **dict.fromkeys(("FILE", "DIR", "SOCKET", "PATH"), "/x"),
    **dict.fromkeys(("HOST:PORT", "HOST:PORT,…"), "hostb:7440"),
    "RATE": "1Gbit",
    "ADDRESS": "192.0.2.7",
    "URI": "qemu:///system",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_command_line_accepts_what_the_text_says(page: Path) -> None:
    for span in spans(page.read_text()):
        text = span
        while text != (text := re.sub(r" ?\[[^][]*\]…?", "", text)):
            pass
        words = [VALUES.get(word, word).partition("|")[0] for word in text.split()]
        given = [word for word in words if word != "…"]
        try:
            parse(" ".join(given))
        except (click.exceptions.NoArgsIsHelpError, click.exceptions.Exit):  # no argument at all
            continue
        except click.UsageError as error:
            # A text may name a command or an option without its arguments.
            if not isinstance(error, click.MissingParameter) and "requires an argument" not in error.message:
                raise AssertionError(f"{span}: {error.message}") from error
