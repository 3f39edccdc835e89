"""Federated rounds: what a site and an origin say to each other. Pure.

All below ``/federated/<org>/<name>`` of an origin; an edge passes it on to its origins, unread.

=================================  ===================================================================================
``GET`` of it                      JSON: the open round and the last ones (``Rounds``). For who may read the model
``POST updates``                   a signed statement (``Statement``) with a ``Nearshard-Signature`` of its bytes:
                                   201 ``{"upload", "token", "offset"}``, and the body may come from that offset on;
                                   200 ``{"state": "duplicate"}`` where this body was counted already
``HEAD updates/<64 hex digits>``   ``Upload-Offset`` and ``Upload-Length``: how much of the body is there
``PATCH updates/<64 hex digits>``  ``application/partial-upload`` at ``Upload-Offset``: 204 with the new offset; with
                                   the last byte 200 ``{"state": "counted", "clipped"}``. 409 ``wrong_offset`` has the
                                   right one in the field; sending goes on there
=================================  ===================================================================================

HEAD and PATCH carry ``Authorization: Nearshard-Update <token>``. A statement may be sent again, as it was or signed
anew for the same body: that gives another token for the same upload, and changes nothing of what is counted. What is
counted is one body a site in a round. The digest names an upload of one site; two sites have nothing in common.

An update is ``base - trained`` for each tensor that takes part, as one document (``shared.updates``); the new weights
are ``base - aggregate``. A statement says for which round it was made. Where the round's ``late`` is above 0, one for
an earlier round is taken into the one that is open, with its weight times ``late`` for each round that it is old.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from shared import codec
from shared.digest import Digest, hex_of, parse_digest
from shared.enrolment import is_loopback, parse_signature
from shared.errors import BadId, DecodeError, NotFound, RequestError, UpstreamError
from shared.ids import parse_model, parse_name
from shared.keys import NodeKey, verify
from shared.manifest import Tensor
from shared.paths import decode_path

PREFIX = "/federated"
SCHEME = "Nearshard-Update"
"""Of Authorization, for what belongs to an upload."""
UPDATE = b"nearshard federated update 1\0"
"""What a statement's signature is for."""
STATEMENT_TYPE, PART_TYPE = "application/msgpack", "application/partial-upload"
"""Content-Type of a statement and of a part of a body."""
OFFSET_FIELD, LENGTH_FIELD = "Upload-Offset", "Upload-Length"
MAX_STATEMENT = 16 << 10
"""Bytes of a statement."""
MAX_ROUNDS = 64
"""Rounds that an answer lists besides the open one."""
MAX_EXAMPLES = 10**9
"""Examples that a site can have trained on."""
MAX_CODECS = 64
MAX_UPDATE = 1 << 40
"""Bytes of a body that a statement can name; a round allows fewer."""
MAX_SKEW = 300.0
"""Seconds by which the clocks of a site and an origin may differ."""
NONCE = 16
"""Bytes of a statement's nonce."""
FLOATS: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of the tensors that can take part, as safetensors names them, with the bytes of an element."""
_HEX = re.compile(r"[0-9a-f]{64}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,15}")
_TOKEN = re.compile(rf"{SCHEME} ([A-Za-z0-9_-]{{43}})", re.IGNORECASE)
_FIELDS = ("base", "codecs", "digest", "examples", "model", "nonce", "round", "site", "size", "time")


@dataclass(frozen=True, slots=True)
class Statement:
    """What a site says of its update, and signs."""

    site: str
    model: str
    round: int
    """The number of the round that it was made for, from 1."""
    base: Digest
    """The revision that was trained on."""
    nonce: bytes
    time: datetime
    examples: int
    """Examples that it was trained on."""
    digest: Digest
    """Of the body."""
    size: int
    """Bytes of the body."""
    codecs: tuple[str, ...]
    """Names of those that the body is written with, each once, in order."""


@dataclass(frozen=True, slots=True)
class OpenRound:
    """The round that takes updates."""

    number: int
    base: Digest
    state: str
    tensors: tuple[str, ...]
    """Globs of the names of those that take part; none for all floats."""
    deadline: datetime
    codecs: tuple[str, ...]
    """Globs of the names of codecs that are accepted."""
    min_sites: int
    sites: int
    """Those that may take part."""
    counted: int
    """Those whose update is there."""
    max_bytes: int
    """Bytes that a body may have."""
    late: float
    """Factor of the weight of an update for each round that it is old; 0: only this round's are taken."""
    rule: str


