"""Tokens: who may read, publish, administer or enrol what. JSON Web Tokens (RFC 7519), signed with Ed25519. Pure.

A scope is ``<org or *>/<name or *>:<right>``; rights are apart, and none implies another. Whoever has the signed
``access`` metadata verifies a token by itself: the keys that are good, and the ids that are revoked, are in it as
``{"token_keys": [{"id", "public", "until"?}], "revoked": [{"id", "expires"}]}``. Times are seconds since 1970.

To whoever shows it, a token that is forged, malformed or signed by an unknown key gets one answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import ceil
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from jwt import PyJWS
from jwt.exceptions import PyJWTError

from shared import codec
from shared.errors import BadId, DecodeError, RequestError, UpstreamError
from shared.ids import parse_model
from shared.keys import NodeKey, parse_public

MAX_TOKEN = 4096
"""Characters of a token."""
MAX_SCOPES = 32
MAX_KEYS = 16
MAX_REVOKED = 10_000
MAX_ID = 64
SKEW = 60.0
"""Seconds that clocks may differ by."""
MAX_LIFETIME = 366 * 86_400.0
"""Seconds that a token may be good for."""
ANY = "*"
EVERYTHING = f"{ANY}/{ANY}"
"""Stands for all models, those to come among them: in place of a model, it is covered by the scope of all alone."""

_SHAPE = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")
_ID = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_ID}}}")
_CLAIMS = {"jti", "iat", "exp", "scope", "sub"}
_ALGORITHM = "EdDSA"
_BEARER = "Bearer"


class Right(StrEnum):
    """What a scope lets do."""

    READ = "read"
    PUBLISH = "publish"
    ADMIN = "admin"
    ENROLL = "enroll"


class TokenError(RequestError):
    """A token that is not good, or not there where one is needed. Says so as RFC 6750 §3 has it."""

    code = "token_invalid"
    challenge = ' error="invalid_token"'

    def __init__(self, message: str = "") -> None:
        super().__init__(message, headers={"WWW-Authenticate": _BEARER + self.challenge})


class TokenMissing(TokenError):
    """None was given. RFC 6750 §3.1: then there is no error code in the challenge."""

    code = "token_missing"
    challenge = ""


class TokenInvalid(TokenError):
    """Forged, malformed, or signed by a key that is not known."""


class TokenExpired(TokenError):
    """It was good once."""

    code = "token_expired"


class TokenEarly(TokenError):
    """It is from the future: a clock is wrong."""

    code = "token_early"


class TokenRevoked(TokenError):
    """It was called back."""

    code = "token_revoked"


class Forbidden(TokenError):
    """A good token, for something else."""

    code = "forbidden"
    challenge = ' error="insufficient_scope"'


@dataclass(frozen=True, slots=True)
class Scope:
    """One right, to one model or (``*``) to many. ``str()`` gives its one spelling."""

    org: str
    name: str
    right: Right

    def __str__(self) -> str:
        return f"{self.org}/{self.name}:{self.right}"

    def covers(self, model: str) -> bool:
        """Whether a model, or EVERYTHING, is among what it is for."""
        org, _, name = model.partition("/")
        return self.org in (ANY, org) and self.name in (ANY, name)


def parse_scope(text: str) -> Scope:
    """The scope that ``text`` spells. Raises BadId."""
    model, colon, right = text.partition(":")
    org, slash, name = model.partition("/")
    if not colon or not slash or right not in set(Right):
        raise BadId("a scope is '<org or *>/<name or *>:<read, publish, admin or enroll>'")
    parse_model("/".join("x" if part == ANY else part for part in (org, name)))
    return Scope(org, name, Right(right))


def parse_scopes(texts: Iterable[object]) -> tuple[Scope, ...]:
    """1 to MAX_SCOPES scopes, each once. Raises BadId."""
    listed = list(texts)
    if not 1 <= len(listed) <= MAX_SCOPES:
        raise BadId(f"a token has 1 to {MAX_SCOPES} scopes")
    found = tuple(parse_scope(text) for text in listed if isinstance(text, str))
    if len(set(found)) != len(listed):
        raise BadId("scopes are texts, each once")
    return found


@dataclass(frozen=True, slots=True)
class Token:
    """What a verified token says."""

    id: str
    key: str
    issued: float
    expires: float
    scopes: tuple[Scope, ...]
    subject: str = ""

    def may(self, right: Right, model: str) -> bool:
        """Whether it has a right to a model, or to EVERYTHING."""
        return any(scope.right is right and scope.covers(model) for scope in self.scopes)

    def require(self, right: Right, model: str) -> None:
        """Raises Forbidden where it has not."""
        if not self.may(right, model):
            raise Forbidden

    def may_in(self, right: Right, org: str) -> bool:
        """Whether it has a right to anything of an organisation."""
        return any(scope.right is right and scope.org in (ANY, org) for scope in self.scopes)


def key_id(public: bytes) -> str:
    """What a key is called in a token's head: it follows from the key, so two keys never share one."""
    return hashlib.sha256(public).hexdigest()[:16]


