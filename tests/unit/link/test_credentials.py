"""The files of [tls]: what is wrong with them is named, and they are read again when they change."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from migrated.certificates import Authority
from migrated.errors import ConfigError, RemoteProtocolError
from migrated.link.credentials import Credentials
from tests.rig.pki import Pki, now

DAY_SECONDS = 86400


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


def test_what_is_valid_is_no_problem(pki: Pki) -> None:
    credentials = Credentials(pki.write("target"), role="target")
    assert credentials.valid
    assert credentials.problems() == []
    assert abs(credentials.expires_at - time.time() - 365 * DAY_SECONDS) < DAY_SECONDS


@pytest.mark.parametrize("key", ["ca", "cert", "key"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [("missing", "No such file"), ("directory", "Is a directory"), ("not-pem", "TLS: "), ("empty", "TLS: ")],
)
def test_a_file_that_cannot_be_used_is_named_with_its_key(pki: Pki, key: str, spoil: str, said: str) -> None:
    files = pki.write("target")
    file: Path = getattr(files, key)
    file.unlink()
    match spoil:
        case "directory":
            file.mkdir()
        case "not-pem":
            file.write_text("-----BEGIN HOPE-----")
        case "empty":
            file.touch()
    with pytest.raises(ConfigError) as caught:
        Credentials(files, role="target", where="/etc/migrated/target.toml")
    assert caught.value.message.startswith(f"/etc/migrated/target.toml: tls.{key}: ")
    assert str(file) in caught.value.message
    assert said in caught.value.message
    assert caught.value.code == "tls-files"
    assert caught.value.hint


def test_a_key_of_another_certificate_is_refused(pki: Pki) -> None:
    files, other = pki.write("target"), pki.write("target", place="other")
    with pytest.raises(ConfigError, match=r"tls\.key: .*server-key\.pem"):
        Credentials(files._replace(key=other.key), role="target")


def test_a_key_that_everybody_may_read_is_a_problem(pki: Pki) -> None:
    files = pki.write("source")
    files.key.chmod(0o644)
    (problem,) = Credentials(files, role="source").problems()
    assert "0644" in problem
    assert str(files.key) in problem


@pytest.mark.parametrize(
    ("valid", "said", "is_valid"),
    [((-20, -10), "expired on", False), ((10, 20), "is not valid before", False), ((-1, 10), "expires on", True)],
)
def test_the_dates_of_a_certificate_are_a_problem(
    pki: Pki, valid: tuple[int, int], said: str, *, is_valid: bool
) -> None:
    """The agent starts all the same: the file may be replaced while it runs."""
    files = pki.write("target", valid=valid)
    credentials = Credentials(files, role="target")
    (problem,) = credentials.problems()
    assert f"{files.cert} {said}" in problem
    assert credentials.valid is is_valid


def test_changed_files_are_read_again_and_unusable_ones_are_not_used(pki: Pki) -> None:
    files = pki.write("target")
    credentials = Credentials(files, role="target")
    first = credentials.current()
    assert credentials.current() is first
    expires = credentials.expires_at

    new = pki.write("target", place="new", valid=(-1, 700))
    new.cert.replace(files.cert)  # its key has not come yet
    with capture_logs() as logs:
        assert credentials.current() is first
        assert credentials.current() is first
    assert [line["event"] for line in logs] == ["cannot use the changed certificate: the former one stays in use"]
    assert "server-key.pem" in logs[0]["error"]
    assert credentials.expires_at == expires

    new.key.replace(files.key)
    with capture_logs() as logs:
        second = credentials.current()
    assert second is not first
    assert [line["event"] for line in logs] == ["certificate read again"]
    assert credentials.expires_at > expires

    files.cert.unlink()
    with capture_logs() as logs:
        assert credentials.current() is second
    assert "No such file" in logs[0]["error"]


def test_a_certificate_that_was_replaced_by_one_that_expires_soon_is_reported(pki: Pki) -> None:
    credentials = Credentials(pki.write("target"), role="target")
    pki.write("target", valid=(-1, 3))
    with capture_logs() as logs:
        credentials.current()
    assert [line["log_level"] for line in logs] == ["info", "warning"]
    assert "expires on" in logs[1]["problem"]


@pytest.mark.parametrize(
    ("peers", "names", "allowed"),
    [
        ([], ["anybody.example"], True),
        (["host-a.example"], ["host-a.example"], True),
        (["host-a.example"], ["HOST-A.example"], True),
        (["Host-A.example"], ["x", "host-a.example"], True),
        (["*.example"], ["host-a.example"], True),
        (["192.0.2.*"], ["192.0.2.7"], True),
        (["host-a.example"], ["host-b.example"], False),
        (["host-a.example"], ["host-a.example.evil"], False),
        (["host-a.example"], ["*.example"], False),  # a certificate's wildcard is no pattern of ours
        (["host-a.example"], [], False),
    ],
)
def test_whom_peers_allows(pki: Pki, peers: list[str], names: list[str], *, allowed: bool) -> None:
    credentials = Credentials(pki.write("target"), role="target", peers=peers)
    if allowed:
        credentials.check_peer(names)
        return
    with pytest.raises(RemoteProtocolError, match="which `peers` does not allow") as caught:
        credentials.check_peer(names)
    assert caught.value.code == "tls-peer-refused"


def test_two_authorities_may_sign_while_one_replaces_the_other(pki: Pki) -> None:
    from migrated.certificates import pem

    files = pki.write("target")
    other = Authority.make("the next one", now=now())
    with files.ca.open("ab") as file:
        file.write(pem(other.certificate))
    assert Credentials(files, role="target").problems() == []
