"""Signed metadata in a store: how it changes, what is left where a change is cut off, and keys that come and go.

The judge is The Update Framework's own client, which keeps what it trusted from one look to the next.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient import FetcherInterface, Updater

from origin import signing
from origin.audit import Audit
from origin.commit import LocalSink
from origin.config import ONLINE_FILE
from origin.keyring import Keyring, load_ring
from origin.rotation import ONLINE, Rotation, affected
from origin.signing import State, key_id
from origin.storage import Storage
from origin.trust_setup import add_publisher, initialise
from origin.trust_store import TrustStore
from shared.errors import ConfigError, Conflict, MetadataInvalid, NotFound, RequestError
from shared.keys import NodeKey, load_key, save_key
from shared.manifest import Manifest
from shared.trust_names import ROOT, TARGETS, TIMESTAMP
from tests.contract.storage_contract import manifest
from tests.harness import command

NOW = datetime.now(UTC).replace(microsecond=0)


class Here(FetcherInterface):
    """Files straight from a store's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _fetch(self, url: str) -> Iterator[bytes]:
        file = self._folder / url.rpartition("/")[2]
        if not file.is_file():
            raise DownloadHTTPError("not there", 404)
        yield file.read_bytes()


class Net:
    """A store with metadata, all keys at hand, and clients of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, folder / "keys"
        self.trust = TrustStore(Storage(str(folder / "store")))
        self.root = b""

    async def begin(self) -> Net:
        """Keys and metadata for ``acme`` and ``other``."""
        made = await initialise(self.trust, self.keys, ["acme", "other"], NOW, root_keys=3, threshold=2)
        self.root = made.root
        return self

    @property
    def ring(self) -> Keyring:
        """All keys that there are."""
        return load_ring([self.keys])

    def again(self) -> TrustStore:
        """The same store, as another process finds it."""
        return TrustStore(Storage(self.trust.storage.location))

    def sink(self, trust: TrustStore | None = None) -> LocalSink:
        """A publisher."""
        return LocalSink(trust or self.again(), self.ring, lambda: NOW)

    async def publish(self, made: Manifest, ref: str = "main", sink: LocalSink | None = None) -> bool:
        """Have a ref mean a manifest."""
        sink = sink or self.sink()
        before = await sink.begin(made.model, ref, private=False)
        await sink.put_manifest(made)
        return await sink.move_ref(made.model, ref, made, before, private=False)

    def seen(self, client: str, path: str = "acme/tiny/main") -> str:
        """What a client takes a ref to mean; it fails as the client does."""
        home = self.folder / client
        home.mkdir(exist_ok=True)
        store = Path(self.trust.storage.location) / "trust"
        updater = Updater(str(home), "http://x/", str(home), "http://x/", Here(store), bootstrap=self.root)
        target = updater.get_targetinfo(path)
        return f"sha256:{target.hashes['sha256']}" if target else ""

    def ids(self, state: State, role: str) -> list[str]:
        """The keys of a role."""
        return list(state.role(role).keyids)


@pytest.fixture
async def net(tmp_path: Path) -> Net:
    """A new one."""
    return await Net(tmp_path).begin()


FIRST, SECOND = manifest("acme/tiny", 1), manifest("acme/tiny", 1, 2)


async def test_a_ref_is_seen_when_the_timestamp_is_replaced(net: Net) -> None:
    assert net.seen("client") == ""
    assert await net.publish(FIRST)
    assert net.seen("client") == FIRST.revision
    assert not await net.publish(FIRST), "it means that already"
    assert await net.publish(SECOND) and net.seen("client") == SECOND.revision
    assert (await net.again().refs("acme/tiny"))["main"].size == len(SECOND.encoded)
    assert await net.trust.models() == ["acme/tiny"]
    with pytest.raises(NotFound) as error:
        await net.trust.ref("acme/tiny", "v2")
    assert error.value.error_code == "unknown_revision"
    with pytest.raises(NotFound) as error:
        await net.trust.ref("acme/none", "main")
    assert error.value.error_code == "unknown_model"


async def test_gc_keeps_what_a_publish_that_was_cut_off_has_signed(net: Net) -> None:
    """However old it is: whoever comes next puts it in force."""
    await net.publish(FIRST)
    old = (await net.trust.state()).roles["acme~public"]
    made = signing.next_of(old, NOW, "acme~public")
    signing.set_ref(made, "acme/tiny", "main", SECOND.revision, len(SECOND.encoded), NOW)
    await net.trust.create([("acme~public", made.version, signing.sign(made, list(net.ring.values())))])
    assert await net.again().meant() == {"acme/tiny": {FIRST.revision, SECOND.revision}}


@pytest.mark.parametrize("steps", [1, 2])
async def test_what_was_cut_off_is_put_in_force_by_whoever_comes_next(net: Net, steps: int) -> None:
    """F2: after the role was stored, and after the snapshot was."""
    await net.publish(FIRST)
    state = await net.trust.state()
    made = signing.next_of(state.roles["acme~public"], NOW, "acme~public")
    signing.set_ref(made, "acme/tiny", "main", SECOND.revision, len(SECOND.encoded), NOW)
    keys = signing.holders(state.role("acme~public"), net.ring, "acme")
    await net.trust.create([("acme~public", made.version, signing.sign(made, keys))])
    if steps == 2:
        before = (Path(net.trust.storage.location) / "trust" / "timestamp.json").read_bytes()
        await net.again().roll_forward(online(net), NOW)
        (Path(net.trust.storage.location) / "trust" / "timestamp.json").write_bytes(before)
    assert net.seen("client") == FIRST.revision
    assert await net.again().roll_forward(online(net), NOW)
    assert net.seen("client") == SECOND.revision
    assert not await net.again().roll_forward(online(net), NOW)


def online(net: Net) -> list[NodeKey]:
    """The online key."""
    return [load_key(net.keys / ONLINE_FILE)]


async def test_metadata_that_is_not_the_publishers_is_passed_over(net: Net) -> None:
    await net.publish(FIRST)
    state = await net.trust.state()
    made = signing.next_of(state.roles["acme~public"], NOW, "acme~public")
    signing.set_ref(made, "acme/tiny", "main", SECOND.revision, 1, NOW)
    others = signing.holders(state.role("other~public"), net.ring, "other")
    await net.trust.create([("acme~public", made.version, signing.sign(made, others))])
    assert not await net.again().roll_forward(online(net), NOW)
    assert net.seen("client") == FIRST.revision
    assert await net.publish(SECOND) and net.seen("client") == SECOND.revision
    assert (await net.again().state()).roles["acme~public"].version == made.version + 1


async def test_of_two_who_move_one_ref_one_wins_and_the_other_is_told(net: Net) -> None:
    await net.publish(FIRST)
    sinks = [net.sink(), net.sink()]
    made = [manifest("acme/tiny", 1, n) for n in (3, 4)]
    before = [await sink.begin("acme/tiny", "main", private=False) for sink in sinks]
    for sink, one in zip(sinks, made, strict=True):
        await sink.put_manifest(one)
    done = await asyncio.gather(
        *(
            sink.move_ref("acme/tiny", "main", one, was, private=False)
            for sink, one, was in zip(sinks, made, before, strict=True)
        ),
        return_exceptions=True,
    )
    (loser,) = [n for n, result in enumerate(done) if result is not True]
    error = done[loser]
    assert isinstance(error, Conflict) and error.error_code == "ref_conflict"
    assert net.seen("client") == made[1 - loser].revision


async def test_many_who_move_refs_of_one_organisation_at_once_all_win(net: Net) -> None:
    made = [manifest(f"acme/m{n}", n + 1) for n in range(6)] + [manifest("other/m", 9)]
    assert all(await asyncio.gather(*(net.publish(one) for one in made)))
    for one in made:
        assert net.seen("client", f"{one.model}/main") == one.revision
    state = await net.again().state()
    assert state.roles["acme~public"].version == 7 and len(state.roles["acme~public"].targets) == 6


@pytest.mark.parametrize("role", [ROOT, TARGETS, ONLINE, "acme"])
async def test_keys_are_rotated_and_no_client_notices(net: Net, role: str) -> None:
    """F34, at every file that is stored on the way: clients that were there before, and new ones."""
    await net.publish(FIRST)
    net.seen("old")
    looks = 0
    real = net.trust.storage.objects.create

    trust = net.again()
    storage = trust.storage

    async def create(path: str, data: bytes) -> bool:
        nonlocal looks
        created = await real(path, data)
        looks += 1
        shutil.copytree(net.folder / "old", net.folder / f"old-{looks}")
        assert net.seen(f"old-{looks}") == net.seen(f"new-{looks}") == FIRST.revision
        return created

    storage.create = create  # type: ignore[method-assign,assignment]
    state = await trust.state()
    signer = TIMESTAMP if role == ONLINE else role if role in (ROOT, TARGETS) else "acme~public"
    old = net.ids(state, signer)
    done = await Rotation(trust, net.ring, net.keys, NOW).rotate(role)
    state = await net.again().state()
    assert sorted(done["removed"]) == sorted(old) and sorted(net.ids(state, signer)) == sorted(done["added"])
    assert looks >= 2 and not set(old) & set(net.ids(state, signer))
    assert state.role(signer).threshold == (2 if role == ROOT else 1)
    assert await net.publish(SECOND)
    assert net.seen("old") == net.seen("new") == SECOND.revision
    if role == ONLINE:
        (now,) = net.ids(state, TIMESTAMP)
        assert now in load_ring([net.keys]) and net.ids(state, "access") == [now]
        assert key_id(load_key(net.keys / ONLINE_FILE)) == now


async def test_a_revoked_publisher_signs_nothing_more(net: Net) -> None:
    await net.publish(FIRST)
    net.seen("client")
    state = await net.trust.state()
    (old,) = net.ids(state, "acme~public")
    assert affected(state, old) == ["acme"]
    with pytest.raises(ConfigError, match="--replace"):
        await Rotation(net.again(), net.ring, net.keys, NOW).revoke(old, replace=False)
    stolen = net.ring
    done = await Rotation(net.again(), net.ring, net.keys, NOW).revoke(old, replace=True)
    state = await net.again().state()
    assert net.ids(state, "acme~public") == done["added"] and old not in {*state.root.keys, *done["added"]}
    assert net.seen("client") == FIRST.revision, "what it had signed is signed anew"
    thief = LocalSink(net.again(), stolen, lambda: NOW)
    with pytest.raises(RequestError) as error:
        await net.publish(SECOND, sink=thief)
    assert error.value.error_code == "not_publisher"
    with pytest.raises(NotFound):
        affected(state, old)


async def test_a_second_publisher_signs_in_the_place_of_a_revoked_one(net: Net) -> None:
    await net.publish(FIRST)
    mine = NodeKey.generate()
    save_key(net.keys / "second.pem", mine)
    state = await net.trust.state()
    (old,) = net.ids(state, "acme~public")
    assert await add_publisher(net.again(), net.ring, "acme", mine.public, NOW)
    assert not await add_publisher(net.again(), net.ring, "acme", mine.public, NOW)
    await Rotation(net.again(), net.ring, net.keys, NOW).revoke(old, replace=False)
    state = await net.again().state()
    assert net.ids(state, "acme~public") == [key_id(mine)]
    assert net.seen("client") == FIRST.revision


async def test_a_root_key_that_is_lost_is_replaced_by_the_others(net: Net) -> None:
    state = await net.trust.state()
    lost = net.ids(state, ROOT)[0]
    for file in net.keys.glob("root-*.pem"):
        if lost.startswith(file.stem.removeprefix("root-")):
            file.unlink()
    done = await Rotation(net.again(), net.ring, net.keys, NOW).revoke(lost, replace=True)
    state = await net.again().state()
    assert len(net.ids(state, ROOT)) == 3 and lost not in net.ids(state, ROOT) and len(done["added"]) == 1
    assert net.seen("client") == ""
    for file in list(net.keys.glob("root-*.pem"))[:2]:
        file.unlink()
    with pytest.raises(ConfigError, match="not found"):
        await Rotation(net.again(), net.ring, net.keys, NOW).rotate(ROOT)


async def test_an_online_key_that_is_lost_is_replaced(net: Net) -> None:
    await net.publish(FIRST)
    net.seen("client")
    (lost,) = net.ids(await net.trust.state(), TIMESTAMP)
    (net.keys / ONLINE_FILE).unlink()
    await Rotation(net.again(), net.ring, net.keys, NOW).revoke(lost, replace=True)
    assert net.seen("client") == net.seen("new") == FIRST.revision


async def test_what_is_signed_online_is_renewed_before_it_expires(net: Net) -> None:
    await net.publish(FIRST)
    first = await net.trust.state()
    assert not await net.again().roll_forward(online(net), NOW + timedelta(minutes=59), renew=True)
    assert await net.again().roll_forward(online(net), NOW + timedelta(hours=1, minutes=1), renew=True)
    second = await net.again().state()
    assert second.timestamp.version == first.timestamp.version + 1
    assert second.snapshot.version == first.snapshot.version
    assert await net.again().roll_forward(online(net), NOW + timedelta(days=2), renew=True)
    third = await net.again().state()
    assert third.snapshot.version > second.snapshot.version
    assert third.roles["access"].version == first.roles["access"].version + 1
    assert third.roles["access"].expires == NOW + timedelta(days=9)
    assert net.seen("client") == FIRST.revision


async def test_access_is_said_by_the_origin(net: Net) -> None:
    fields = {"token_keys": [{"id": "a", "public": "00"}], "revoked": []}
    await net.trust.change_access(lambda _: fields, online(net), NOW)
    assert (await net.again().state()).roles["access"].unrecognized_fields["nearshard"] == fields
    assert net.seen("client") == ""


async def test_a_key_of_small_order_or_under_another_name_is_refused_in_metadata(net: Net) -> None:
    """S2, and M3: one key under two names would count twice."""
    with pytest.raises(RequestError) as error:
        await add_publisher(net.trust, net.ring, "acme", bytes([1]) + bytes(31), NOW)
    assert error.value.error_code == "bad_key"
    document = json.loads(net.root)
    (name, key), *_ = document["signed"]["keys"].items()
    document["signed"]["keys"]["00" * 32] = key
    with pytest.raises(MetadataInvalid):
        signing.check_root(json.dumps(document).encode())
    document["signed"]["keys"] = {name: {**key, "keyval": {"public": "01" + "00" * 31}}}
    with pytest.raises(MetadataInvalid):
        signing.check_root(json.dumps(document).encode())


async def test_a_key_file_that_others_may_read_is_refused(net: Net) -> None:
    """C2."""
    (net.keys / ONLINE_FILE).chmod(0o644)
    with pytest.raises(ConfigError, match="others on this machine"):
        load_ring([net.keys])
    done = command("trust", "rotate", "online", "--store", net.trust.storage.location, check=False)
    assert done.returncode == 3 and "others on this machine" in done.stderr
    done = command("origin", "--store", net.trust.storage.location, "--port", "0", check=False)
    assert done.returncode == 3 and "others on this machine" in done.stderr


def test_audit_lines_are_only_added(tmp_path: Path) -> None:
    for n in range(2):
        Audit(tmp_path / "logs" / "audit.jsonl", lambda: NOW).add("published", "ab", n=n)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "audit.jsonl").read_text().splitlines()]
    assert [line["n"] for line in lines] == [0, 1] and lines[0]["event"] == "published"
    assert datetime.fromisoformat(lines[0]["time"]) == NOW
