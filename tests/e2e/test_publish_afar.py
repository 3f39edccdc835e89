"""``nearshard publish --origin``: what is uploaded, who may, and what two publishers do to each other."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tuf.api.exceptions import DownloadHTTPError

from origin.keyring import load_ring
from origin.publish import publish as publish_to
from origin.remote import RemoteSink
from origin.seen import Seen
from origin.storage import Storage
from shared.digest import digest_of, hex_of
from shared.errors import EXIT_AUTH, EXIT_CONFIG, EXIT_NETWORK, EXIT_USAGE, RequestError
from shared.keys import NodeKey, save_key
from shared.layout import Slice
from shared.manifest import Delta, Manifest
from shared.plan import JSON
from shared.publishing import Opening, make_opening
from shared.web.session import make_session
from tests.e2e.test_trust_files import updater
from tests.harness import Lab, Service, command, get_json, make_model, wait_until

MODEL = "acme/tiny"
SMALL = ("--shard-target", "64KiB", "--shard-limit", "64KiB")


@pytest.fixture
def publisher(lab: Lab) -> Path:
    """A publisher's own folder: its key, and the root that it trusts. It never sees the store."""
    folder = lab.folder / "publisher"
    key = NodeKey.generate()
    save_key(folder / "key.pem", key)
    (folder / "root.json").write_bytes(lab.trust_root.read_bytes())
    own = load_ring([lab.keys]).anybody
    assert own is not None
    for public in (own.public, key.public):
        lab.trust("add-publisher", "acme", "--public", public.hex())
    return folder


@pytest.fixture
def origin(lab: Lab) -> Service:
    """An origin with the online key alone."""
    return lab.service("origin", "--store", str(lab.store), name="origin")


def publish(origin: Service, folder: Path, directory: Path, *words: str, check: bool = True) -> Any:
    """Publish from afar; the result, or the finished command."""
    where = ["--origin", origin.url, "--keys", str(folder)]
    done = command("publish", str(directory), MODEL, *where, *SMALL, "--json", *words, check=check)
    return json.loads(done.stdout) if check else done


def served(origin: Service, ref: str = "main") -> str:
    """The SHA-256 of the model's file as it is served."""
    with urllib.request.urlopen(f"{origin.url}/models/{MODEL}/files/{ref}/model.safetensors", timeout=30) as answer:
        return hashlib.sha256(answer.read()).hexdigest()


def ask(url: str, method: str, body: bytes | None = None, **fields: str) -> tuple[int, str, dict[str, Any]]:
    """Status, error code and JSON of a request."""
    request = urllib.request.Request(url, body, {name.replace("_", "-"): value for name, value in fields.items()})
    request.method = method
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            data = answer.read()
            return answer.status, "", json.loads(data) if data else {}
    except urllib.error.HTTPError as error:
        document = json.loads(error.read())
        return error.code, document["code"], document


def session(origin: Service, key: NodeKey, model: str = MODEL) -> dict[str, str]:
    """The field of a session."""
    base = f"{origin.url}/publish/{model}"
    nonce = ask(f"{base}/nonce", "GET")[2]["nonce"]
    body, signature = make_opening(Opening(model, nonce, key.public, False), key)
    status, _, document = ask(f"{base}/session", "POST", body, Nearshard_Signature=signature)
    assert status == 200
    return {"Authorization": f"Nearshard-Session {document['session']}"}


def test_what_the_origin_lacks_is_uploaded_and_seen_at_once(lab: Lab, origin: Service, publisher: Path) -> None:
    make_model(lab.folder / "model", width=128)
    first = publish(origin, publisher, lab.folder / "model")
    assert first["changed"] and first["stored"] == first["shards"]
    weights = (lab.folder / "model" / "model.safetensors").read_bytes()
    assert served(origin) == hashlib.sha256(weights).hexdigest()
    target = updater(lab, origin).get_targetinfo(f"{MODEL}/main")
    assert target is not None and "sha256:" + target.hashes["sha256"] == first["revision"]
    again = publish(origin, publisher, lab.folder / "model")
    assert (again["changed"], again["stored"]) == (False, 0)
    other = publish(origin, publisher, lab.folder / "model", "--ref", "v2")
    assert (other["changed"], other["stored"], other["revision"]) == (True, 0, first["revision"])
    assert lab.publish(lab.folder / "model", MODEL, *SMALL) == first["revision"], "as a publish at the store gives"
    lines = [json.loads(line) for line in (lab.folder / "audit.jsonl").read_text().splitlines()]
    (who,) = load_ring([publisher])
    assert [(line["event"], line["who"], line["ref"]) for line in lines if line["event"] == "published"] == [
        ("published", who, "main"),
        ("published", who, "v2"),
    ]


