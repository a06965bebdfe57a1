"""``migrated config check``."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrated import config
from migrated.cli.command import run

GOOD = "[tls]\ninsecure = true\n"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the default files: empty."""
    monkeypatch.setattr(config, "CONFIG_DIRECTORY", tmp_path)
    return tmp_path


def test_every_default_file_that_exists_is_checked(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for role in ("source", "target"):
        (directory / f"{role}.toml").write_text(GOOD)
    assert run(["config", "check"]) == 0
    assert capsys.readouterr().out == "".join(
        f"{directory}/{role}.toml: correct, 0 guests\n" for role in ("source", "target")
    )


def test_an_error_names_file_and_key(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "source.toml").write_text(GOOD)
    (directory / "target.toml").write_text(f"{GOOD}[migration]\nstreems = 2\n")
    assert run(["config", "check"]) == 2
    assert f"{directory}/target.toml: migration.streems: no such key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give a role and --config"),
        (["--config", "x.toml"], "needs the role"),
        (["source"], "no such configuration file"),
    ],
)
def test_nothing_to_check_is_a_usage_error(
    directory: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert run(["config", "check", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not list(directory.iterdir())


def test_the_files_of_tls_are_read(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (directory / "target.toml").write_text(f'[tls]\nca = "{directory}/none.pem"\n')
    assert run(["config", "check", "target"]) == 2
    said = capsys.readouterr().err
    assert f"target.toml: tls.ca: {directory}/none.pem: No such file" in said
    assert "migrated certificates" in said