def issue(
    key: NodeKey, scopes: Sequence[Scope], *, token_id: str, now: float, lifetime: float, subject: str = ""
) -> str:
    """A token that is good from ``now`` for ``lifetime`` seconds. Raises BadId for what no verifier would take."""
    parse_scopes(map(str, scopes))
    if not _ID.fullmatch(token_id):
        raise BadId("a token's id has letters, digits, '-' and '_'")
    if not 1 <= lifetime <= MAX_LIFETIME:
        raise BadId(f"a token is good for 1 second to {MAX_LIFETIME / 86_400:.0f} days")
    claims: dict[str, object] = {
        "jti": token_id,
        "iat": int(now),
        "exp": int(now + lifetime),
        "scope": [str(scope) for scope in scopes],
    }
    if subject:
        claims["sub"] = subject
    head = {"kid": key_id(key.public), "typ": "JWT"}
    text = PyJWS().encode(codec.encode_json(claims), key.pem(), algorithm=_ALGORITHM, headers=head)
    if len(text) > MAX_TOKEN:
        raise BadId(f"a token has at most {MAX_TOKEN} characters; give it fewer scopes")
    return text


def read_claims(text: str) -> Token:
    """What a token says, whoever signed it: for people, and to find its id. Raises TokenInvalid."""
    head = _head(text)
    try:
        whole = PyJWS().decode_complete(text, options={"verify_signature": False})
    except PyJWTError as error:
        raise TokenInvalid("not a token") from error
    return _token(head["kid"], whole["payload"])


@dataclass(frozen=True, slots=True)
class TokenKey:
    """A key that tokens may be signed with; ``until`` (seconds since 1970) for one that was replaced."""

    id: str
    public: bytes
    until: float | None = None


class AccessList:
    """Which tokens are good, as the signed ``access`` metadata says."""

    def __init__(self, keys: Iterable[TokenKey], revoked: Mapping[str, float]) -> None:
        """``revoked``: by token id, when it would have expired anyway."""
        self.keys = {key.id: key for key in keys}
        self.revoked = dict(revoked)
        self._public = {key.id: Ed25519PublicKey.from_public_bytes(key.public) for key in self.keys.values()}

    def __repr__(self) -> str:
        return f"<AccessList {len(self.keys)} keys, {len(self.revoked)} revoked>"

    @classmethod
    def parse(cls, document: object) -> AccessList:
        """From the custom field of the verified ``access`` metadata. Raises UpstreamError."""
        try:
            return cls(*_parse_access(document))
        except (RequestError, KeyError, TypeError, ValueError) as error:
            raise UpstreamError("the access metadata is not valid", code="invalid_manifest") from error

    def document(self) -> dict[str, Any]:
        """As it is signed: canonical JSON has whole numbers only."""
        return {
            "token_keys": [
                {"id": key.id, "public": key.public.hex(), **({} if key.until is None else {"until": ceil(key.until)})}
                for key in self.keys.values()
            ],
            "revoked": [{"id": name, "expires": ceil(expires)} for name, expires in sorted(self.revoked.items())],
        }

    def verify(self, text: str, now: float) -> Token:
        """What a good token says. Raises TokenInvalid, TokenExpired, TokenEarly or TokenRevoked."""
        head = _head(text)
        known, public = self.keys.get(head["kid"]), self._public.get(head["kid"])
        if known is None or public is None or (known.until is not None and now > known.until + SKEW):
            raise TokenInvalid("signed by a key that is not known")
        try:
            whole = PyJWS().decode_complete(text, public, algorithms=[_ALGORITHM])
        except PyJWTError as error:
            raise TokenInvalid("the signature is not valid") from error
        token = _token(known.id, whole["payload"])
        if token.id in self.revoked:
            raise TokenRevoked
        if now > token.expires + SKEW:
            raise TokenExpired
        if now < token.issued - SKEW:
            raise TokenEarly
        return token

    # Changes: each gives a new list, without what time has settled

    def with_key(self, public: bytes, now: float, old_until: float) -> AccessList:
        """New tokens are signed with ``public``; those of the keys before are good until ``old_until`` at most.

        Raises BadId where too many keys are good already.
        """
        live, fresh = self._live(now), TokenKey(key_id(public), public)
        kept = [
            TokenKey(key.id, key.public, old_until if key.until is None else key.until)
            for key in live.keys.values()
            if key.id != fresh.id
        ]
        if len(kept) >= MAX_KEYS:
            raise BadId(f"{MAX_KEYS} keys are good already: let tokens of the oldest expire first")
        return AccessList([fresh, *kept], live.revoked)

    def with_revoked(self, token_id: str, now: float, expires: float) -> AccessList:
        """A token is good no more. Raises BadId for what is no token's id, or where too many are revoked already."""
        live = self._live(now)
        if not _ID.fullmatch(token_id):
            raise BadId("not a token's id")
        if len(live.revoked) >= MAX_REVOKED:
            raise BadId(f"{MAX_REVOKED} tokens are revoked already: rotate the key instead")
        return AccessList(live.keys.values(), {**live.revoked, token_id: expires})

    def _live(self, now: float) -> AccessList:
        keys = [key for key in self.keys.values() if key.until is None or now <= key.until + SKEW]
        return AccessList(keys, {name: end for name, end in self.revoked.items() if now <= end + SKEW})


