"""A rollout by real processes: two sites, a router, clients of ours and plain ones; begun, widened, undone."""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from nearshard import SyncClient
from nearshard.client_id import client_id
from shared.digest import Digest
from shared.ids import commit_of
from shared.rollout import Rollout, Subject, meant_for
from tests.harness import Lab, Service, command, get_json, make_model, result, wait_nodes, wait_until

MODEL = "acme/tiny"


@dataclass
class Sites:
    """``main`` means the first revision, ``canary`` the second one."""

    lab: Lab
    router: Service
    other_router: Service
    edges: dict[str, Service]
    first: Digest
    second: Digest
    origin: Service

    def roll(self, *words: str, check: bool = True, afar: bool = False) -> Any:
        """``nearshard rollout``, at the store or from ``afar``; what it says."""
        store = (
            ("--origin", self.origin.url, "--keys", str(self.lab.keys)) if afar else ("--store", str(self.lab.store))
        )
        where = (*store, "--router", self.router.url, "--router", self.other_router.url)
        done = command("rollout", MODEL, *words, *where, "--json", check=check)
        return json.loads(done.stdout) if check else done

    def ours(self, region: str) -> str:
        """What our client takes ``main`` for in a region."""
        return str(SyncClient(self.router.url, region=region).get(MODEL, self.lab.folder / "out", force=True).revision)

    def plain(self, base: str, path: str = f"/shards/{MODEL}", source: str = "127.0.0.1", **fields: str) -> str:
        """Where ``base`` sends a plain client at an address, or the entity tag of what it sends."""
        connection = http.client.HTTPConnection(urlsplit(base).netloc, timeout=10, source_address=(source, 0))
        try:
            connection.request("HEAD", path, headers=fields)
            answer = connection.getresponse()
            return answer.headers.get("Location") or answer.headers["ETag"]
        finally:
            connection.close()


@pytest.fixture(scope="module")
def begun(shared_lab: Lab) -> Iterator[Sites]:
    lab, folder = shared_lab, shared_lab.folder / "model"
    revisions = []
    for seed, ref in ((1, "main"), (2, "canary")):
        make_model(folder, seed=seed, width=64)
        revisions.append(Digest(lab.publish(folder, MODEL, "--ref", ref)))
    origin = lab.origin()
    router, other = (lab.router(origin, ref_lifetime="600", default_region="north") for _ in range(2))
    edges = {
        region: lab.edge(origin, router=router, node=region, region=region, ref_lifetime="600")
        for region in ("north", "south")
    }
    wait_nodes(router, 2)
    yield Sites(lab, router, other, edges, revisions[0], revisions[1], origin)


@pytest.fixture
def sites(begun: Sites, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sites]:
    """With nothing rolled out."""
    monkeypatch.setenv("NEARSHARD_REPOSITORY", str(tmp_path / "repository"))
    yield begun
    begun.roll("--rollback")
    shutil.rmtree(tmp_path)


def test_a_revision_goes_to_one_site_and_back_at_once(sites: Sites) -> None:
    assert sites.ours("north") == sites.ours("south") == sites.first
    rolled = sites.roll("canary", "--sites", "north")
    assert rolled["changed"] and rolled["rollout"]["revision"] == sites.second
    assert (sites.ours("north"), sites.ours("south")) == (sites.second, sites.first)
    for router in (sites.router, sites.other_router):
        for fields in ({}, {"Cookie": "the long way=1"}):
            for region, revision in (("north", sites.second), ("south", sites.first)):
                sent_to = sites.plain(router.url, **fields, **{"Nearshard-Region": region})
                assert sent_to.endswith(f"{MODEL}:all@{revision}")
        told = get_json(f"{router.url}/api/models/{MODEL}/revision/main")
        assert told["sha"] == commit_of(sites.second), "clients of the hub too"

    tags = {region: sites.plain(edge.url) for region, edge in sites.edges.items()}
    wait_until(lambda: sites.plain(sites.edges["north"].url) != tags["south"], "the edge has heard of it")
    assert sites.plain(sites.edges["south"].url) == tags["south"], "an edge that is asked itself knows where it is"

    assert sites.roll("--rollback")["rollout"] is None
    assert sites.ours("north") == sites.ours("south") == sites.first
    assert sites.plain(sites.router.url).endswith(f"{MODEL}:all@{sites.first}")


