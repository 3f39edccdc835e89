"""Attackers: an origin, or an edge in between, that has everything but the keys (or a stolen one), against the real
client and a real edge. Each try is refused with its own error; nothing wrong is delivered, and what was believed before
goes on counting (I1, I2)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from nearshard.client import Client
from shared.errors import EXIT_INTEGRITY, NearshardError
from shared.layout import Layout, Slice
from shared.manifest import Manifest, Task
from shared.paths import manifest_path
from shared.trust_names import SNAPSHOT, TIMESTAMP, public_role
from tests.faults.client import Answer, get, until
from tests.harness import Lab, Service, command
from tests.metadata import Repository, make_key, serving, sign
from tests.scripted import Act, Asked, Script, source

MODEL = "acme/tiny"
PUBLIC = public_role("acme")
TASK = f"/shards/{MODEL}:all@main"


def revision(script: Script, seed: int, model: str = MODEL) -> Manifest:
    """A model of one file of one shard, which the source then has."""
    data = random.Random(seed).randbytes(100_000)
    digest = script.add(data)
    layout = Layout(len(data), hashlib.sha256(data).hexdigest(), (Slice(digest, 0, len(data)),))
    manifest = Manifest(model, {digest: len(data)}, {"m.bin": layout}, {"all": Task("all", layout, "m.bin")})
    script.blobs[manifest_path(model, manifest.revision)] = manifest.encoded
    return manifest


@dataclass
class Attacked:
    """A deployment whose origin, or whose way to it, is in an attacker's hands."""

    lab: Lab
    script: Script
    repository: Repository
    root: Path
    versions: list[Manifest]
    first: Mapping[str, bytes]
    """The metadata as it was when the first revision was published."""

    def act(self, act: Act) -> None:
        """What the source does from now on."""
        self.script.acts[:] = [act]

    def serve(self, files: Mapping[str, bytes] | None = None) -> None:
        """Serve this metadata; the present one by default."""
        self.act(serving(self.repository.files if files is None else files))

    def edge(self) -> Service:
        """A real edge behind it."""
        return self.lab.edge(self.script.url, ref_lifetime="0", trust_root=str(self.root))

    async def fetch(self, out: Path) -> str:
        """The real client, straight from the attacker: the revision, or the code of the error."""
        return await fetch(self.script.url, self.root, out)


async def fetch(url: str, root: Path, out: Path) -> str:
    """The real client; leaves nothing where it refuses."""
    async with Client(url, trust_root=root) as client:
        try:
            return (await client.get(MODEL, out, force=True)).revision
        except NearshardError as error:
            return error.error_code


@pytest.fixture
async def attacked(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Attacked]:
    """Two revisions were published; the source is honest still. What clients believed before is forgotten."""
    monkeypatch.setenv("XDG_DATA_HOME", str(lab.folder / "data-home"))
    async with source(Script()) as script:
        repository = Repository(now=time.time() - 60)
        root = lab.folder / "root.json"
        root.write_bytes(repository.root)
        versions = [revision(script, seed) for seed in (1, 2)]
        repository.publish(MODEL, "main", versions[0].encoded)
        first = dict(repository.files)
        repository.publish(MODEL, "main", versions[1].encoded)
        made = Attacked(lab, script, repository, root, versions, first)
        made.serve()
        yield made


def _code(answer: Answer) -> str:
    """Of an edge's refusal."""
    assert answer.status == 502, answer
    return str(json.loads(answer.body)["code"])


# Against who knows nothing yet but the root


def expired_timestamp(it: Attacked) -> None:
    """Signed well, long ago."""
    it.repository.now -= 10 * 86_400
    it.repository.sign_timestamp()


def mixed(it: Attacked) -> None:
    """The role's file of the first state beside the snapshot of the second."""
    files = it.repository.files
    files[f"3.{PUBLIC}.json"] = files[f"2.{PUBLIC}.json"]


def mixed_snapshot(it: Attacked) -> None:
    """The first snapshot under the name of the second."""
    it.repository.files["3.snapshot.json"] = it.first["2.snapshot.json"]


def below_threshold(it: Attacked) -> None:
    """A new root that one key of two has signed."""
    it.repository.files["2.root.json"] = sign(it.repository.make_root(2), it.repository.root_keys[:1])


def one_key_twice(it: Attacked) -> None:
    """The same, its one signature written down twice."""
    document = json.loads(sign(it.repository.make_root(2), it.repository.root_keys[:1]))
    document["signatures"] *= 2
    it.repository.files["2.root.json"] = json.dumps(document).encode()


def replayed_root(it: Attacked) -> None:
    """The first root in place of the next one."""
    it.repository.files["2.root.json"] = it.repository.root


def forged(it: Attacked) -> None:
    """Metadata of its own, signed with keys of its own."""
    other = Repository(now=time.time(), online_key=make_key(66), publisher_key=make_key(67))
    other.publish(MODEL, "main", it.versions[0].encoded)
    it.repository.files |= {name: data for name, data in other.files.items() if "root" not in name}


