"""Digests: one spelling, and the forms that other standards want."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.digest import digest_fields, digest_of, from_hash, hex_of, parse_digest, raw_of
from shared.errors import BadId
from tests.unit.strategies import quick

HEX = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_the_digest_of_nothing_is_the_known_one() -> None:
    assert digest_of(b"") == f"sha256:{HEX}"


@quick
@given(st.binary())
def test_every_form_of_a_digest_leads_back_to_it(data: bytes) -> None:
    digest = digest_of(data)
    assert parse_digest(digest) == digest
    assert from_hash(raw_of(digest)) == digest
    assert hex_of(digest) == hashlib.sha256(data).hexdigest()
    assert digest_of(bytearray(data)) == digest_of(memoryview(data)) == digest


@pytest.mark.parametrize(
    "text",
    [
        f"sha256:{HEX.upper()}", f"SHA256:{HEX}", f"sha256:{HEX[:-1]}", f"sha256:{HEX}0", f"md5:{HEX}",
        f"sha256-{HEX}", HEX, "", "sha256:", f" sha256:{HEX}", f"sha256:{HEX}\n", f"sha256:{'g' * 64}",
        "sha256:" + "\u0660" * 64, "a" * 10_240,
    ],
)  # fmt: skip
def test_any_other_spelling_is_a_bad_id(text: str) -> None:
    with pytest.raises(BadId):
        parse_digest(text)


@quick
@given(st.text())
def test_any_text_is_a_digest_or_a_bad_id(text: str) -> None:
    with pytest.raises(BadId):
        parse_digest(text)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_hash_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(BadId):
        from_hash(bytes(size))


def test_digest_fields_are_spelled_as_rfc_9530_and_rfc_3230_do() -> None:
    """Its appendix B has this representation and this field value."""
    sha256 = hashlib.sha256(b'{"hello": "world"}\n').hexdigest()
    assert digest_fields(sha256) == {
        "Repr-Digest": "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:",
        "Digest": "SHA-256=RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=",
    }
