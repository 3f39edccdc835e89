"""Certificates for tests, made as an operator makes them."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from origin.certificate_commands import ca_command, cert_command


@dataclass(frozen=True)
class Deployment:
    """A deployment's CA, and where its certificates go."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Deployment:
        """A new one."""
        ca_command(folder)
        return cls(folder)

    @property
    def ca(self) -> Path:
        """The CA's certificate."""
        return self.folder / "ca.pem"

    def cert(
        self, node: str, *, dns: Sequence[str] = ("localhost",), ip: Sequence[str] = ("127.0.0.1",)
    ) -> tuple[Path, Path]:
        """Certificate and key of a node; another one each time."""
        cert_command(node, self.folder, list(dns), list(ip), output=self.folder)
        return self.folder / f"{node}.pem", self.folder / f"{node}.key"

    def words(self, node: str) -> list[str]:
        """What a service's command line has for TLS, with a new certificate."""
        cert, key = self.cert(node)
        return [f"--tls-cert={cert}", f"--tls-key={key}", f"--tls-ca={self.ca}"]

    def client(self, node: str | None = None) -> ssl.SSLContext:
        """For a client, with the certificate that was made for ``node``."""
        context = ssl.create_default_context(cafile=self.ca)
        if node:
            context.load_cert_chain(self.folder / f"{node}.pem", self.folder / f"{node}.key")
        return context
