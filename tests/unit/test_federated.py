"""The protocol of federated rounds: what is said comes back as it was said, and nothing else passes."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from shared import codec
from shared.digest import digest_of
from shared.errors import BadId, NearshardError, NotFound, RequestError, UpstreamError
from shared.federated import (
    Counted,
    FederatedPath,
    Offer,
    OpenRound,
    PastRound,
    Rounds,
    Statement,
    authorization,
    check_signed,
    check_url,
    encode_counted,
    encode_offer,
    encode_rounds,
    parse_authorization,
    parse_counted,
    parse_federated_path,
    parse_offer,
    parse_rounds,
    parse_statement,
    sign_statement,
    taken,
    upload_path,
)
from shared.keys import NodeKey
from shared.manifest import Tensor

MODEL = "acme/tiny"
BASE, BODY = digest_of(b"base"), digest_of(b"body")
STATEMENT = Statement(
    "berlin", MODEL, 3, BASE, bytes(16), datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), 512, BODY, 99, ("int4", "sign")
)
OPEN = OpenRound(3, BASE, "open", ("*.lora_*",), STATEMENT.time, ("int*",), 5, 10, 2, 1 << 20, 0.5, "trimmed")


def code_of(body: bytes, model: str = MODEL) -> str:
    with pytest.raises(NearshardError) as caught:
        parse_statement(model, body)
    return caught.value.error_code


def test_a_statement_comes_back_as_it_was_signed() -> None:
    key = NodeKey.generate()
    body, signature = sign_statement(STATEMENT, key)
    assert parse_statement(MODEL, body) == STATEMENT
    check_signed(body, signature, key.public)


def test_a_signature_is_of_these_bytes_and_this_key() -> None:
    key = NodeKey.generate()
    body, signature = sign_statement(STATEMENT, key)
    other, _ = sign_statement(replace(STATEMENT, examples=513), key)
    for wrong in ((other, signature, key.public), (body, signature, NodeKey.generate().public), (body, "", key.public)):
        with pytest.raises(RequestError) as caught:
            check_signed(*wrong)
        assert caught.value.error_code == "bad_signature"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("examples", 0),
        ("examples", -1),
        ("examples", 10**12),
        ("examples", True),
        ("examples", 1.0),
        ("size", 0),
        ("round", 0),
        ("nonce", b"short"),
        ("nonce", "0" * 16),
        ("site", "../x"),
        ("base", "sha256:ff"),
        ("digest", 7),
        ("time", "yesterday"),
        ("time", "2026-01-02T03:04:05"),
        ("codecs", []),
        ("codecs", ["x\n"]),
        ("codecs", "int4"),
    ],
)
def test_what_no_site_can_mean_is_refused(name: str, value: object) -> None:
    body, _ = sign_statement(STATEMENT, NodeKey.generate())
    assert code_of(codec.encode({**codec.decode(body, 1 << 14), name: value})) == "bad_update"


def test_no_field_more_and_no_other_model() -> None:
    body, _ = sign_statement(STATEMENT, NodeKey.generate())
    document = codec.decode(body, 1 << 14)
    assert code_of(codec.encode({**document, "more": 1})) == "bad_update"
    assert code_of(body, "acme/other") == "bad_update"
    assert code_of(b"\xc1") == "bad_body"
    assert code_of(bytes(1 << 15)) == "too_large"


def test_answers_come_back() -> None:
    rounds = Rounds(MODEL, OPEN, (PastRound(2, BODY, "published", 7, BASE, "2026-01-01T00:00:00+00:00"),))
    assert parse_rounds(encode_rounds(rounds)) == rounds
    assert parse_rounds(encode_rounds(Rounds(MODEL, None))) == Rounds(MODEL, None)
    offer = Offer(upload=upload_path(MODEL, BODY), token="x" * 43, offset=7)
    assert parse_offer(encode_offer(offer)) == offer
    assert parse_offer(encode_offer(Offer(duplicate=True))).duplicate
    assert parse_counted(encode_counted(Counted(clipped=True))) == Counted(clipped=True)
    assert parse_authorization(authorization("x" * 43)) == "x" * 43


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"model":"acme/tiny","open":{},"last":[]}', b'{"open":1}'])
def test_answers_that_are_none(data: bytes) -> None:
    for parse in (parse_rounds, parse_offer, parse_counted):
        with pytest.raises(UpstreamError):
            parse(data)


def test_the_round_that_an_update_is_for() -> None:
    rounds = Rounds(MODEL, OPEN, (PastRound(2, BODY, "published", 7),))
    assert rounds.number_for(BASE) == 3
    assert rounds.number_for(BODY) == 2
    assert Rounds(MODEL, replace(OPEN, late=0.0), rounds.last).number_for(BODY) is None
    assert Rounds(MODEL, None, rounds.last).number_for(BODY) is None


def test_paths() -> None:
    assert parse_federated_path("/federated/acme/tiny") == FederatedPath(MODEL)
    assert parse_federated_path("/federated/acme/tiny/updates") == FederatedPath(MODEL, updates=True)
    assert parse_federated_path(upload_path(MODEL, BODY)) == FederatedPath(MODEL, updates=True, digest=BODY)
    for wrong in ("/federated/acme/tiny/updates/xyz", "/federated/acme/%2e%2e", "/federated/ACME/tiny"):
        with pytest.raises(BadId):
            parse_federated_path(wrong)
    for wrong in ("/federated/acme", "/federated/acme/tiny/other", "/models/acme/tiny"):
        with pytest.raises(NotFound):
            parse_federated_path(wrong)


def test_updates_go_to_this_machine_or_by_tls() -> None:
    for url in ("https://origin.example", "http://127.0.0.1:8710", "http://localhost:1"):
        assert check_url(url) == url
    for url in ("http://origin.example", "http://10.0.0.1", "ftp://x"):
        with pytest.raises(RequestError):
            check_url(url)


def test_which_tensors_take_part() -> None:
    def tensor(name: str, dtype: str = "F32", shape: tuple[int, ...] = (2, 3)) -> Tensor:
        return Tensor(name, dtype, shape, "model.safetensors", ())

    tensors = [tensor("a.w"), tensor("a.ids", "I64"), tensor("b.w", "BF16", (4,)), tensor("c.w", shape=(0, 3))]
    assert taken(tensors, ()) == {"a.w": (2, 3), "b.w": (4,)}
    assert taken(tensors, ("b.*",)) == {"b.w": (4,)}