def test_nothing_is_signed_on_top_of_less_than_was_seen(lab: Lab, origin: Service, publisher: Path) -> None:
    """An origin that goes back would else have the publisher sign that what came after is gone."""
    make_model(lab.folder / "model", width=128)
    publish(origin, publisher, lab.folder / "model")
    shutil.copytree(lab.store / "trust", lab.folder / "older")
    publish(origin, publisher, lab.folder / "model", "--ref", "v2")
    shutil.rmtree(lab.store / "trust")
    shutil.copytree(lab.folder / "older", lab.store / "trust")
    refused = publish(origin, publisher, lab.folder / "model", "--ref", "v3", check=False)
    assert refused.returncode == 4 and "was 3" in refused.stderr, refused.stderr


def test_who_is_no_publisher_stores_not_a_byte(lab: Lab, origin: Service, publisher: Path) -> None:
    make_model(lab.folder / "model", width=128)
    stranger = lab.folder / "stranger"
    save_key(stranger / "key.pem", NodeKey.generate())
    (stranger / "root.json").write_bytes(lab.trust_root.read_bytes())
    done = publish(origin, stranger, lab.folder / "model", check=False)
    assert done.returncode == EXIT_AUTH and "may not publish" in done.stderr
    base = f"{origin.url}/publish/{MODEL}"
    for method, path, body in (
        ("POST", "missing", b'{"shards":{}}'),
        ("PUT", f"blobs/{digest_of(b'x')}", b"x"),
        ("PUT", f"manifests/{digest_of(b'x')}", b"x"),
        ("GET", "trust/timestamp.json", None),
        ("PUT", "trust/2.acme~public.json", b"x"),
    ):
        assert ask(f"{base}/{path}", method, body)[:2] == (401, "no_session"), path
    assert {path.name for path in lab.store.iterdir()} <= {"trust", "tmp", ".lock"}
    events = [json.loads(line) for line in (lab.folder / "audit.jsonl").read_text().splitlines()]
    assert {(line["event"], line.get("code")) for line in events} >= {("refused", "not_publisher")}


def test_bytes_are_kept_only_under_the_digest_that_they_have(lab: Lab, origin: Service, publisher: Path) -> None:
    (key,) = load_ring([publisher]).values()
    base, fields = f"{origin.url}/publish/{MODEL}", session(origin, key)
    right, wrong = digest_of(b"right"), digest_of(b"wrong")
    assert ask(f"{base}/blobs/{wrong}", "PUT", b"right", **fields)[:2] == (422, "digest_mismatch")
    assert ask(f"{base}/blobs/{right}", "PUT", b"right", **fields)[0] == 201
    body = json.dumps({"shards": {right: 5, wrong: 5}}).encode()
    assert ask(f"{base}/missing", "POST", body, **fields)[2] == {"missing": [wrong]}
    assert ask(f"{base}/manifests/{right}", "PUT", b"right", **fields)[:2] == (422, "bad_manifest")
    other = f"{origin.url}/publish/acme/other/blobs/{right}"
    assert ask(other, "PUT", b"right", **fields)[:2] == (401, "no_session"), "a session is for one model"
    assert ask(f"{base}/blobs/{right}", "PUT", b"right", Content_Encoding="gzip", **fields)[0] == 415


async def test_shards_that_gc_swept_before_they_were_claimed_are_uploaded_again(
    lab: Lab, origin: Service, publisher: Path
) -> None:
    """The origin says ``incomplete`` to the manifest, and keeps none that names what is missing."""
    make_model(lab.folder / "model", width=128)
    storage = Storage(str(lab.store))
    answers: list[bool] = []

    class Swept(RemoteSink):
        async def put_manifest(self, manifest: Manifest) -> bool:
            if not answers:
                shards = {hex_of(digest) for digest in manifest.shards}
                paths = [entry.path async for entry in storage.blobs() if entry.path[-64:] in shards]
                await storage.objects.delete(paths[:1])
                with pytest.raises(RequestError) as refused:
                    await self._request("PUT", f"manifests/{manifest.revision}", manifest.encoded)
                assert refused.value.error_code == "incomplete"
                assert not await storage.has_manifest(MODEL, manifest.revision)
            answers.append(await super().put_manifest(manifest))
            return answers[-1]

    ring, root = load_ring([publisher]), lab.trust_root.read_bytes()
    async with make_session() as http:
        sink = Swept(http, origin.url, root, ring, lambda: datetime.now(UTC), asyncio.sleep, Seen(lab.folder / "seen"))
        done = await publish_to(sink, lab.folder / "model", MODEL, "main")
    assert answers == [False, True] and done.changed and done.stored == 1
    assert not await storage.lacks((await storage.manifest(MODEL, done.revision)).stored)
    assert await asyncio.to_thread(served, origin)


