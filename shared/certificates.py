"""A deployment's own certificates: one authority, and a short-lived certificate for each service.

A certificate says who its holder is (``urn:nearshard:node:<name>`` among its alternative names: what a service knows
a node by that connects to it) and where it is reached (DNS names and addresses: what clients check). One certificate
does both, since a node is a server to some and a client of others.

Keys are ECDSA on P-256: what every TLS library takes; Ed25519 certificates are refused by many.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import BadId, ConfigError, RequestError
from shared.ids import parse_name
from shared.keys import read_private

AUTHORITY_DAYS = 3650
MAX_DAYS = 90
"""Days that a service's certificate is good for, at most: there is no list of revoked ones."""
BACKDATED = timedelta(hours=1)
"""How far a certificate's beginning lies back: clocks differ. Part of its days."""
URI = "urn:nearshard:node:"
CA_CERTIFICATE, CA_KEY = "ca.pem", "ca.key"
_HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-.*")


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class Authority:
    """Who certificates are made by."""

    certificate: x509.Certificate
    key: EllipticCurvePrivateKey


def make_authority(name: str, now: datetime) -> Pair:
    """A new authority, good for ten years. ``name`` is for people."""
    key = generate_private_key(SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        key_cert_sign=True, crl_sign=True, digital_signature=False, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = (
        _begun(subject, subject, key, now, timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return Pair(builder.sign(key, SHA256()).public_bytes(Encoding.PEM), _pem(key))


def load_authority(directory: Path) -> Authority:
    """What ``make_authority`` made, from its two files. Raises ConfigError, DiskError."""
    file = directory / CA_KEY
    try:
        key = load_pem_private_key(read_private(file), None)
        certificate = x509.load_pem_x509_certificate((directory / CA_CERTIFICATE).read_bytes())
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{directory}: no deployment's CA ({error}); `nearshard trust ca` makes one") from error
    if not isinstance(key, EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"{file}: not the key of {CA_CERTIFICATE}")
    return Authority(certificate, key)


def make_certificate(
    authority: Authority, node: str, names: Sequence[str], addresses: Sequence[str], now: datetime, days: int = MAX_DAYS
) -> Pair:
    """A certificate for ``node``, reached at these DNS names and IP addresses, good for ``days`` (1 to MAX_DAYS), or
    until the authority's own ends. Raises RequestError, BadId."""
    if not 1 <= days <= MAX_DAYS:
        raise RequestError(f"a certificate is good for 1 to {MAX_DAYS} days")
    key = generate_private_key(SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, parse_name(node, "a node")[:64])])
    lasts = min(timedelta(days=days), authority.certificate.not_valid_after_utc - (now - BACKDATED))
    usage = x509.KeyUsage(
        digital_signature=True, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=False, crl_sign=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    if lasts <= BACKDATED:
        raise RequestError("the deployment's CA has expired; make a new one")
    issuer = authority.certificate
    builder = (
        _begun(subject, issuer.subject, key, now, lasts)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([*_alternatives(node, names, addresses)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    return Pair(builder.sign(authority.key, SHA256()).public_bytes(Encoding.PEM), _pem(key))


def first_expiry(pem: bytes) -> float:
    """When the first of these certificates expires, in seconds since 1970. Raises ValueError."""
    return min(one.not_valid_after_utc.timestamp() for one in x509.load_pem_x509_certificates(pem))


def node_of(certificate: Mapping[str, Any] | None) -> str | None:
    """The node that a checked certificate (as ``SSLSocket.getpeercert`` gives it) is of; None where it names none, or
    more than one."""
    uris = [value for kind, value in (certificate or {}).get("subjectAltName", ()) if kind == "URI"]
    names = [uri.removeprefix(URI) for uri in uris if uri.startswith(URI)]
    try:
        return parse_name(names[0]) if len(names) == 1 else None
    except BadId:
        return None


def _alternatives(node: str, names: Iterable[str], addresses: Iterable[str]) -> Iterable[x509.GeneralName]:
    yield x509.UniformResourceIdentifier(URI + node)
    for name in names:
        if not name or len(name) > 253 or not set(name) <= _HOST_CHARACTERS:
            raise RequestError("a DNS name has letters a-z, digits, hyphens and dots; others in their xn-- form")
        yield x509.DNSName(name)
    for address in addresses:
        try:
            yield x509.IPAddress(ip_address(address))
        except ValueError:
            raise RequestError("an IP address is like 10.1.0.5 or fd00::5") from None


def _begun(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, now: datetime, lasts: timedelta
) -> x509.CertificateBuilder:
    begin = now - BACKDATED
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
