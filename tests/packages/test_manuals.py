"""Manual pages and completions say what ``--help`` says, and the programs that read them accept them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from migrated import config, settings
from migrated.cli.command import root
from package import manuals

ROOT = Path(__file__).parents[2]
PAGES = manuals.pages()


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("share")
    subprocess.run([sys.executable, "-m", "package.manuals", str(directory)], cwd=ROOT, check=True)
    return directory


def run(*command: str, **environment: str) -> str:
    """What a program prints, and nothing on stderr; a skip if it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **environment})
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_man_formats_a_page_without_a_warning(share: Path, page: str) -> None:
    path = share / "man" / f"man{page[-1]}" / page
    run("man", "--warnings=w", "--local-file", str(path), LC_ALL="C.UTF-8", MAN_KEEP_STDERR="1")


@pytest.mark.parametrize("page", PAGES)
def test_mandoc_finds_nothing_in_a_page(share: Path, page: str) -> None:
    run("mandoc", "-T", "lint", "-W", "warning", str(share / "man" / f"man{page[-1]}" / page))


def commands(group: click.Group, path: str = manuals.PROGRAM) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        found[f"{path} {name}"] = command
        if isinstance(command, click.Group):
            found |= commands(command, f"{path} {name}")
    return found


@pytest.mark.parametrize("path", [path for path, command in commands(root).items() if not command.hidden])
def test_the_page_has_every_command_and_every_option(path: str) -> None:
    escaped = path.replace("-", "\\-")
    section = next(part for part in PAGES["migrated.1"].split("\n.S") if part.startswith(f"S {escaped} "))
    for parameter in commands(root)[path].params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.opts[0].replace("-", "\\-") in section


@pytest.mark.parametrize("role", config.KINDS)
def test_the_page_has_every_key_of_the_configuration(role: config.Role) -> None:
    for section, field in config.KINDS[role].model_fields.items():
        assert f"[{section}" in PAGES["migrated.toml.5"]
        table = field.annotation
        if isinstance(table, type) and issubclass(table, settings.Table):
            for key in table.model_fields:
                assert f"\n\\fB{key}\\fR\n" in PAGES["migrated.toml.5"]


@pytest.mark.parametrize("shell", manuals.COMPLETIONS)
def test_a_shell_reads_its_completions(share: Path, shell: str) -> None:
    run(shell, "-n", str(share / manuals.COMPLETIONS[shell]))


def test_bash_completes_a_command_and_its_options(share: Path) -> None:
    script = f"""
        source {share / manuals.COMPLETIONS["bash"]}
        COMP_WORDS=(migrated swi) COMP_CWORD=1; _migrated_completion migrated; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(migrated start --mo) COMP_CWORD=2; COMPREPLY=(); _migrated_completion migrated; echo "${{COMPREPLY[@]}}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert run("bash", "-c", script, PATH=path).splitlines() == ["switchover", "--mode"]
