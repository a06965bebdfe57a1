from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrated import config
from migrated.errors import ConfigError
from migrated.guests import Residents

ROOT = Path(__file__).parents[3]
INSECURE: dict[str, Any] = {"tls": {"insecure": True}}
ROLES: tuple[config.Role, ...] = ("source", "target")


def test_defaults_of_both_roles() -> None:
    source, target = (config.decode(INSECURE, role) for role in ROLES)
    assert (str(source.state_dir), str(target.state_dir)) == ("/run/migrated/source", "/run/migrated/target")
    assert str(target.listen_address) == "0.0.0.0:7440"
    assert (str(source.status_address), str(target.status_address)) == ("127.0.0.1:7442", "127.0.0.1:7441")
    assert source.timeouts.reconnect == 0  # a guest in post-copy is never given up by itself
    assert source.migration.max_bandwidth == "0"


def test_a_file_with_everything(tmp_path: Path) -> None:
    path = tmp_path / "target.toml"
    path.write_text("""
[agent]
state_dir = "/run/elsewhere"
name = "host-b"
[listen]
address = "[::1]:0"
[http]
status = ""
[tls]
insecure = true
[migration]
mode = "precopy"
downtime_limit_ms = 5
max_bandwidth = "10Gbit"
[timeouts]
connect = 2.5
[guests.vm1]
driver = "qemu"
command = ["qemu"]
""")
    settings = config.load(path, "target")
    assert str(settings.control_socket) == "/run/elsewhere/control.sock"
    assert settings.listen_address == ("::1", 0)
    assert settings.status_address is None
    assert settings.migration.max_bandwidth == "10Gbit"
    assert settings.timeouts.connect == 2.5
    assert settings.guests == {"vm1": {"driver": "qemu", "command": ["qemu"]}}


@pytest.mark.parametrize(
    ("table", "key", "allowed"),
    [
        ({"migration": {"streems": 1}}, "migration.streems: no such key", "did you mean 'streams'?"),
        ({"agnt": {}}, "agnt: no such key", "did you mean 'agent'?"),
        ({"migration": {"streams": "2"}}, "migration.streams: expected int, got str", "from 1 to 16"),
        ({"migration": {"streams": 17}}, "migration.streams: expected int <= 16", "from 1 to 16"),
        ({"migration": {"streams": True}}, "migration.streams: expected int, got bool", "from 1 to 16"),
        ({"migration": {"mode": "fast"}}, "migration.mode: invalid enum value 'fast'", "hybrid, precopy or postcopy"),
        ({"migration": {"downtime_limit_ms": 0}}, "migration.downtime_limit_ms: ", "more than 0"),
        ({"migration": {"max_bandwidth": "500M"}}, "migration.max_bandwidth: '500M' is not a rate", "10Gbit"),
        ({"migration": {"max_bandwidth": 0}}, "migration.max_bandwidth: expected str, got int", "10Gbit"),
        ({"migration": 3}, "migration: expected object, got int", "a table: [migration]"),
        ({"timeouts": {"connect": 0}}, "timeouts.connect: ", "more than 0"),
        ({"timeouts": {"connect": float("nan")}}, "timeouts.connect: ", "more than 0"),
        ({"timeouts": {"connect": float("inf")}}, "timeouts.connect: ", "at most 86400"),
        ({"timeouts": {"heartbeat_limit": 1}}, "timeouts.heartbeat_limit: ", "give more"),
        ({"listen": {"address": "host"}}, "listen.address: 'host' is not an address: the port is missing", "HOST:PORT"),
        ({"listen": {"address": "::1:7440"}}, "listen.address: ", "needs brackets|HOST:PORT"),
        ({"listen": {"address": "a:65536"}}, "listen.address: ", "HOST:PORT"),
        ({"http": {"status": 7441}}, "http.status: expected str", "HOST:PORT"),
        ({"agent": {"state_dir": "here"}}, "agent.state_dir: 'here' is not absolute", "absolute path"),
        ({"agent": {"state_dir": "/" + 95 * "x"}}, "agent.state_dir: ", "shorter"),
        ({"guests": {"vm1": 3}}, "guests", "a table [guests.NAME] a guest"),
        ({"guests": {"vm1": {}}}, "guests.vm1.driver: the driver is missing", "qemu"),
        ({"guests": {"../x": {"driver": "qemu"}}}, "guests.../x: ", "letters, digits"),
        ({"tls": {}}, "tls.insecure: connections would need TLS", "insecure = true"),
        ({"tls": {"insecure": True, "ca": "/x"}}, "tls.ca: no such key", "allowed here: insecure"),
        ({"tls": {"insecure": "yes"}}, "tls.insecure: expected bool, got str", "true or false"),
        ({"limits": {"max_migrations": 0}}, "limits.max_migrations: ", "from 1 to 1024"),
    ],
)
def test_what_is_wrong_is_named_with_file_key_and_what_is_allowed(
    table: dict[str, Any], key: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.decode({**INSECURE, **table}, "target", path="/etc/migrated/target.toml")
    assert caught.value.message.startswith(f"/etc/migrated/target.toml: {key}")
    assert any(part in caught.value.hint for part in allowed.split("|"))


def test_a_source_does_not_listen() -> None:
    with pytest.raises(ConfigError, match="listen: only a target listens"):
        config.decode({**INSECURE, "listen": {"address": "a:1"}}, "source")


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"[agent", "not TOML"), (b"\xff", "not UTF-8 at byte 0"), (None, "no such configuration file")],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, text: str) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(path, "source")
    assert caught.value.message.startswith(f"{path}: ")
    assert text in caught.value.message