@dataclass(frozen=True, slots=True)
class PastRound:
    """A round that takes none any more."""

    number: int
    base: Digest
    state: str
    counted: int
    revision: Digest | None = None
    """What was published, or is held back."""
    ended: str = ""
    """When, in ISO 8601."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """What there is of a model: the open round, and the last ones, newest first."""

    model: str
    open: OpenRound | None
    last: tuple[PastRound, ...] = ()

    def number_for(self, base: Digest) -> int | None:
        """The round that an update upon ``base`` is for: the open one, or an earlier one where late ones are taken."""
        if self.open is None:
            return None
        if self.open.base == base:
            return self.open.number
        known = (past.number for past in self.last if past.base == base)
        return next(known, None) if self.open.late else None


@dataclass(frozen=True, slots=True)
class Offer:
    """What a statement was answered with. ``duplicate``: the body is counted, and nothing is to be sent."""

    duplicate: bool = False
    upload: str = ""
    """The path to send the body to."""
    token: str = field(default="", repr=False)
    offset: int = 0
    """Bytes of the body that are there already."""


@dataclass(frozen=True, slots=True)
class Counted:
    """What the last byte of a body was answered with."""

    clipped: bool
    """Whether it was larger than most that were there, and would be scaled down."""
    duplicate: bool = False


# Paths


@dataclass(frozen=True, slots=True)
class FederatedPath:
    """A path below ``/federated``: a model's rounds; its updates; one upload (``digest``)."""

    model: str
    updates: bool = False
    digest: Digest | None = None


def rounds_path(model: str) -> str:
    """Where a model's rounds are told."""
    return f"{PREFIX}/{model}"


def updates_path(model: str) -> str:
    """Where statements go."""
    return f"{PREFIX}/{model}/updates"


def upload_path(model: str, digest: Digest) -> str:
    """Where a body goes."""
    return f"{PREFIX}/{model}/updates/{hex_of(digest)}"


def parse_federated_path(raw: str) -> FederatedPath:
    """What a raw request target below ``/federated`` is. Raises BadId; NotFound for what is none of them."""
    _, head, *rest = decode_path(raw).split("/")
    if head != PREFIX[1:] or len(rest) < 2:
        raise NotFound("no such path")
    model = parse_model("/".join(rest[:2]))
    match rest[2:]:
        case []:
            return FederatedPath(model)
        case ["updates"]:
            return FederatedPath(model, updates=True)
        case ["updates", digits] if _HEX.fullmatch(digits):
            return FederatedPath(model, updates=True, digest=parse_digest(f"sha256:{digits}"))
        case ["updates", _]:
            raise BadId("an upload is named by 64 hex digits, lower case")
        case _:
            raise NotFound("no such path")


def check_url(url: str) -> str:
    """``url``, where updates may be sent to it: by TLS, or to this machine itself. Raises RequestError."""
    if urlsplit(url).scheme != "https" and not is_loopback(url):
        raise RequestError(f"{url}: updates are sent by https only, or to this machine itself", code="forbidden")
    return url


# Statements


def sign_statement(statement: Statement, key: NodeKey) -> tuple[bytes, str]:
    """The body that says it, and the value of its signature field."""
    document = {
        **asdict(statement),
        "time": statement.time.astimezone(UTC).isoformat(timespec="milliseconds"),
        "codecs": list(statement.codecs),
    }
    body = codec.encode(dict(sorted(document.items())))
    return body, key.sign(UPDATE + body).hex()


def parse_statement(model: str, body: bytes) -> Statement:
    """What a body states about ``model``; nothing of it is proven yet. Raises RequestError (``bad_update``,
    ``bad_body``, ``too_large``)."""
    document = codec.decode(body, MAX_STATEMENT)
    if not isinstance(document, dict) or document.keys() != set(_FIELDS):
        raise _bad(f"a statement has {', '.join(_FIELDS)}")
    if document["model"] != model:
        raise _bad("the statement is about another model")
    nonce, names = document["nonce"], document["codecs"]
    if not isinstance(nonce, bytes) or len(nonce) != NONCE:
        raise _bad(f"a nonce has {NONCE} bytes")
    if not isinstance(names, list) or not 0 < len(names) <= MAX_CODECS or not all(map(_is_word, names)):
        raise _bad(f"codecs are 1 to {MAX_CODECS} names")
    try:
        site, base = parse_name(_text(document, "site"), "a site"), parse_digest(_text(document, "base"))
        digest, time = parse_digest(_text(document, "digest")), datetime.fromisoformat(_text(document, "time"))
    except (BadId, ValueError) as error:
        raise _bad(f"a site, digest or time that is none: {error}") from error
    if time.tzinfo is None:
        raise _bad("a time without its zone")
    return Statement(
        site,
        model,
        _count(document, "round", 10**9),
        base,
        nonce,
        time,
        _count(document, "examples", MAX_EXAMPLES),
        digest,
        _count(document, "size", MAX_UPDATE),
        tuple(names),
    )


def check_signed(body: bytes, signature: str, key: bytes) -> None:
    """Whether the holder of ``key`` states this. Raises RequestError (``bad_signature``)."""
    if not verify(key, parse_signature(signature), UPDATE + body):
        raise RequestError("not signed with the key that the site was enrolled with", code="bad_signature")


def _bad(message: str) -> RequestError:
    return RequestError(message, code="bad_update")


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document[name]
    if not isinstance(value, str):
        raise _bad(f"{name} is a text")
    return value