def test_every_tier_takes_the_same_clients_and_more_of_them(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = [f"127.0.0.{n}" for n in range(2, 42)]

    def taken() -> set[str]:
        """The addresses to which ``main`` is the second revision; the same for each router, and each time."""
        rounds = [
            {a for a in addresses if sites.plain(router.url, source=a).endswith(sites.second)}
            for router in (sites.router, sites.other_router, sites.router)
        ]
        assert rounds[0] == rounds[1] == rounds[2]
        return rounds[0]

    sites.roll("canary", "--percent", "10")
    at_10 = taken()
    sites.roll("--percent", "50")
    at_50 = taken()
    assert at_10 <= at_50 and 8 <= len(at_50) <= 32
    rule = Rollout(sites.second, 1, 50)
    assert at_50 == {a for a in addresses if meant_for(rule, MODEL, "main", Subject(a, "north"))}

    seen = set()
    trusted = SyncClient(sites.router.url)  # finds the root before the directories are others
    root = next(iter(sites.lab.keys.glob("root.json")))
    for n in range(6):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(sites.lab.folder / f"config-{n}"))
        client = SyncClient(sites.router.url, region="south", trust_root=root)
        got = [client.get(MODEL, sites.lab.folder / "out", force=True).revision for _ in range(2)]
        is_in = meant_for(rule, MODEL, "main", Subject(client_id(), "south"))
        assert got == [sites.second if is_in else sites.first] * 2
        seen.add(client_id())
    assert len(seen) == 6 and trusted

    assert sites.roll("--continue")["rollout"]["percent"] == 100
    assert taken() == set(addresses)
    shown = sites.roll()
    assert (shown["revision"], shown["rollout"]["percent"], shown["changed"]) == (sites.first, 100, False)


def test_a_finished_rollout_is_what_the_ref_means(sites: Sites) -> None:
    sites.roll("canary", "--sites", "south", "--percent", "5", afar=True)
    assert sites.roll("--finish", afar=True)["revision"] == sites.second
    assert sites.ours("north") == sites.ours("south") == sites.second
    assert sites.roll("--percent", "5", check=False).returncode == 8
    folder = sites.lab.folder / "model"
    make_model(folder, seed=1, width=64)
    sites.lab.publish(folder, MODEL, "--router", sites.router.url, "--router", sites.other_router.url)
    assert sites.ours("north") == sites.first


def test_a_client_and_a_site_stay_at_what_they_are_pinned_to(sites: Sites) -> None:
    pin = f"{MODEL}@main={sites.second}"
    edge = sites.lab.edge(sites.origin, region="north", node="pinned", pins=json.dumps([pin]))
    router = sites.lab.router(sites.origin, pins=json.dumps([f"{pin}@north"]))
    assert sites.plain(router.url, **{"Nearshard-Region": "north"}).endswith(sites.second)
    assert sites.plain(router.url, **{"Nearshard-Region": "south"}).endswith(sites.first)
    assert sites.plain(edge.url) == sites.plain(edge.url, f"/shards/{MODEL}@{sites.second}")
    assert sites.ours("north") == sites.first
    got = command("get", MODEL, "--router", sites.router.url, "--json", NEARSHARD_PIN=pin)
    assert result(got)["revision"] == sites.second
    bad = command("get", MODEL, "--router", sites.router.url, "--pin", f"{MODEL}=main", check=False)
    assert bad.returncode == 2 and "digest" in bad.stderr


def test_a_router_says_how_the_revisions_do_site_by_site(sites: Sites) -> None:
    sites.roll("canary", "--sites", "north")

    def counts(edge: Service) -> bool:
        return bool(sites.plain(edge.url) and edge.status()["trials"])

    for edge in sites.edges.values():  # they hear of it from the router, through an origin that has it
        wait_until(partial(counts, edge), "the edge counts")
    for region in ("north", "south", "south"):
        connection = urllib.request.Request(
            f"{sites.router.url}/shards/{MODEL}:half", headers={"Nearshard-Region": region}
        )
        with urllib.request.urlopen(connection, timeout=10) as answer:
            assert answer.read()

    def results() -> dict[tuple[str, str], dict[str, Any]]:
        (rollout,) = sites.router.status()["rollouts"]
        assert (rollout["model"], rollout["ref"], rollout["revision"]) == (MODEL, "main", sites.second)
        assert (rollout["means"], rollout["sites"], rollout["percent"]) == (sites.first, ["north"], 100)
        found = {(result["site"], result["revision"]): result for result in rollout["results"]}
        timed = {key for key, result in found.items() if result["ready_p50_ms"] is not None}
        return found if timed == {("north", sites.second), ("south", sites.first)} else {}

    found = wait_until(results, "the router has heard of both")
    assert all(result["errors"] == 0 and result["requests"] >= 2 for result in found.values())
    sites.roll("--rollback")
    assert sites.router.status()["rollouts"] == []