def flipped(it: Attacked) -> None:
    """One bit of what was signed."""
    right = it.repository.timestamp
    it.repository.files["timestamp.json"] = right.replace(b'"version":', b'"version":1', 1)


def another_model(it: Attacked) -> None:
    """A publisher signs by mistake, or is made to sign, a manifest of another model."""
    theirs = revision(it.script, 3, "acme/other")
    it.script.blobs[manifest_path(MODEL, theirs.revision)] = theirs.encoded
    it.repository.publish(MODEL, "main", theirs.encoded)


def another_manifest(it: Attacked) -> None:
    """The bytes of another manifest than was signed, of the same length."""
    one, two = it.versions
    it.script.blobs[manifest_path(MODEL, two.revision)] = one.encoded


def mixed_shards(it: Attacked) -> None:
    """The bytes of the first revision where the second one's were asked for."""
    (one,), (two,) = (version.shards for version in it.versions)
    it.script.blobs[f"/blobs/{two}"] = it.script.blobs[f"/blobs/{one}"]


FRESH: Mapping[str, tuple[Callable[[Attacked], None], str]] = {
    "expired timestamp": (expired_timestamp, "metadata_expired"),
    "role of another state": (mixed, "mixed_metadata"),
    "snapshot of another state": (mixed_snapshot, "mixed_metadata"),
    "below the threshold": (below_threshold, "threshold_not_met"),
    "one key twice": (one_key_twice, "threshold_not_met"),
    "replayed root": (replayed_root, "rollback_detected"),
    "keys of its own": (forged, "unknown_key"),
    "one bit wrong": (flipped, "signature_invalid"),
    "another model's manifest": (another_model, "wrong_model"),
    "another manifest": (another_manifest, "integrity_error"),
    "shards of another revision": (mixed_shards, "integrity_error"),
}


@pytest.mark.parametrize("name", FRESH)
async def test_what_was_not_signed_is_refused(attacked: Attacked, name: str, tmp_path: Path) -> None:
    """F16, F17, M1 to M8, by the client itself, by an edge, and by a client behind that edge."""
    attack, code = FRESH[name]
    attack(attacked)
    assert await attacked.fetch(tmp_path / "out") == code
    assert not list((tmp_path / "out").rglob("*.bin"))
    edge = await asyncio.to_thread(attacked.edge)
    answer = await get(edge.port, TASK)
    if name == "shards of another revision":
        assert not answer.whole, "it had begun, and never gave the last byte"
    else:
        assert _code(answer) == code
    done = await asyncio.to_thread(
        lambda: command("get", MODEL, "-o", str(tmp_path / "cli"), "--router", attacked.script.url,
                        "--trust-root", str(attacked.root), check=False)
    )  # fmt: skip
    assert done.returncode == EXIT_INTEGRITY and "error:" in done.stderr