@pytest.mark.parametrize("role", ROLES)
def test_the_annotated_file_says_the_defaults(role: config.Role) -> None:
    table = tomllib.loads((ROOT / "config" / f"{role}.toml").read_text())
    shown = config.decode(table, role)
    default = config.decode(INSECURE, role)
    for section in ("agent", "listen", "http", "migration", "timeouts", "limits"):
        assert getattr(shown, section) == getattr(default, section), section
    for section in {"timeouts", "limits"} | ({"migration"} if role == "source" else set()):
        known = {field.name for field in msgspec.structs.fields(getattr(default, section))}
        assert set(table[section]) == known, section


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "examples").glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(path: Path) -> None:
    from migrated.guests import Residents

    settings = config.load(path, "source" if path.stem.endswith("source") else "target")
    assert settings.guests
    Residents(settings)
    for name, table in settings.guests.items():  # it does look at every guest's table
        wrong = {**settings.guests, name: {**table, "no_such_key": 1}}
        with pytest.raises(ConfigError, match="no_such_key"):
            Residents(msgspec.structs.replace(settings, guests=wrong))


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    settings = config.decode(INSECURE, "target")
    for section in ("agent", "listen", "http", "tls", "migration", "timeouts", "limits"):
        assert f"[{section}]" in text
        for field in msgspec.structs.fields(getattr(settings, section)):
            assert f"`{field.name}`" in text, f"{section}.{field.name}"


WRONG_GUESTS = [
    ("source", {"driver": "qemu", "qpm": "/x"}, "guests.vm1.qpm: no such key", "did you mean 'qmp'?"),
    (
        "source",
        {"driver": "qemu"},
        "guests.vm1.qmp: it is missing",
        "allowed: the absolute path of the guest's QMP socket",
    ),
    ("source", {"driver": "qemu", "qmp": 5}, "guests.vm1.qmp: expected str, got int", "allowed: the absolute path"),
    ("source", {"driver": "qemu", "qmp": "x"}, "guests.vm1: qmp must be the absolute path", "docs/configuration.md"),
    (
        "source",
        {"driver": "qemu", "qmp": "/x", "on_release": "stay"},
        "guests.vm1.on_release: invalid enum value 'stay'",
        "allowed: quit or keep",
    ),
    ("target", {"driver": "qemu", "command": "qemu"}, "guests.vm1.command: expected array, got str", "allowed: a list"),
    ("target", {"driver": "qemu", "command": ["q"], "page_size": "two"}, "guests.vm1.page_size", '"4K", "2M" or "1G"'),
    ("target", {"driver": "process", "reserve": 1, "command": ["g"]}, "guests.vm1.reserve", "allowed: true or false"),
    ("target", {"driver": "xen"}, "guests.vm1.driver: 'xen' is unknown", "qemu, process"),
]


@pytest.mark.parametrize(("role", "table", "problem", "hint"), WRONG_GUESTS)
def test_a_wrong_guest_table_is_named_by_file_table_and_key(
    role: config.Role, table: dict[str, object], problem: str, hint: str
) -> None:
    settings = config.decode({"tls": {"insecure": True}, "guests": {"vm1": table}}, role, path="/etc/x.toml")
    with pytest.raises(ConfigError) as caught:
        Residents(settings)
    assert caught.value.message.startswith(f"/etc/x.toml: {problem}")
    assert hint in caught.value.hint
