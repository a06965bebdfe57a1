"""A CA of a test and the certificates that it signs, made with the openssl program."""

from __future__ import annotations

import subprocess
from pathlib import Path

from migrated.memory.channel import Tls

KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


class Authority:
    """Files in ``directory``: ``ca.pem``, and NAME.pem with NAME.key for every `certificate`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.ca = directory / "ca.pem"
        self._openssl("ca", "/CN=ca of a test")

    def _openssl(self, name: str, subject: str, *more: str | Path) -> None:
        out = ("-keyout", self.directory / f"{name}.key", "-out", self.directory / f"{name}.pem")
        command = ("openssl", "req", "-x509", *KEY, "-days", "2", "-subj", subject, *out, *more)
        subprocess.run(command, check=True, capture_output=True)

    def side(self, name: str, *, server: bool) -> Tls:
        """The files of the host ``name`` (made at the first call), which 127.0.0.1 stands for too."""
        certificate, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        if not certificate.exists():
            signer = ("-CA", self.ca, "-CAkey", self.directory / "ca.key")
            self._openssl(
                name,
                f"/CN={name}",
                *signer,
                "-addext",
                f"subjectAltName=DNS:{name},IP:127.0.0.1",
                "-addext",
                "basicConstraints=critical,CA:false",
            )
        return Tls(server=server, ca=self.ca, certificate=certificate, key=key)
