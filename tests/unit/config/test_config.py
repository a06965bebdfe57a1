from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from migrated import config
from migrated.errors import ConfigError
from migrated.guests.qemu.config import QemuTargetConfig
from migrated.settings import TlsFiles

ROOT = Path(__file__).parents[3]
INSECURE: dict[str, Any] = {"tls": {"insecure": True}}
ROLES: tuple[config.Role, ...] = ("source", "target")


def test_defaults_of_both_roles() -> None:
    source, target = (config.decode(INSECURE, role) for role in ROLES)
    assert (str(source.state_dir), str(target.state_dir)) == ("/run/migrated/source", "/run/migrated/target")
    assert str(target.listen_address) == "127.0.0.1:7440"
    assert (str(source.status_address), str(target.status_address)) == ("127.0.0.1:7442", "127.0.0.1:7441")
    assert source.timeouts.reconnect == 0  # a guest in post-copy is never given up by itself
    assert source.migration.max_bandwidth == 0


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
    assert settings.migration.max_bandwidth == 1_250_000_000
    assert settings.timeouts.connect == 2.5
    assert settings.guests == {"vm1": QemuTargetConfig(command=["qemu"])}


@pytest.mark.parametrize(
    ("table", "key", "allowed"),
    [
        ({"migration": {"streems": 1}}, "migration.streems: no such key", "did you mean 'streams'?"),
        ({"agnt": {}}, "agnt: no such key", "did you mean 'agent'?"),
        (
            {"migration": {"streams": "2"}},
            "migration.streams: '2' is not allowed",
            "a whole number from 1 to 16",
        ),
        ({"migration": {"streams": 17}}, "migration.streams: 17 is not allowed", "from 1 to 16"),
        ({"migration": {"streams": True}}, "migration.streams: True is not allowed", "a whole number"),
        ({"migration": {"mode": "fast"}}, "migration.mode: 'fast' is not allowed", "hybrid, precopy or postcopy"),
        ({"migration": {"downtime_limit_ms": 0}}, "migration.downtime_limit_ms: ", "above 0"),
        ({"migration": {"max_bandwidth": "500M"}}, "migration.max_bandwidth: '500M' is not a rate", "10Gbit"),
        ({"migration": {"max_bandwidth": 0}}, "migration.max_bandwidth: 0 is not a string", "10Gbit"),
        ({"migration": 3}, "migration: 3 is not allowed", "a table"),
        ({"timeouts": {"connect": 0}}, "timeouts.connect: ", "above 0"),
        ({"timeouts": {"connect": float("nan")}}, "timeouts.connect: ", "above 0"),
        ({"timeouts": {"connect": float("inf")}}, "timeouts.connect: ", "to 86,400"),
        ({"timeouts": {"heartbeat_limit": 1}}, "timeouts.heartbeat_limit: ", "give more"),
        ({"listen": {"address": "host"}}, "listen.address: 'host' is not an address: the port is missing", "HOST:PORT"),
        ({"listen": {"address": "::1:7440"}}, "listen.address: ", "needs brackets|HOST:PORT"),
        ({"listen": {"address": "a:65536"}}, "listen.address: ", "HOST:PORT"),
        ({"http": {"status": 7441}}, "http.status: 7441 is not a string", "HOST:PORT"),
        ({"agent": {"state_dir": "here"}}, "agent.state_dir: 'here' is not absolute", "absolute path"),
        ({"agent": {"state_dir": "/" + 95 * "x"}}, "agent.state_dir: ", "shorter"),
        ({"guests": {"vm1": 3}}, "guests.vm1: 3 is not allowed", "a table"),
        ({"guests": {"vm1": {}}}, "guests.vm1.driver: the driver is missing", "qemu"),
        ({"guests": {"../x": {"driver": "qemu"}}}, "guests.../x: ", "letters, digits"),
        ({"tls": {"insecure": True, "ca": "/x"}}, "tls: insecure = true makes ca useless", "remove insecure"),
        ({"tls": {"trusted_network": True}}, "tls: trusted_network = true is only for insecure", "remove it"),
        ({"tls": {"key": "x.pem"}}, "tls.key: 'x.pem' is not absolute", "absolute path"),
        ({"listen": {"address": "0.0.0.0:1"}}, "tls.insecure: it would listen on 0.0.0.0:1", "trusted_network = true"),
        ({"listen": {"address": "host-b:1"}}, "tls.insecure: it would listen on host-b:1", "loopback"),
        ({"tls": {"insecure": "yes"}}, "tls.insecure: 'yes' is not allowed", "true or false"),
        ({"limits": {"max_migrations": 0}}, "limits.max_migrations: 0 is not allowed", "from 1 to 1,024"),
    ],
)
def test_what_is_wrong_is_named_with_file_key_and_what_is_allowed(
    table: dict[str, Any], key: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.decode({**INSECURE, **table}, "target", path="/etc/migrated/target.toml")
    assert caught.value.message.startswith(f"/etc/migrated/target.toml: {key}")
    assert any(part in caught.value.hint for part in allowed.split("|"))


def test_without_tls_a_target_listens_on_loopback_unless_the_network_is_trusted() -> None:
    trusted = {"tls": {"insecure": True, "trusted_network": True}}
    assert str(config.decode(trusted, "target").listen_address) == "0.0.0.0:7440"
    assert str(config.decode({}, "target").listen_address) == "0.0.0.0:7440"
    for address in ("localhost:1", "[::1]:1", "127.1.2.3:1"):
        assert config.decode({**INSECURE, "listen": {"address": address}}, "target").listen_address.is_loopback


def test_where_the_files_of_tls_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As configured, else a credential of the service manager's, else in /etc/migrated/tls."""
    assert config.decode(INSECURE, "target").tls_files is None
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    source = config.decode({}, "source").tls_files
    assert source == TlsFiles(
        *(Path("/etc/migrated/tls") / name for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"))
    )
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / "server-key.pem").touch()
    (tmp_path / "server-cert.pem").touch()
    target = config.decode({"tls": {"cert": "/my/cert.pem"}}, "target").tls_files
    assert target == TlsFiles(Path("/etc/migrated/tls/ca-cert.pem"), Path("/my/cert.pem"), tmp_path / "server-key.pem")


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
    assert (shown.state_dir, shown.status_address) == (default.state_dir, default.status_address)
    assert shown.agent.name == default.agent.name
    for section in ("migration", "timeouts", "limits"):
        assert getattr(shown, section) == getattr(default, section), section
    assert shown.listen_address == config.decode({}, role).listen_address
    assert shown.tls == config.TlsSection()
    for section in {"timeouts", "limits"} | ({"migration"} if role == "source" else set()):
        assert set(table[section]) == type(getattr(default, section)).model_fields.keys(), section


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "examples").glob("*.toml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(path: Path) -> None:
    role: config.Role = "source" if path.stem.endswith("source") else "target"
    table = tomllib.loads(path.read_text())
    assert config.decode(table, role).guests
    for name in table["guests"]:  # it does look at every guest's table
        wrong = {**table, "guests": {**table["guests"], name: {**table["guests"][name], "no_such_key": 1}}}
        with pytest.raises(ConfigError, match=f"guests.{name}.no_such_key: no such key"):
            config.decode(wrong, role)


WRONG_GUESTS = [
    ("source", {"driver": "qemu", "qpm": "/x", "qmp": "/x"}, "guests.vm1.qpm: no such key", "did you mean 'qmp'?"),
    ("source", {"driver": "qemu"}, "guests.vm1.qmp: it is missing", "allowed: an absolute path"),
    ("source", {"driver": "qemu", "qmp": 5}, "guests.vm1.qmp: 5 is not a string", "allowed: an absolute path"),
    ("source", {"driver": "qemu", "qmp": "x"}, "guests.vm1.qmp: 'x' is not an absolute path", "an absolute path"),
    (
        "source",
        {"driver": "qemu", "qmp": "/x", "on_release": "stay"},
        "guests.vm1.on_release: 'stay' is not allowed",
        "allowed: quit or keep",
    ),
    ("target", {"driver": "qemu", "command": "qemu"}, "guests.vm1.command: 'qemu' is not allowed", "a list of strings"),
    ("target", {"driver": "qemu", "command": ["q", 5]}, "guests.vm1.command.1: 5 is not allowed", "a list of strings"),
    ("target", {"driver": "qemu", "command": []}, "guests.vm1.command: [] is not allowed", "a list of strings"),
    (
        "target",
        {"driver": "qemu", "command": ["q"], "page_size": "two"},
        "guests.vm1.page_size: 'two' is not a size",
        "such as 4K, 2M, 1G",
    ),
    (
        "target",
        {"driver": "qemu", "command": ["q"], "page_size": 2},
        "guests.vm1.page_size: 2 is",
        '"4K", "2M" or "1G"',
    ),
    ("target", {"driver": "process", "reserve": 1, "command": ["g"]}, "guests.vm1.reserve: 1 is", "true or false"),
    ("target", {"driver": "xen"}, "guests.vm1.driver: 'xen' is unknown", 'driver = "qemu", "libvirt" or "process"'),
    ("target", {"driver": 3}, "guests.vm1.driver: '3' is unknown", 'driver = "qemu", "libvirt" or "process"'),
]


@pytest.mark.parametrize(("role", "table", "problem", "hint"), WRONG_GUESTS)
def test_a_wrong_guest_table_is_named_by_file_table_and_key(
    role: config.Role, table: dict[str, object], problem: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config.decode({**INSECURE, "guests": {"vm1": table}}, role, path="/etc/x.toml")
    assert caught.value.message.startswith(f"/etc/x.toml: {problem}")
    assert hint in caught.value.hint


def test_a_guest_with_the_name_of_a_driver_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match=r"guests\.qemu\.qmp: it is missing"):
        config.decode({**INSECURE, "guests": {"qemu": {"driver": "qemu"}}}, "source")


def test_other_limits_are_held_against_the_defaults() -> None:
    with pytest.raises(
        ConfigError, match=r"timeouts\.heartbeat_limit: 10 s is less than two heartbeat intervals of 6 s"
    ):
        config.decode({**INSECURE, "timeouts": {"heartbeat_interval": 6}}, "source")