def _count(document: Mapping[str, Any], name: str, most: int) -> int:
    value = document[name]
    if type(value) is not int or not 0 < value <= most:
        raise _bad(f"{name} is a number from 1 to {most}")
    return value


def _is_word(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 64 and value.isascii() and value.isprintable()


# Fields


def authorization(token: str) -> str:
    """The field's value that shows an upload's token."""
    return f"{SCHEME} {token}"


def parse_authorization(text: str) -> str:
    """The token that a field shows. Raises RequestError (``unauthorized``)."""
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise RequestError(
            "an upload's token is needed; a statement gives one",
            code="unauthorized",
            headers={"WWW-Authenticate": SCHEME},
        )
    return match[1]


def parse_offset(text: str) -> int:
    """The number in an offset field. Raises RequestError (``bad_request``)."""
    if not _NUMBER.fullmatch(text):
        raise RequestError(f"{OFFSET_FIELD} is a number of bytes")
    return int(text)


# Answers. Their parsers are for clients: what is wrong there is a source's mistake.


def encode_rounds(rounds: Rounds) -> bytes:
    """As JSON."""
    document = asdict(rounds)
    if rounds.open:
        document["open"]["deadline"] = rounds.open.deadline.astimezone(UTC).isoformat(timespec="seconds")
    return codec.encode_json(document)


def parse_rounds(data: bytes) -> Rounds:
    """What ``encode_rounds`` gave. Raises UpstreamError; other fields are left for later."""
    try:
        document = codec.decode_json(data)
        found = document["open"]
        return Rounds(
            parse_model(document["model"]),
            _open_round(found) if found is not None else None,
            tuple(map(_past_round, document["last"][:MAX_ROUNDS])),
        )
    except (RequestError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpstreamError(f"not an answer about federated rounds: {error}") from error


def _open_round(found: Mapping[str, Any]) -> OpenRound:
    late, deadline = found["late"], datetime.fromisoformat(found["deadline"])
    if not isinstance(late, int | float) or not 0 <= late <= 1 or deadline.tzinfo is None:
        raise ValueError("a factor from 0 to 1, and a time with its zone")
    return OpenRound(
        _natural(found["number"]),
        parse_digest(found["base"]),
        str(found["state"]),
        _words(found["tensors"]),
        deadline,
        _words(found["codecs"]),
        _natural(found["min_sites"]),
        _natural(found["sites"]),
        _natural(found["counted"]),
        _natural(found["max_bytes"]),
        float(late),
        str(found["rule"]),
    )


def _past_round(found: Mapping[str, Any]) -> PastRound:
    revision = found.get("revision")
    return PastRound(
        _natural(found["number"]),
        parse_digest(found["base"]),
        str(found["state"]),
        _natural(found["counted"]),
        parse_digest(revision) if revision else None,
        str(found.get("ended", "")),
    )


def encode_offer(offer: Offer) -> bytes:
    """As JSON."""
    if offer.duplicate:
        return codec.encode_json({"state": "duplicate"})
    return codec.encode_json({"upload": offer.upload, "token": offer.token, "offset": offer.offset})


def parse_offer(data: bytes) -> Offer:
    """What ``encode_offer`` gave. Raises UpstreamError."""
    try:
        document = codec.decode_json(data)
        if document.get("state") == "duplicate":
            return Offer(duplicate=True)
        upload, token = document["upload"], document["token"]
        parse_federated_path(upload)
        parse_authorization(authorization(token))
        return Offer(upload=upload, token=token, offset=_natural(document["offset"]))
    except (RequestError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpstreamError("not an answer to a statement") from error


def encode_counted(counted: Counted) -> bytes:
    """As JSON."""
    state = "duplicate" if counted.duplicate else "counted"
    return codec.encode_json({"state": state, "clipped": counted.clipped})


def parse_counted(data: bytes) -> Counted:
    """What ``encode_counted`` gave. Raises UpstreamError."""
    try:
        document = codec.decode_json(data)
        if document["state"] not in ("counted", "duplicate"):
            raise ValueError("neither")
        return Counted(document.get("clipped") is True, document["state"] == "duplicate")
    except (DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UpstreamError("not an answer to an update") from error


def _natural(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError("a number that is negative, too large or not whole")
    return value


def _words(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise TypeError("a list of texts")
    return tuple(value)


# What takes part


def taken(tensors: Sequence[Tensor], globs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The tensors of a revision that take part in a round: floats with elements, by their names' globs (all floats
    where there are none). Name to shape, in the manifest's order."""
    return {
        tensor.name: tensor.shape
        for tensor in tensors
        if tensor.dtype in FLOATS and 0 not in tensor.shape and _matches(tensor.name, globs or ("*",))
    }


def accepts(codecs: Sequence[str], name: str) -> bool:
    """Whether a codec of that name is among the accepted globs."""
    return _matches(name, codecs)


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