@pytest.mark.parametrize("private", [False, True])
def test_a_new_version_from_afar_is_a_delta_and_what_it_costs_is_shown(
    lab: Lab, origin: Service, publisher: Path, private: bool
) -> None:
    """Upon what the publisher reads of the parent, which for a private model takes a token that lets it."""
    folder, token = lab.folder / "model", lab.token_file(f"{MODEL}:read", name="reader")
    words = ("--no-compress", "--private", "--token-file", str(token)) if private else ("--no-compress",)
    tensors = {name: np.round(values) for name, values in make_model(folder, width=128).items()}
    revisions = []
    for step in range(2):
        changed = {name: values + step * ("embed" not in name) for name, values in tensors.items()}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        done = publish(origin, publisher, folder, *words)
        revisions.append(done["revision"])
    first, second = revisions
    assert done["parent"] == first and 0 < done["moved_bytes"] < done["new_bytes"] < done["shard_bytes"]

    asked = ("delta", "show", MODEL, first, "main", "--router", origin.url, "--token-file", str(token))
    shown = json.loads(command(*asked, "--json").stdout)
    assert (shown["from"], shown["to"], shown["moved"]) == (first, second, done["moved_bytes"])
    how = {row["name"]: row["how"] for row in shown["rows"]}
    assert (how["embeddings.weight"], how["encoder.layer.0.weight"]) == ("unchanged", "delta")
    assert sum(row["size"] for row in shown["rows"]) == shown["size"]
    assert "one delta" in command(*asked).stdout and "MB unchanged" in command(*asked).stdout

    accept = {"Accept": JSON, "Authorization": f"Bearer {token.read_text()}"}
    url = f"{origin.url}/shards/{MODEL}"
    parcels = [step for shard in get_json(f"{url}?have={first}", **accept)["shards"] for step in shard["deltas"]]
    assert parcels and all(step["base"] for step in parcels)
    for step in parcels:
        assert hashlib.sha256(bytes_at(step["urls"][0], **accept)).hexdigest() == step["digest"][7:]
    for unknown in ("", f"?have={digest_of(b'x')}"):
        assert not any(shard["deltas"] for shard in get_json(url + unknown, **accept)["shards"])
    assert ask(f"{url}?have=main", "GET", None, **accept)[:2] == (400, "bad_id")


