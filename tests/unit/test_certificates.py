"""``migrated certificates``: what it makes is accepted by OpenSSL, kept from others, and never overwritten."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509

from migrated import certificates
from migrated.certificates import Authority
from migrated.cli import failure
from migrated.cli.command import run
from migrated.errors import ConfigError
from migrated.link.credentials import Credentials
from migrated.settings import TlsFiles


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    directory = tmp_path / "ca"
    assert run(["certificates", "new-ca", str(directory)]) == failure.DONE
    return directory


def modes(directory: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir() if file.is_file()}


def test_the_files_of_an_authority_and_a_host(ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert modes(ca) == {"ca-cert.pem": 0o644, "ca-key.pem": 0o600}
    assert run(["certificates", "new", "hostb", "--ca", str(ca), "--name", "b.example", "--ip", "2001:db8::7"]) == 0
    assert modes(ca / "hostb") == {
        "ca-cert.pem": 0o644,
        "server-cert.pem": 0o644,
        "server-key.pem": 0o600,
        "client-cert.pem": 0o644,
        "client-key.pem": 0o600,
    }
    said = capsys.readouterr().out
    assert "hostb, b.example, 2001:db8::7" in said
    assert f"scp -p {ca}/hostb/*.pem root@hostb:/etc/migrated/tls/" in said
    for role in ("source", "target"):
        credentials = Credentials(TlsFiles.conventional(role, ca / "hostb"), role=role)
        assert credentials.problems() == []


@pytest.mark.parametrize(("kind", "purpose"), [("server", "sslserver"), ("client", "sslclient")])
def test_openssl_accepts_them_strictly_and_for_their_purpose_only(ca: Path, kind: str, purpose: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl program")
    assert run(["certificates", "new", "hostb", "--ca", str(ca)]) == failure.DONE
    for asked in ("sslserver", "sslclient"):
        verify = ["openssl", "verify", "-x509_strict", "-purpose", asked, "-CAfile", str(ca / "ca-cert.pem")]
        done = subprocess.run([*verify, str(ca / "hostb" / f"{kind}-cert.pem")], check=False, capture_output=True)
        assert (done.returncode == 0) is (asked == purpose), done


def test_nothing_is_overwritten_and_nothing_is_left_of_an_attempt(ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (ca / "ca-key.pem").read_bytes()
    assert run(["certificates", "new-ca", str(ca)]) == failure.USAGE
    assert "ca-key.pem exists already" in capsys.readouterr().err
    assert (ca / "ca-key.pem").read_bytes() == before

    (ca / "hostb").mkdir()
    (ca / "hostb" / "client-key.pem").write_text("precious")
    assert run(["certificates", "new", "hostb", "--ca", str(ca)]) == failure.USAGE
    assert [file.name for file in (ca / "hostb").iterdir()] == ["client-key.pem"]
    assert (ca / "hostb" / "client-key.pem").read_text() == "precious"


def test_new_files_beside_the_old_ones(ca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    asked = ["certificates", "new", "192.0.2.7", "--ca", str(ca), "--out", str(out), "--days", "30", "--json"]
    capsys.readouterr()
    assert run(asked) == failure.DONE
    made = json.loads(capsys.readouterr().out)
    assert made["names"] == ["192.0.2.7"]
    assert {Path(file).name for file in made["files"]} == set(modes(out))
    certificate = x509.load_pem_x509_certificate((out / "server-cert.pem").read_bytes())
    (name,) = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert isinstance(name, x509.IPAddress)
    days = (certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)).days
    assert days in (29, 30)


def test_a_certificate_is_not_valid_for_longer_than_its_authority(tmp_path: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    authority = Authority.make("short", now=now, days=10)
    certificates.make_host(authority, tmp_path / "host", ["host"], now=now)
    certificate = x509.load_pem_x509_certificate((tmp_path / "host" / "server-cert.pem").read_bytes())
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


@pytest.mark.parametrize("name", ["", "host:7440", "a b", "../etc", "*.example", "host..example", "x" * 64])
def test_a_name_that_no_host_has_is_refused(ca: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert run(["certificates", "new", name, "--ca", str(ca)]) == failure.USAGE
    assert "cannot be a host's name" in capsys.readouterr().err
    assert not [path for path in ca.rglob("*") if path.name.startswith("server")]


def test_an_authority_that_is_not_there_or_not_whole(ca: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/ca-cert\.pem: No such file") as caught:
        Authority.load(tmp_path / "nowhere")
    assert "new-ca" in caught.value.hint
    other = tmp_path / "other"
    certificates.make_authority(other, now=dt.datetime.now(dt.UTC))
    shutil.copy(other / "ca-key.pem", ca / "ca-key.pem")
    with pytest.raises(ConfigError, match=r"not the key of ca-cert\.pem"):
        Authority.load(ca)
    (ca / "ca-cert.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="not a PEM file"):
        Authority.load(ca)
