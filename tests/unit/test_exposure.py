"""Which settings let a service be reached from elsewhere (FAULTS C2: refused without TLS and authentication)."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from edge_node.config import EdgeSettings
from origin.config import OriginSettings
from router.config import RouterSettings
from shared import log
from shared.config import ServiceSettings, load
from shared.errors import ConfigError
from shared.web.tls import Certificates
from tests.certificates import Deployment

TLS = ["--tls-cert=a.pem", "--tls-key=a.key"]
SERVICES: list[type[ServiceSettings]] = [OriginSettings, RouterSettings, EdgeSettings]


@pytest.fixture(autouse=True)
def _root(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nodes and routers cannot do without, whatever else they are told."""
    for service in ("ROUTER", "EDGE"):
        monkeypatch.setenv(f"NEARSHARD_{service}_TRUST_ROOT", "root.json")


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "localhost"])
def test_loopback_needs_nothing(service: type[ServiceSettings], host: str) -> None:
    assert load(service, ["--host", host]).host == host


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.1.0.5", "::ffff:10.1.0.5", "localhost.example.org", "127.0.0.1.example.org", ""]
)
def test_elsewhere_needs_tls_or_a_word(service: type[ServiceSettings], host: str) -> None:
    with pytest.raises(ConfigError, match="tls_cert"):
        load(service, ["--host", host])
    load(service, ["--host", host, "--insecure"])
    load(service, ["--host", host, *TLS, *(["--enrolled=nodes.toml"] if service is RouterSettings else [])])


def test_a_router_elsewhere_needs_an_enrolment_too() -> None:
    with pytest.raises(ConfigError, match="enrolled"):
        load(RouterSettings, ["--host", "0.0.0.0", *TLS])
    with pytest.raises(ConfigError, match="tls_cert"):
        load(RouterSettings, ["--host", "0.0.0.0", "--enrolled=nodes.toml"])


def test_the_file_of_settings_is_held_to_the_same(tmp_path: Path) -> None:
    file = tmp_path / "nearshard.toml"
    file.write_text('[edge]\nhost = "0.0.0.0"\n')
    with pytest.raises(ConfigError, match=r"edge\.host"):
        load(EdgeSettings, ["--config", str(file)])
    file.write_text('[edge]\nhost = "0.0.0.0"\ninsecure = true\n')
    assert load(EdgeSettings, ["--config", str(file)]).insecure


@pytest.mark.parametrize(
    "words",
    [
        ["--tls-cert", "{cert}"],
        ["--tls-key", "{key}"],
        ["--tls-cert", "{key}", "--tls-key", "{cert}"],
        ["--tls-cert", "{cert}", "--tls-key", "/nowhere"],
        ["--tls-cert", "/nowhere", "--tls-key", "{key}"],
        ["--tls-cert", "{cert}", "--tls-key", "{other}"],
        ["--tls-cert", "{cert}", "--tls-key", "{locked}"],
        ["--tls-ca", "{key}"],
        ["--tls-ca", "/nowhere"],
        ["--node-certificates", "required"],
        ["--node-certificates", "required", "--tls-cert", "{cert}", "--tls-key", "{key}"],
    ],
)
async def test_files_that_do_not_fit_are_refused(tmp_path: Path, words: list[str]) -> None:
    deployment = Deployment.make(tmp_path / "ca")
    (cert, key), (_, other) = deployment.cert("a"), deployment.cert("b")
    cert.chmod(0o600)  # so that it is not refused for that, where it is taken for the key
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        load_pem_private_key(key.read_bytes(), None).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"password")
        )
    )
    locked.chmod(0o600)
    with pytest.raises(ConfigError):
        Certificates(
            load(OriginSettings, [word.format(cert=cert, key=key, other=other, locked=locked) for word in words]),
            log.get("test"),
        )