def bytes_at(url: str, **fields: str) -> bytes:
    """A body, whole."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=fields), timeout=10) as answer:
        return bytes(answer.read())


def test_a_manifest_whose_parcel_is_missing_is_not_kept(lab: Lab, origin: Service, publisher: Path) -> None:
    (key,) = load_ring([publisher]).values()
    base, fields = f"{origin.url}/publish/{MODEL}", session(origin, key)
    shard, parcel = b"a shard", b"less"
    delta = Delta(digest_of(shard), digest_of(parcel), (Slice(digest_of(b"gone"), 0, 4),))
    others = {digest_of(parcel): 4, digest_of(b"gone"): 4}
    made = Manifest(MODEL, {digest_of(shard): 7}, {}, {}, deltas=(delta,), others=others)
    for data, status in ((shard, 422), (parcel, 201)):
        assert ask(f"{base}/blobs/{digest_of(data)}", "PUT", data, **fields)[0] == 201
        assert ask(f"{base}/manifests/{made.revision}", "PUT", made.encoded, **fields)[0] == status


def test_a_session_is_begun_by_a_fresh_signature_of_its_own_words(origin: Service, publisher: Path) -> None:
    (key,) = load_ring([publisher]).values()
    base = f"{origin.url}/publish/{MODEL}"
    stale, signature = make_opening(Opening(MODEL, "00" * 16, key.public, False), key)
    assert ask(f"{base}/session", "POST", stale, Nearshard_Signature=signature)[:2] == (401, "stale_nonce")
    assert ask(f"{base}/session", "POST", stale + b" ", Nearshard_Signature=signature)[1] == "bad_signature"
    small = stale.replace(key.public.hex().encode(), b"01" + b"00" * 31)
    assert ask(f"{base}/session", "POST", small, Nearshard_Signature="00" * 64)[:2] == (422, "bad_key")


def opened(origin: Service, key: NodeKey, token: str, signature: str = "") -> tuple[int, str]:
    """Status and code of beginning a session with a token beside the signature."""
    base = f"{origin.url}/publish/{MODEL}"
    nonce = ask(f"{base}/nonce", "GET")[2]["nonce"]
    body, signed = make_opening(Opening(MODEL, nonce, key.public, False), key)
    fields = {"Authorization": f"Bearer {token}"} if token else {}
    return ask(f"{base}/session", "POST", body, Nearshard_Signature=signature or signed, **fields)[:2]


def test_where_tokens_are_asked_for_a_session_needs_one_and_the_signature(lab: Lab, publisher: Path) -> None:
    origin = lab.service("origin", "--store", str(lab.store), "--publish-tokens", name="asking")
    (key,) = load_ring([publisher]).values()
    revoked = lab.token("*/*:publish", name="revoked-one")
    command("token", "revoke", revoked, "--store", str(lab.store))
    for token, refusal in (
        ("", (401, "token_missing")),
        (lab.token("*/*:read", "*/*:admin", "*/*:enroll"), (403, "forbidden")),
        (lab.token("acme/other:publish", "other/*:publish", name="of-another", subject="ci"), (403, "forbidden")),
        (lab.token("*/*:publish", ttl=60, ago=500), (401, "token_expired")),
        (lab.token("*/*:publish", key=NodeKey.generate()), (401, "token_invalid")),
        (revoked, (401, "token_revoked")),
    ):
        assert opened(origin, key, token) == refusal
    good = lab.token(f"{MODEL}:publish")
    assert opened(origin, key, good, "00" * 64) == (401, "bad_signature"), "a token alone is nothing"
    assert opened(origin, NodeKey.generate(), good) == (403, "not_publisher")
    assert opened(origin, key, good) == (200, "")
    events = [json.loads(line) for line in (lab.folder / "audit.jsonl").read_text().splitlines()]
    refused = [(line["who"], line["code"]) for line in events if line["event"] == "refused"]
    assert ("of-another", "forbidden") in refused and ("", "token_missing") in refused
    assert good not in origin.text() and good not in (lab.folder / "audit.jsonl").read_text()


def test_a_revoked_token_ends_the_session_that_it_began(lab: Lab, publisher: Path) -> None:
    origin = lab.service("origin", "--store", str(lab.store), "--publish-tokens", name="asking")
    (key,) = load_ring([publisher]).values()
    base, token = f"{origin.url}/publish/{MODEL}", lab.token(f"{MODEL}:publish")
    nonce = ask(f"{base}/nonce", "GET")[2]["nonce"]
    body, signature = make_opening(Opening(MODEL, nonce, key.public, False), key)
    bearer = {"Authorization": f"Bearer {token}"}
    name = ask(f"{base}/session", "POST", body, Nearshard_Signature=signature, **bearer)[2]["session"]
    fields, shards = {"Authorization": f"Nearshard-Session {name}"}, json.dumps({"shards": {digest_of(b"x"): 1}})
    assert ask(f"{base}/missing", "POST", shards.encode(), **fields)[0] == 200
    assert ask(f"{base}/missing", "POST", shards.encode(), **bearer)[:2] == (401, "no_session")
    command("token", "revoke", token, "--store", str(lab.store))
    assert ask(f"{base}/missing", "POST", shards.encode(), **fields)[:2] == (401, "token_revoked")


def test_a_publisher_shows_its_token(lab: Lab, publisher: Path) -> None:
    origin = lab.service("origin", "--store", str(lab.store), "--publish-tokens", name="asking")
    make_model(lab.folder / "model", width=128)
    done = publish(origin, publisher, lab.folder / "model", check=False)
    assert done.returncode == EXIT_AUTH and "token is needed" in done.stderr
    other = lab.token_file("other/*:publish", name="other")
    done = publish(origin, publisher, lab.folder / "model", "--token-file", str(other), check=False)
    assert done.returncode == EXIT_AUTH and "not for this" in done.stderr
    mine = lab.token_file(f"{MODEL}:publish", name="mine", subject="ci")
    assert publish(origin, publisher, lab.folder / "model", "--token-file", str(mine))["changed"]
    events = [json.loads(line) for line in (lab.folder / "audit.jsonl").read_text().splitlines()]
    (line,) = [line for line in events if line["event"] == "published"]
    assert line["subject"] == "ci" and line["who"] in load_ring([publisher])


def test_a_publish_goes_on_after_the_origin_came_back(lab: Lab, origin: Service, publisher: Path) -> None:
    make_model(lab.folder / "model", width=128)
    origin.stop()
    done = publish(origin, publisher, lab.folder / "model", check=False)
    assert done.returncode == EXIT_NETWORK
    origin.start()
    assert publish(origin, publisher, lab.folder / "model")["changed"]


def test_without_a_root_nothing_is_signed(lab: Lab, origin: Service, publisher: Path) -> None:
    make_model(lab.folder / "model", width=128)
    (publisher / "root.json").unlink()
    done = publish(origin, publisher, lab.folder / "model", check=False)
    assert done.returncode == EXIT_CONFIG and "--trust-root" in done.stderr


def test_routers_and_edges_hear_of_it_at_once(lab: Lab, publisher: Path) -> None:
    make_model(lab.folder / "model", width=128)
    lab.publish(lab.folder / "model", MODEL, *SMALL)
    store = lab.service("origin", "--store", str(lab.store), name="plain")
    router = lab.router(store, ref_lifetime="3600")
    origin = lab.service("origin", "--store", str(lab.store), "--router", router.url, name="telling")
    before = get_json(f"{router.url}/models/{MODEL}")["refs"]["main"]["revision"]
    make_model(lab.folder / "model", width=128, seed=9)
    after = publish(origin, publisher, lab.folder / "model")["revision"]
    assert after != before
    wait_until(
        lambda: get_json(f"{router.url}/models/{MODEL}")["refs"]["main"]["revision"] == after, "the router knows"
    )


KILL_POINTS = [
    ("origin.remote.RemoteSink.ensure_blob", 2),
    ("origin.remote.RemoteSink.put_manifest", 1),
    ("origin.remote.RemoteSink.put_role", 1),
    pytest.param("origin.remote.RemoteSink.begin", 1, marks=pytest.mark.long),
    pytest.param("origin.remote.RemoteSink.move_ref", 1, marks=pytest.mark.long),
    pytest.param("origin.remote.RemoteSink.next_version", 1, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("point", "call"), KILL_POINTS)
def test_a_killed_publisher_shows_nothing_and_a_repeat_completes_it(
    lab: Lab, origin: Service, publisher: Path, point: str, call: int
) -> None:
    """F2: SIGKILL as a step begins."""
    make_model(lab.folder / "model", width=128)
    words = ["publish", str(lab.folder / "model"), MODEL, "--origin", origin.url, "--keys", str(publisher), *SMALL]
    assert run_killed(point, call, words) == -signal.SIGKILL
    assert ask(f"{origin.url}/models/{MODEL}", "GET")[:2] == (404, "unknown_model")
    done = publish(origin, publisher, lab.folder / "model")
    assert done["changed"] and served(origin)
    if point.endswith(("put_manifest", "move_ref")):
        assert done["stored"] == 0, "what was there is not sent again"


ORIGIN_POINTS = [
    ("origin.storage.Storage.ensure_blob", 3),
    ("origin.storage.Storage.create", 1),
    ("origin.storage.Storage.replace", 1),
    pytest.param("origin.storage.Storage.put_manifest", 1, marks=pytest.mark.long),
    pytest.param("origin.storage.Storage.create", 2, marks=pytest.mark.long),
    pytest.param("os.replace", 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("point", "call"), ORIGIN_POINTS)
def test_a_killed_origin_shows_all_or_nothing_and_a_repeat_completes_it(
    lab: Lab, publisher: Path, point: str, call: int
) -> None:
    """F2, on the other side. What was signed before is put in force by the origin as it starts again."""
    make_model(lab.folder / "model", width=128)
    lab.publish(lab.folder / "model", MODEL, *SMALL)
    make_model(lab.folder / "model", width=128, seed=9)
    weights = hashlib.sha256((lab.folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    ready = lab.folder / "dying.json"
    words = ["--store", str(lab.store), "--port", "0", "--ready-file", str(ready)]
    dying = subprocess.Popen([sys.executable, "-c", killed_at(point, call, "origin", words)])
    try:
        wait_until(ready.exists, "the origin ready")
        url = json.loads(ready.read_text())["url"]
        where = ["--origin", url, "--keys", str(publisher), *SMALL]
        done = command("publish", str(lab.folder / "model"), MODEL, *where, check=False)
        assert dying.wait(30) == -signal.SIGKILL and done.returncode == EXIT_NETWORK
    finally:
        dying.kill()
        dying.wait(10)
    origin = lab.service("origin", "--store", str(lab.store), name="origin")
    served(origin)
    publish(origin, publisher, lab.folder / "model")
    assert served(origin) == weights
    assert updater(lab, origin).get_targetinfo(f"{MODEL}/main") is not None


def killed_at(point: str, call: int, program: str, words: list[str]) -> str:
    """A script that runs a program, and kills itself as a function is called for the ``call``-th time."""
    owner, _, name = point.rpartition(".")
    module, _, kind = owner.rpartition(".") if owner.count(".") == 2 else (owner, "", "")
    run = {
        "publish": "from origin.publish_command import main; main()",
        "origin": "import runpy; runpy.run_module('origin', run_name='__main__')",
    }[program]
    return (
        "import importlib, os, signal, sys\n"
        f"owner = importlib.import_module({module!r})\n"
        f"owner = getattr(owner, {kind!r}) if {kind!r} else owner\n"
        f"real, calls = getattr(owner, {name!r}), []\n"
        "def die(*words, **options):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {call}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*words, **options)\n"
        f"setattr(owner, {name!r}, die)\n"
        f"sys.argv = {[program, *words]!r}\n"
        f"{run}\n"
    )


def run_killed(point: str, call: int, words: list[str]) -> int:
    """The exit code of a publish that is killed at a point."""
    return subprocess.run(
        [sys.executable, "-c", killed_at(point, call, words[0], words[1:])], timeout=60, check=False
    ).returncode


def test_two_publishers_of_one_ref_and_of_two(lab: Lab, origin: Service, publisher: Path) -> None:
    """As commands, at once. Of one ref, nothing is lost whoever is first; of two, both are there."""
    running = []
    for n, ref in enumerate(("main", "main", "v2", "v3")):
        make_model(lab.folder / f"model-{n}", width=128, seed=n)
        where = ["--origin", origin.url, "--keys", str(publisher), "--ref", ref, "--json", *SMALL]
        words = [sys.executable, "-m", "nearshard", "publish", str(lab.folder / f"model-{n}"), MODEL, *where]
        running.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    done = [(process.communicate(timeout=90), process.returncode) for process in running]
    assert done[2][1] == done[3][1] == 0, done
    codes = sorted(code for _, code in done[:2])
    assert codes in ([0, 0], [0, EXIT_USAGE])  # one after the other, or one in the way of the other
    for (_, said), code in done[:2]:
        assert code == 0 or "moved" in said
    refs = get_json(f"{origin.url}/models/{MODEL}")["refs"]
    won = {json.loads(out)["revision"] for (out, _), code in done[:2] if code == 0}
    assert set(refs) == {"main", "v2", "v3"} and refs["main"]["revision"] in won


def test_the_keys_are_shown_rotated_and_revoked_by_commands(lab: Lab, origin: Service, publisher: Path) -> None:
    make_model(lab.folder / "model", width=128)
    publish(origin, publisher, lab.folder / "model")
    shown = json.loads(command("trust", "show", "--store", str(lab.store), "--json").stdout)
    assert shown["fingerprint"] == hashlib.sha256(lab.trust_root.read_bytes()).hexdigest()
    assert shown["roles"]["root"]["threshold"] == 2 and len(shown["roles"]["acme~public"]["keys"]) == 2
    assert "acme~public" in command("trust", "show", "--store", str(lab.store)).stdout
    for role in ("online", "root"):
        lab.trust("rotate", role)
    publish(origin, publisher, lab.folder / "model", "--ref", "v2")  # the origin has read the new online key
    (key,) = load_ring([publisher])
    assert "acme" in lab.trust("revoke", key[:16], "--dry-run")
    lab.trust("revoke", key[:16])
    done = publish(origin, publisher, lab.folder / "model", "--ref", "v3", check=False)
    assert done.returncode == EXIT_AUTH
    client = updater(lab, origin)
    assert client.get_targetinfo(f"{MODEL}/v2") is not None
    with pytest.raises(DownloadHTTPError):  # it is not public, and what is private is told to who has a token
        client.get_targetinfo(f"{MODEL}/v3")
    events = [json.loads(line)["event"] for line in (lab.folder / "audit.jsonl").read_text().splitlines()]
    assert [event for event in events if event != "refused"] == [
        "publisher added", "publisher added", "published", "rotated", "rotated", "published", "revoked",
    ]  # fmt: skip
    assert "refused" in events
