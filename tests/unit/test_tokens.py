"""Tokens: what is good is taken, and everything else is refused with its own code."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from jwt import PyJWS
from securesystemslib.formats import encode_canonical

from shared import codec
from shared.errors import BadId, NearshardError, UpstreamError
from shared.keys import NodeKey
from shared.tokens import (
    MAX_LIFETIME,
    MAX_SCOPES,
    NOBODY,
    SKEW,
    AccessList,
    Right,
    Scope,
    TokenError,
    TokenInvalid,
    TokenKey,
    issue,
    key_id,
    parse_scope,
    parse_scopes,
    read_claims,
)
from tests.unit.strategies import models, names, quick

NOW = 1_800_000_000.0
KEY = NodeKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = NodeKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
ACCESS = AccessList([TokenKey(key_id(KEY.public), KEY.public)], {})
READ = (Scope("acme", "*", Right.READ),)

scopes = st.builds(Scope, names | st.just("*"), names | st.just("*"), st.sampled_from(Right))


def made(**changes: object) -> str:
    """A good token, but for what is changed in its claims (None: left out)."""
    claims = {"jti": "t1", "iat": int(NOW), "exp": int(NOW) + 900, "scope": ["acme/*:read"], **changes}
    return signed({name: value for name, value in claims.items() if value is not None})


def signed(claims: object, **head: object) -> str:
    fields = {"kid": key_id(KEY.public), "typ": "JWT", **head}
    return PyJWS().encode(codec.encode_json(claims), KEY.pem(), algorithm="EdDSA", headers=fields)


def refusal(text: str, now: float = NOW, access: AccessList = ACCESS) -> str:
    with pytest.raises(TokenError) as caught:
        access.verify(text, now)
    assert caught.value.headers["WWW-Authenticate"].startswith("Bearer")
    return caught.value.error_code


@quick
@given(scopes)
def test_a_scope_has_one_spelling(scope: Scope) -> None:
    assert parse_scope(str(scope)) == scope


@quick
@given(st.text(max_size=40) | st.text("acme/*:read", max_size=16))
def test_no_other_text_is_a_scope(text: str) -> None:
    try:
        found = parse_scope(text)
    except BadId:
        return
    assert str(found) == text


@pytest.mark.parametrize(
    "text",
    ["", "acme", "acme:read", "acme/*", "acme/*:", "acme/*:write", "acme/*:READ", "Acme/*:read", "*:read", "a/b/c:read",
     "acme/**:read", "ac*/x:read", "acme/*:read ", " acme/*:read", "acme/*:read:read", "/x:read", "acme/:read",
     "acme/x\n:read", "a/" + "b" * 127 + ":read"],
)  # fmt: skip
def test_what_is_no_scope_is_refused(text: str) -> None:
    with pytest.raises(BadId):
        parse_scope(text)


@quick
@given(models, models)
def test_a_scope_covers_what_it_names_and_nothing_else(model: str, other: str) -> None:
    org, _, name = model.partition("/")
    assert Scope(org, name, Right.READ).covers(other) == (other == model)
    assert Scope(org, "*", Right.READ).covers(other) == (other.partition("/")[0] == org)
    assert Scope("*", name, Right.READ).covers(other) == (other.partition("/")[2] == name)
    assert Scope("*", "*", Right.READ).covers(other)


def test_scopes_are_1_to_32_each_once() -> None:
    many = [f"acme/m{n}:read" for n in range(MAX_SCOPES + 1)]
    assert len(parse_scopes(many[:-1])) == MAX_SCOPES
    for bad in ([], many, ["a/b:read", "a/b:read"], ["a/b:read", 1], [None]):
        with pytest.raises(BadId):
            parse_scopes(bad)


@quick
@given(st.lists(scopes, min_size=1, max_size=5, unique=True), st.integers(1, int(MAX_LIFETIME)), models)
def test_what_was_issued_is_what_is_read(asked: list[Scope], lifetime: int, model: str) -> None:
    text = issue(KEY, asked, token_id="t-1", now=NOW, lifetime=lifetime, subject="ci")
    token = ACCESS.verify(text, NOW)
    assert (token.scopes, token.expires, token.id, token.subject) == (tuple(asked), NOW + lifetime, "t-1", "ci")
    assert token == read_claims(text)
    for right in Right:
        assert token.may(right, model) == any(s.right is right and s.covers(model) for s in asked)


def test_no_right_implies_another() -> None:
    for right in Right:
        token = ACCESS.verify(issue(KEY, [Scope("*", "*", right)], token_id="t", now=NOW, lifetime=9), NOW)
        assert [other for other in Right if token.may(other, "a/b")] == [right]
        assert [other for other in Right if token.may_in(other, "a")] == [right]


def test_a_right_in_an_organisation_is_one_to_anything_of_it() -> None:
    token = ACCESS.verify(issue(KEY, [Scope("acme", "x", Right.READ)], token_id="t", now=NOW, lifetime=9), NOW)
    assert token.may_in(Right.READ, "acme")
    assert not token.may_in(Right.READ, "other") and not token.may_in(Right.PUBLISH, "acme")


def test_times_hold_with_a_minute_to_spare() -> None:
    text = made()
    assert ACCESS.verify(text, NOW + 900 + SKEW).expires == NOW + 900
    assert refusal(text, NOW + 900 + SKEW + 1) == "token_expired"
    assert ACCESS.verify(text, NOW - SKEW).issued == NOW
    assert refusal(text, NOW - SKEW - 1) == "token_early"


def test_a_revoked_token_is_refused_by_that_name_until_it_would_have_expired() -> None:
    revoked = ACCESS.with_revoked("t1", NOW, NOW + 900)
    assert refusal(made(), access=revoked) == "token_revoked"
    assert ACCESS.verify(made(jti="t2"), NOW)
    assert refusal(made(), NOW + 2000, revoked) == "token_revoked"
    later = revoked.with_revoked("t3", NOW + 2000, NOW + 9000)
    assert later.revoked.keys() == {"t3"}


def flipped(text: str, at: int) -> str:
    return text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :]


@quick
@given(st.data())
def test_one_changed_character_is_a_forgery(data: st.DataObject) -> None:
    """The last character of a part carries bits that mean nothing; every other one counts."""
    text = made()
    at = data.draw(
        st.sampled_from([n for n, c in enumerate(text) if c != "." and text[n + 1 : n + 2] not in ("", ".")])
    )
    assert refusal(flipped(text, at)) == "token_invalid"


def test_who_signed_counts() -> None:
    by_other = issue(OTHER, READ, token_id="t", now=NOW, lifetime=9)
    assert refusal(by_other) == "token_invalid"
    claims = {"jti": "t", "iat": int(NOW), "exp": int(NOW) + 9, "scope": ["*/*:read"]}
    as_ours = PyJWS().encode(
        codec.encode_json(claims), OTHER.pem(), algorithm="EdDSA", headers={"kid": key_id(KEY.public)}
    )
    assert refusal(as_ours) == "token_invalid"
    assert refusal(made(), access=NOBODY) == "token_invalid"


def unsecured(head: dict[str, object]) -> str:
    """A token without a real signature."""
    parts = [json.dumps(head).encode(), json.dumps({"jti": "t", "iat": 1, "exp": 9, "scope": ["*/*:read"]}).encode()]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in [*parts, b"\0" * 64])


def hmac_with_the_public_key() -> str:
    head = {"kid": key_id(KEY.public), "typ": "JWT"}
    return PyJWS().encode(b"{}", KEY.public, algorithm="HS256", headers=head)


@pytest.mark.parametrize(
    "make",
    [
        lambda: "",
        lambda: "a.b",
        lambda: "a.b.c",
        lambda: made() + ".x",
        lambda: made() + "=",
        lambda: made() + "\n",
        lambda: " " + made(),
        lambda: made(sub="x" * 4096),
        lambda: unsecured({"alg": "none", "typ": "JWT", "kid": key_id(KEY.public)}),
        lambda: unsecured({"alg": "EdDSA", "typ": "JWT", "kid": key_id(KEY.public)}),
        hmac_with_the_public_key,
        lambda: signed({}),
        lambda: signed([]),
        lambda: signed({}, crit=["b64"], b64=False),
        lambda: signed({"jti": "t"}, jku="http://evil.example/keys"),
        lambda: signed({"jti": "t"}, typ="at+jwt"),
        lambda: made(jti=None),
        lambda: made(jti=7),
        lambda: made(jti="a b"),
        lambda: made(exp=None),
        lambda: made(exp="9"),
        lambda: made(exp=True),
        lambda: made(exp=1 << 60),
        lambda: made(exp=int(NOW)),
        lambda: made(exp=int(NOW + MAX_LIFETIME) + 1),
        lambda: made(iat=None),
        lambda: made(iat=-1),
        lambda: made(scope=None),
        lambda: made(scope="acme/*:read"),
        lambda: made(scope=[]),
        lambda: made(scope=["*"]),
        lambda: made(scope=[f"acme/m{n}:read" for n in range(MAX_SCOPES + 1)]),
        lambda: made(aud="x"),
        lambda: made(sub=["x"]),
    ],
)
def test_what_is_not_exactly_a_token_gets_the_one_answer(make: Callable[[], str]) -> None:
    assert refusal(make()) == "token_invalid"


@quick
@given(st.text(max_size=200) | st.text("aA0_-.", max_size=200) | st.binary(max_size=80).map(lambda b: b.hex() + "..x"))
def test_no_text_is_taken_or_breaks_the_parser(text: str) -> None:
    assert refusal(text) == "token_invalid"


@quick
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["jti", "exp", "iat"]), inner),
        max_leaves=6,
    )
)
def test_no_claims_break_the_parser_whoever_signed_them(value: object) -> None:
    for claims in (value, {"jti": value, "iat": value, "exp": value, "scope": value}):
        assert refusal(signed(claims)) == "token_invalid"


def test_what_cannot_be_verified_is_not_issued() -> None:
    long = [Scope("a" * 60, f"{'b' * 60}{n}", Right.READ) for n in range(MAX_SCOPES)]
    bad: list[tuple[list[Scope], str, float]] = [
        ([], "t", 9),
        ([*READ], "a b", 9),
        ([*READ], "t", 0),
        ([*READ], "t", MAX_LIFETIME + 1),
        (long, "t", 9),
    ]
    for asked, token_id, lifetime in bad:
        with pytest.raises(BadId):
            issue(KEY, asked, token_id=token_id, now=NOW, lifetime=lifetime)


def test_after_a_rotation_both_keys_are_good_until_the_old_tokens_have_expired() -> None:
    old = issue(KEY, READ, token_id="old", now=NOW, lifetime=900)
    rotated = ACCESS.with_key(OTHER.public, NOW + 10, NOW + 900)
    new = issue(OTHER, READ, token_id="new", now=NOW + 10, lifetime=9_000)
    assert [rotated.verify(text, NOW + 10).id for text in (old, new)] == ["old", "new"]
    backdated = issue(KEY, READ, token_id="stolen", now=NOW, lifetime=90_000)
    assert refusal(backdated, NOW + 900 + SKEW + 1, rotated) == "token_invalid"
    assert rotated.with_revoked("x", NOW + 2_000, NOW + 3_000).keys.keys() == {key_id(OTHER.public)}
    again = rotated.with_key(OTHER.public, NOW + 20, NOW + 5_000)
    assert again.keys == rotated.keys, "the same key again changes nothing"


def test_the_list_survives_its_document() -> None:
    made = ACCESS.with_key(OTHER.public, NOW, NOW + 9).with_revoked("t", NOW, NOW + 9)
    document = ACCESS.with_key(OTHER.public, NOW, NOW + 8.5).with_revoked("t", NOW, NOW + 8.5).document()
    again = AccessList.parse(json.loads(str(encode_canonical(document))))
    assert (again.keys, again.revoked) == (made.keys, made.revoked)


SMALL_ORDER = (1).to_bytes(32, "little").hex()


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"token_keys": []},
        {"token_keys": [{"id": "x", "public": KEY.public.hex()}], "revoked": []},
        {"token_keys": [{"id": key_id(bytes.fromhex(SMALL_ORDER)), "public": SMALL_ORDER}], "revoked": []},
        {"token_keys": [{"id": key_id(KEY.public), "public": KEY.public.hex(), "until": "x"}], "revoked": []},
        {"token_keys": [], "revoked": [{"id": "a b", "expires": 1}]},
        {"token_keys": [], "revoked": [{"id": "a"}]},
        {"token_keys": [], "revoked": [{"id": "a", "expires": float("nan")}]},
        {"token_keys": [], "revoked": ["a"]},
    ],
)
def test_a_list_that_is_none_is_refused(document: object) -> None:
    with pytest.raises(UpstreamError):
        AccessList.parse(document)


def test_errors_say_nothing_of_the_token() -> None:
    text = made(sub="s3cret")
    for broken in (flipped(text, 5), flipped(text, -20)):
        try:
            ACCESS.verify(broken, NOW)
        except NearshardError as error:
            assert "s3cret" not in str(error) and broken not in str(error) and not error.public
    with pytest.raises(TokenInvalid):
        read_claims("x")
