"""A deployment's certificates: what is in them, for how long, and whom they are of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from hypothesis import given

from shared.certificates import (
    CA_CERTIFICATE,
    CA_KEY,
    MAX_DAYS,
    URI,
    Authority,
    load_authority,
    make_authority,
    make_certificate,
    node_of,
)
from shared.errors import BadId, ConfigError, RequestError
from tests.unit.strategies import names, quick

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One as it is on disk."""
    pair = make_authority("Acme", NOW)
    (tmp_path / CA_CERTIFICATE).write_bytes(pair.certificate)
    (tmp_path / CA_KEY).write_bytes(pair.key)
    (tmp_path / CA_KEY).chmod(0o600)
    return load_authority(tmp_path)


def test_a_certificate_says_who_and_where_for_both_ends(authority: Authority) -> None:
    pair = make_certificate(authority, "berlin-1", ["edge.example.org", "*.example.org"], ["10.1.0.5", "fd00::5"], NOW)
    made = x509.load_pem_x509_certificate(pair.certificate)
    made.verify_directly_issued_by(authority.certificate)
    found = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert found.get_values_for_type(x509.UniformResourceIdentifier) == ["urn:nearshard:node:berlin-1"]
    assert found.get_values_for_type(x509.DNSName) == ["edge.example.org", "*.example.org"]
    assert found.get_values_for_type(x509.IPAddress) == [ip_address("10.1.0.5"), ip_address("fd00::5")]
    usage = made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {use.dotted_string for use in usage} == {"1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"}
    key = made.public_key()
    assert isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)


@pytest.mark.parametrize("days", [1, 30, MAX_DAYS])
def test_a_certificate_is_good_for_its_days_and_began_an_hour_ago(authority: Authority, days: int) -> None:
    made = x509.load_pem_x509_certificate(make_certificate(authority, "a", [], [], NOW, days).certificate)
    assert made.not_valid_before_utc == NOW - timedelta(hours=1)
    assert made.not_valid_after_utc - made.not_valid_before_utc == timedelta(days=days)


def test_a_certificate_ends_with_its_ca(authority: Authority) -> None:
    end = authority.certificate.not_valid_after_utc
    made = make_certificate(authority, "a", [], [], end - timedelta(days=3))
    assert x509.load_pem_x509_certificate(made.certificate).not_valid_after_utc == end
    with pytest.raises(RequestError, match="has expired"):
        make_certificate(authority, "a", [], [], end)


@pytest.mark.parametrize("days", [0, -1, MAX_DAYS + 1])
def test_other_days_are_refused(authority: Authority, days: int) -> None:
    with pytest.raises(RequestError):
        make_certificate(authority, "a", [], [], NOW, days)


@pytest.mark.parametrize("name", ["", "a b", "A.example.org", "bücher.example", "a/b", "x" * 254, "a\0b"])
def test_what_is_no_host_name_is_refused(authority: Authority, name: str) -> None:
    with pytest.raises(RequestError):
        make_certificate(authority, "a", [name], [], NOW)


@pytest.mark.parametrize("address", ["", "10.1", "10.1.0.0/16", "example.org", "::g"])
def test_what_is_no_address_is_refused(authority: Authority, address: str) -> None:
    with pytest.raises(RequestError):
        make_certificate(authority, "a", [], [address], NOW)


@pytest.mark.parametrize("node", ["", "A", "a/b", "a b", "ü"])
def test_what_is_no_node_is_refused(authority: Authority, node: str) -> None:
    with pytest.raises(BadId):
        make_certificate(authority, node, [], [], NOW)


def test_a_ca_with_another_key_or_none_is_refused(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / CA_KEY).write_bytes(make_authority("other", NOW).key)
    with pytest.raises(ConfigError, match="not the key"):
        load_authority(tmp_path)
    (tmp_path / CA_KEY).write_bytes(b"")
    with pytest.raises(ConfigError):
        load_authority(tmp_path)
    with pytest.raises(ConfigError, match="trust ca"):
        load_authority(tmp_path / "nowhere")


@quick
@given(names)
def test_the_node_of_a_certificate_is_known(name: str) -> None:
    assert node_of({"subjectAltName": (("DNS", "other"), ("URI", URI + name), ("URI", "https://x"))}) == name


@pytest.mark.parametrize(
    "certificate",
    [
        None,
        {},
        {"subjectAltName": (("DNS", f"{URI}a"),)},
        {"subjectAltName": (("URI", "a"), ("DNS", "a"))},
        {"subjectAltName": (("URI", f"{URI}a"), ("URI", f"{URI}b"))},
        {"subjectAltName": (("URI", f"{URI}A/b"),)},
        {"subject": ((("commonName", "a"),),)},
    ],
)
def test_a_certificate_of_no_one_node_is_of_none(certificate: dict[str, object] | None) -> None:
    assert node_of(certificate) is None
