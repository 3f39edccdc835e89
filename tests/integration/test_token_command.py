"""``nearshard token``: as commands, over a store with signed metadata."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from origin.signing import CUSTOM
from origin.storage import Storage
from origin.trust_store import TrustStore
from shared.tokens import AccessList, Right, TokenError, read_claims
from shared.trust_names import ACCESS
from tests.harness import command, make_trust


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """With keys beside it."""
    made = tmp_path / "store"
    make_trust(made)
    return made


def token(store: Path, *words: str, check: bool = True) -> str:
    """What ``nearshard token`` prints."""
    done = command("token", *words, "--store", str(store), check=check)
    return done.stdout.strip() if check else f"{done.returncode} {done.stderr}"


def access(store: Path) -> AccessList:
    state = asyncio.run(TrustStore(Storage(str(store))).state())
    return AccessList.parse(state.roles[ACCESS].unrecognized_fields[CUSTOM])


def state(store: Path, text: str) -> str:
    """What whoever checks says of a token."""
    try:
        access(store).verify(text, time.time())
    except TokenError as error:
        return error.error_code
    return "good"


def test_a_token_is_good_for_what_it_was_made_for(store: Path) -> None:
    text = token(store, "create", "--scope", "acme/*:read", "--scope", "acme/x:publish", "--ttl", "90s")
    made = access(store).verify(text, time.time())
    assert made.may(Right.READ, "acme/y") and made.may(Right.PUBLISH, "acme/x")
    assert not made.may(Right.PUBLISH, "acme/y") and not made.may(Right.READ, "other/y")
    assert made.expires - made.issued == 90
    default = read_claims(token(store, "create", "--scope", "acme/*:read"))
    assert default.expires - default.issued == 900


def test_it_is_printed_as_asked(store: Path, tmp_path: Path) -> None:
    document = json.loads(
        token(store, "create", "--scope", "a/b:read", "--json", "--subject", "ci", "--url", "http://r/x")
    )
    assert document["scopes"] == ["a/b:read"] and document["subject"] == "ci"
    assert document["urls"] == [f"http://r/x?token={document['token']}"]
    url = token(store, "create", "--scope", "a/b:read", "--url", "https://r:1/shards/a/b?region=north")
    assert url.startswith("https://r:1/shards/a/b?region=north&token=")
    assert state(store, parse_qs(urlsplit(url).query)["token"][0]) == "good"
    file = tmp_path / "t"
    assert token(store, "create", "--scope", "a/b:read", "-o", str(file)) == ""
    assert file.stat().st_mode & 0o777 == 0o600 and state(store, file.read_text().strip()) == "good"
    shown = token(store, "show", "--token-file", str(file))
    assert "scopes: a/b:read" in shown and "state: good" in shown and file.read_text().strip() not in shown


def test_after_a_rotation_old_and_new_tokens_are_good_and_the_old_key_is_gone(store: Path) -> None:
    old = token(store, "create", "--scope", "a/b:read", "--ttl", "1h")
    before = (store.parent / "keys/tokens/token.pem").read_bytes()
    token(store, "rotate")
    new = token(store, "create", "--scope", "a/b:read")
    assert [state(store, text) for text in (old, new)] == ["good", "good"]
    assert read_claims(old).key != read_claims(new).key and len(access(store).keys) == 2
    assert before not in [file.read_bytes() for file in (store.parent / "keys").rglob("*") if file.is_file()]
    key = store.parent / "keys/tokens/token.pem"
    assert key.stat().st_mode & 0o777 == 0o600
    until = access(store).keys[read_claims(old).key].until
    assert until is not None and abs(until - read_claims(old).expires) < 2
    with pytest.raises(TokenError) as caught:
        access(store).verify(old, until + 61)
    assert caught.value.error_code == "token_invalid"


def test_a_rotation_that_was_cut_off_is_completed_by_the_next(store: Path) -> None:
    old = token(store, "create", "--scope", "a/b:read", "--ttl", "1h")
    folder = store.parent / "keys/tokens"
    signing = (folder / "token.pem").read_bytes()
    token(store, "rotate")
    (folder / "token.pem").rename(folder / "next.pem")  # killed before it took over
    (folder / "token.pem").write_bytes(signing)
    (folder / "token.pem").chmod(0o600)
    token(store, "rotate")
    assert len(access(store).keys) == 2 and not (folder / "next.pem").exists()
    assert state(store, old) == "good"
    assert state(store, token(store, "create", "--scope", "a/b:read")) == "good"


def test_a_token_is_revoked_by_itself_or_its_id_and_it_is_written_down(store: Path) -> None:
    first, second, third = (token(store, "create", "--scope", "a/b:read") for _ in range(3))
    token(store, "revoke", first)
    token(store, "revoke", read_claims(second).id)
    assert [state(store, text) for text in (first, second, third)] == ["token_revoked", "token_revoked", "good"]
    listed = json.loads(token(store, "show", "--json"))
    assert {item["id"] for item in listed["revoked"]} == {read_claims(text).id for text in (first, second)}
    audit = [json.loads(line) for file in store.parent.rglob("audit*") for line in file.read_text().splitlines()]
    assert [line["token"] for line in audit if line["event"] == "token revoked"] == [
        read_claims(text).id for text in (first, second)
    ]
    assert first not in json.dumps(audit)


async def test_changes_at_the_same_time_are_all_kept(store: Path) -> None:
    words = [sys.executable, "-m", "nearshard", "token", "revoke", "--store", str(store)]
    done = [await asyncio.create_subprocess_exec(*words, f"id-{n}") for n in range(4)]
    assert [await process.wait() for process in done] == [0] * 4
    assert set((await asyncio.to_thread(access, store)).revoked) == {f"id-{n}" for n in range(4)}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["create", "--scope", "acme"], 2),
        (["create", "--scope", "a/b:write"], 2),
        (["create", "--scope", "a/b:read", "--ttl", "15"], 2),
        (["create", "--scope", "a/b:read", "--ttl", "0s"], 2),
        (["create", "--scope", "a/b:read", "--ttl", "400d"], 2),
        (["create", "--scope", "a/b:read", "--url", "ftp://x"], 2),
        (["create"], 2),
        (["revoke", "not a token"], 2),
        (["show", "--token-file", "/nonexistent"], 3),
    ],
)
def test_bad_input_is_refused_in_one_line(store: Path, words: list[str], code: int) -> None:
    said = token(store, *words, check=False)
    assert said.startswith(f"{code} ") and "Traceback" not in said


def test_a_signing_key_that_others_may_read_is_refused(store: Path) -> None:
    """C2."""
    (store.parent / "keys/tokens/token.pem").chmod(0o644)
    assert token(store, "create", "--scope", "a/b:read", check=False).startswith("3 ")


def test_without_a_key_it_says_what_to_do(store: Path) -> None:
    (store.parent / "keys/tokens/token.pem").unlink()
    said = token(store, "create", "--scope", "a/b:read", check=False)
    assert said.startswith("3 ") and "nearshard token rotate" in said
    token(store, "rotate")
    assert state(store, token(store, "create", "--scope", "a/b:read")) == "good"
