"""Make the certificates of a small authority, for operators who have none.

The authority is a directory with ``ca-cert.pem`` and ``ca-key.pem``.  A host gets a directory of its own with the files
that its agents look for: the authority's certificate, and a certificate and a key for each role.  Keys are on the curve
P-256, which every OpenSSL has and which makes a handshake cheap.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import ipaddress
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrated.errors import ConfigError, HostError
from migrated.settings import TLS_CA_FILE, TlsFiles

CA_KEY: Final = "ca-key.pem"
ROLES: Final = ("target", "source")

CA_DAYS: Final = 3650
HOST_DAYS: Final = 730
#: Certificates are valid from a little earlier, since the clocks of two hosts differ.
CLOCK_SKEW: Final = dt.timedelta(hours=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority, ready to sign."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, name: str, *, now: dt.datetime, days: int = CA_DAYS) -> Authority:
        """Make a self-signed one."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
        builder = (
            _builder(subject, subject, key, now - CLOCK_SKEW, now + dt.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def load(cls, directory: Path) -> Authority:
        """Load the one in a directory.  Raises ConfigError."""
        hint = f"make one with `migrated certificates new-ca {directory}`, or give --ca DIR"
        path = directory / TLS_CA_FILE
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            path = directory / CA_KEY
            key = load_pem_private_key(path.read_bytes(), password=None)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}", hint=hint) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}: not a PEM file of an authority: {error}", hint=hint) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise ConfigError(f"{path}: not the key of {TLS_CA_FILE}", hint=hint)
        return cls(certificate, key)

    def issue(
        self, names: Sequence[str], *, role: str, not_before: dt.datetime, not_after: dt.datetime
    ) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        """Sign a certificate for a role's agent.  ``names``: host names and addresses; the first is the subject."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
        usage = ExtendedKeyUsageOID.SERVER_AUTH if role == "target" else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(subject, self.certificate.subject, key, not_before, not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256()), key


def make_authority(directory: Path, *, now: dt.datetime) -> list[Path]:
    """Make an authority in a directory; return the files.  Raises ConfigError if there is one, HostError."""
    authority = Authority.make(f"migrated CA {now:%Y-%m-%d}", now=now)
    certificate, key = directory / TLS_CA_FILE, directory / CA_KEY
    _write_new([(key, pem(authority.key), 0o600), (certificate, pem(authority.certificate), 0o644)])
    return [certificate, key]


def make_host(
    authority: Authority, directory: Path, names: Sequence[str], *, now: dt.datetime, days: int = HOST_DAYS
) -> list[Path]:
    """Make the files of a host's agents in a directory; return them.  Raises ConfigError if they exist, HostError."""
    not_after = min(now + dt.timedelta(days=days), authority.certificate.not_valid_after_utc)
    files = [(directory / TLS_CA_FILE, pem(authority.certificate), 0o644)]
    for role in ROLES:
        certificate, key = authority.issue(names, role=role, not_before=now - CLOCK_SKEW, not_after=not_after)
        paths = TlsFiles.conventional(role, directory)
        files += [(paths.key, pem(key), 0o600), (paths.cert, pem(certificate), 0o644)]
    _write_new(files)
    return [path for path, _, _ in files]


def check_name(name: str) -> str:
    """Return a name or address that a certificate can be for.  Raises ConfigError."""
    try:
        _general_name(name)
    except ValueError as error:
        raise ConfigError(
            f"{name!r} cannot be a host's name in a certificate",
            hint="give the name or the address by which other hosts reach this one, without a port",
        ) from error
    return name


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.split(".")
    if not all(0 < len(label) <= 63 and label.replace("-", "").replace("_", "").isalnum() for label in labels):
        raise ValueError(name)
    return x509.DNSName(name)  # raises ValueError unless the name is ASCII


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    not_before: dt.datetime,
    not_after: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def pem(thing: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    """Return a certificate or a key, unencrypted, as PEM."""
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(Encoding.PEM)
    return thing.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write_new(files: Iterable[tuple[Path, bytes, int]]) -> None:
    """Write files that must not exist, all or none."""
    with contextlib.ExitStack() as undo:
        for path, data, mode in files:
            try:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
                undo.callback(path.unlink, missing_ok=True)
                with os.fdopen(fd, "wb") as file:
                    os.fchmod(fd, mode)  # whatever the umask
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
            except FileExistsError as error:
                raise ConfigError(
                    f"{path} exists already, and is not overwritten", hint="move it away, or give another directory"
                ) from error
            except OSError as error:
                raise HostError(f"{path}: {error.strerror}", hint="the directory must be this user's") from error
        undo.pop_all()