def _head(text: str) -> dict[str, str]:
    """The protected header, of a token that has the shape of one. Raises TokenInvalid."""
    if len(text) > MAX_TOKEN or not _SHAPE.fullmatch(text):
        raise TokenInvalid("not a token")
    try:
        head: dict[str, Any] = PyJWS().get_unverified_header(text)
    except (PyJWTError, ValueError) as error:
        raise TokenInvalid("not a token") from error
    # Fields that we do not know may change what is signed (RFC 7797 §3, RFC 8725 §3.10): there are none
    if head.keys() != {"alg", "kid", "typ"} or head["alg"] != _ALGORITHM or head["typ"] != "JWT":
        raise TokenInvalid("not a token of ours")
    if not isinstance(head["kid"], str) or not _ID.fullmatch(head["kid"]):
        raise TokenInvalid("not a key's id")
    return head


def _token(key: str, payload: bytes) -> Token:
    try:
        claims = codec.decode_json(payload, MAX_TOKEN)
        if not isinstance(claims, dict) or not _CLAIMS >= claims.keys() >= _CLAIMS - {"sub"}:
            raise TokenInvalid("claims that are missing or not known")
        issued, expires = _seconds(claims["iat"]), _seconds(claims["exp"])
        subject = claims.get("sub", "")
        if not isinstance(claims["jti"], str) or not _ID.fullmatch(claims["jti"]) or not isinstance(subject, str):
            raise TokenInvalid("an id or a subject that is none")
        if not isinstance(claims["scope"], list) or not 0 < expires - issued <= MAX_LIFETIME:
            raise TokenInvalid("a scope or times that are none")
        return Token(claims["jti"], key, issued, expires, parse_scopes(claims["scope"]), subject)
    except (DecodeError, BadId) as error:
        raise TokenInvalid("claims that are not acceptable") from error


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 40:
        raise TokenInvalid("a time that is none")
    return float(value)


def _parse_access(document: Any) -> tuple[list[TokenKey], dict[str, float]]:
    keys = []
    for item in document["token_keys"]:
        public = parse_public(item["public"])  # also refuses small order
        if item["id"] != key_id(public):
            raise ValueError("a key's id is not that of the key")
        keys.append(TokenKey(item["id"], public, _seconds(item["until"]) if "until" in item else None))
    revoked = {}
    for item in document["revoked"]:
        if not isinstance(item["id"], str) or not _ID.fullmatch(item["id"]):
            raise ValueError("not a token's id")
        revoked[item["id"]] = _seconds(item["expires"])
    if len(keys) > MAX_KEYS or len(revoked) > MAX_REVOKED:
        raise ValueError("too many keys or tokens")
    return keys, revoked


NOBODY = AccessList([], {})
"""No token is good: where there is no ``access`` metadata."""