@pytest.mark.parametrize("name", ["timestamp.json", "2.root.json", "3.snapshot.json", f"3.{PUBLIC}.json"])
async def test_metadata_without_end_is_refused(attacked: Attacked, name: str, tmp_path: Path) -> None:
    """M1: whoever reads stops at the limit."""
    honest = serving(attacked.repository.files)

    async def endless(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if not asked.path.endswith(f"/{name}"):
            await honest(script, asked, writer)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        while not writer.is_closing():
            writer.write(b"[" * 65_536)
            await writer.drain()

    attacked.act(endless)
    assert await attacked.fetch(tmp_path / "out") == "metadata_too_large"
    edge = await asyncio.to_thread(attacked.edge)
    assert _code(await get(edge.port, TASK)) == "metadata_too_large"


# Against who has seen better


def rolled_back(it: Attacked) -> Mapping[str, bytes]:
    """All of the first state, every signature right."""
    return it.first


def equivocation(it: Attacked) -> Mapping[str, bytes]:
    """With the stolen online key: the same version of the timestamp, another content."""
    it.repository.versions[TIMESTAMP] -= 1
    it.repository.now += 5
    it.repository.sign_timestamp()
    return it.repository.files


def listed_back(it: Attacked) -> Mapping[str, bytes]:
    """With the stolen online key: a new snapshot that lists the publisher's first state."""
    it.repository.versions[PUBLIC] -= 1
    it.repository.sign_snapshot()
    return it.repository.files


def snapshot_signed_twice(it: Attacked) -> Mapping[str, bytes]:
    """The same version of the snapshot, another content."""
    it.repository.versions[SNAPSHOT] -= 1
    it.repository.now += 5
    it.repository.sign_snapshot()
    return it.repository.files


SEEN: Mapping[str, tuple[Callable[[Attacked], Mapping[str, bytes]], str]] = {
    "old metadata": (rolled_back, "rollback_detected"),
    "an old role in a new snapshot": (listed_back, "rollback_detected"),
    "two timestamps of one version": (equivocation, "equivocation_detected"),
    "two snapshots of one version": (snapshot_signed_twice, "equivocation_detected"),
}


@pytest.mark.parametrize("name", SEEN)
async def test_who_has_seen_better_is_not_taken_back(attacked: Attacked, name: str, tmp_path: Path) -> None:
    """I2: the client says so; an edge counts it, goes on by what it knows, and knows it after a restart too."""
    attack, code = SEEN[name]
    latest = attacked.versions[-1].revision
    edge = await asyncio.to_thread(attacked.edge)
    assert await attacked.fetch(tmp_path / "out") == latest
    assert (await get(edge.port, TASK)).whole
    attacked.serve(attack(attacked))
    assert await attacked.fetch(tmp_path / "out") == code
    for _ in range(2):
        assert (await get(edge.port, TASK)).sha256 == attacked.versions[-1].tasks["all"].layout.sha256
        assert await until(lambda: _refused(edge, code), "the refusal is counted") > 0
        assert await asyncio.to_thread(lambda: edge.status()["trust"]["error"]) == code
        edge.kill()
        await asyncio.to_thread(edge.start)


def _refused(edge: Service, code: str) -> float:
    """How often an edge refused metadata for this reason."""
    with urlopen(f"{edge.url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("nearshard_refused_metadata_total") and f'"{code}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in found)


async def test_a_client_can_check_everything_with_the_origin_away(attacked: Attacked, tmp_path: Path) -> None:
    """The edge serves on what it has verified; a client that knows but the root needs nobody else."""
    edge = await asyncio.to_thread(attacked.edge)
    assert (await get(edge.port, TASK)).whole
    gone: list[Any] = []

    async def away(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        gone.append(asked)
        writer.close()

    attacked.act(away)
    assert await fetch(edge.url, attacked.root, tmp_path / "out") == attacked.versions[-1].revision
    assert gone, "it was asked, and was away"
    answer = await get(edge.port, "/trust/timestamp.json")
    assert answer.status == 200 and "stale" in answer.fields["cache-status"]
    etag = answer.fields["etag"]
    conditional = (f"If-None-Match: {etag}", "Connection: close")
    assert (await get(edge.port, "/trust/timestamp.json", *conditional)).status == 304
    assert "immutable" in (await get(edge.port, "/trust/1.root.json")).fields["cache-control"]
    for name in ("2.root.json", "9.snapshot.json", "1.nobody~public.json", "x.json", "1.root.json.bak"):
        assert (await get(edge.port, f"/trust/{name}")).status == 404


# F34


class Load:
    """Clients that fetch all the time, each with what it believed before."""

    def __init__(self) -> None:
        self.came: list[str] = []
        """The revision, or the error's code, of each fetch."""
        self._ended = asyncio.Condition()

    async def run(self, url: str, root: Path, out: Path) -> None:
        """One client."""
        while True:
            came = await fetch(url, root, out)
            async with self._ended:
                self.came.append(came)
                self._ended.notify_all()

    async def more(self, count: int = 8) -> list[str]:
        """What came of the next fetches to end."""
        begun = len(self.came)
        async with asyncio.timeout(60), self._ended:
            await self._ended.wait_for(lambda: len(self.came) >= begun + count)
        return self.came[begun:]


@asynccontextmanager
async def load(url: str, root: Path, folder: Path) -> AsyncIterator[Load]:
    """Four of them."""
    made = Load()
    tasks = [asyncio.create_task(made.run(url, root, folder / str(number))) for number in range(4)]
    try:
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_keys_are_rotated_under_load_and_a_revoked_one_is_refused(attacked: Attacked, tmp_path: Path) -> None:
    """F34: root, targets and online keys one after the other, and no client fails; then a publisher's key is revoked,
    and what it signs is refused by the edge and by every client within the refresh."""
    edge = await asyncio.to_thread(attacked.edge)
    repository = attacked.repository
    latest = attacked.versions[-1].revision
    async with load(edge.url, attacked.root, tmp_path) as clients:
        await clients.more()
        changes: list[Mapping[str, Any]] = [
            {"root": [make_key(number) for number in (51, 52, 53)]},
            {"targets": make_key(54)},
            {"online": make_key(55)},
            {"publisher": make_key(56)},
            {"publisher": make_key(57)},
        ]
        for change in changes:
            repository.rotate(**change)
            assert set(await clients.more()) == {latest}, "nobody notices"
        repository.set_ref(MODEL, "main", attacked.versions[0].encoded)
        repository.sign_role(PUBLIC, make_key(56))
        repository.sign_snapshot()
        revoked = time.monotonic()
        while (await get(edge.port, TASK)).status == 200:
            assert time.monotonic() - revoked < 60
        assert set(await clients.more()) == {latest}, "who knows what was right before goes on by that"
        assert attacked.versions[0].revision not in clients.came
    assert await fetch(edge.url, attacked.root, tmp_path / "behind") == latest
    assert _code(await get(edge.port, TASK)) == "key_revoked"
    assert await attacked.fetch(tmp_path / "out") == "key_revoked"
    assert await fetch(edge.url, attacked.root, tmp_path / "out") == "upstream_error", "it is passed on to nobody"
