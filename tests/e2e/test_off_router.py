"""Clients of ours route by themselves: what they ask of routers, and how they do without."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nearshard import Client, Got, SyncClient
from shared.ring import Ring
from tests.harness import Lab, Service, command, get_json, make_model, result, wait_nodes, wait_until

SMALL = ("--shard-target", "64KiB", "--shard-limit", "64KiB")


class Net(NamedTuple):
    """A router, an origin, edges of one region, and a model of many shards."""

    lab: Lab
    origin: Service
    router: Service
    edges: list[Service]
    out: Path

    def publish(self, seed: int) -> bytes:
        """Another version; the bytes of its one weight file."""
        make_model(self.lab.folder / "model", seed=seed, width=512)
        self.lab.publish(self.lab.folder / "model", "acme/tiny", *SMALL)
        return (self.lab.folder / "model" / "model.safetensors").read_bytes()

    def add_edge(self) -> Service:
        """One more, known to the router and to the others."""
        number = len(self.edges)
        edge = self.lab.edge(
            self.origin,
            router=self.router,
            node=f"n{number}",
            region="default",
            ref_lifetime="0",
            heartbeat="0.2",
            measure="0",
        )
        self.edges.append(edge)
        wait_nodes(self.router, len(self.edges))
        for each in self.edges:
            wait_until(lambda edge=each: edge.status()["peers"] == len(self.edges), "the whole ring")  # type: ignore[misc]
        return edge

    def body(self, name: str) -> bytes:
        """The weight file of a download."""
        return (self.out / name / "model.safetensors").read_bytes()

    def requests(self) -> Counter[str]:
        """How often clients asked the router, by kind."""
        with urllib.request.urlopen(f"{self.router.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found: Counter[str] = Counter()
        for line in lines:
            if line.startswith("nearshard_requests_total{"):
                found[line.partition('kind="')[2].partition('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
        return Counter({kind: n for kind, n in found.items() if kind not in ("heartbeat", "leave", "other")})


@pytest.fixture
def net(lab: Lab) -> Net:
    """Two edges."""
    make_model(lab.folder / "model", width=512)
    lab.publish(lab.folder / "model", "acme/tiny", *SMALL)
    origin = lab.origin()
    net = Net(lab, origin, lab.router(origin, ttl="2"), [], lab.folder / "out")
    for _ in range(2):
        net.add_edge()
    return net


def shards(net: Net) -> dict[str, int]:
    """Sizes of the shards of all there is of the model."""
    plan = get_json(f"{net.origin.url}/shards/acme/tiny", Accept="application/vnd.nearshard.plan+json")
    return {shard["digest"]: shard["size"] for shard in plan["shards"]}


def by_owner(net: Net) -> dict[str, int]:
    """Bytes of the model by the URL of the edge that owns them."""
    ring = Ring({f"n{number}": 1 for number in range(len(net.edges))})
    found: Counter[str] = Counter()
    for digest, size in shards(net).items():
        found[net.edges[int(ring.owners(digest, 1)[0][1:])].url] += size
    return dict(found)


def by_source(got: Got) -> dict[str, int]:
    """Bytes of a download by who sent them."""
    found: Counter[str] = Counter()
    for (url, _), size in got.sources.items():
        found[url] += size
    return dict(found)


def test_a_download_of_many_shards_costs_the_router_a_few_requests(net: Net) -> None:
    assert len(shards(net)) > 60
    before = net.requests()
    got = SyncClient(net.router.url).get("acme/tiny", net.out / "cold")
    assert by_source(got) == by_owner(net), "each shard from its owner"
    after = net.requests() - before
    assert after == {"ring": 1, "trust": 1}, "the timestamp, with all that it leads to"
    SyncClient(net.router.url).pull("acme/tiny", output=net.out / "pulled")
    assert net.requests() - before - after == {"ring": 1, "trust": 1}, "a warm check is one conditional request"


def test_with_all_routers_killed_the_same_client_and_a_new_process_go_on(net: Net, tmp_path: Path) -> None:
    def cli(name: str, *words: str, check: bool = True, cache: Path = tmp_path / "cache") -> dict[str, Any]:
        done = command(
            *words, "-o", str(net.out / name), "--router", net.router.url, "--json", check=check,
            XDG_CACHE_HOME=str(cache),
        )  # fmt: skip
        return result(done) if done.returncode == 0 else {"code": done.returncode, "error": done.stderr}

    async def run() -> None:
        async with Client(net.router.url) as client:
            await client.get("acme/tiny", net.out / "first")
            first = await asyncio.to_thread(cli, "cli-first", "get", "acme/tiny")
            await asyncio.to_thread(net.router.kill)
            new = await asyncio.to_thread(net.publish, 8)
            got = await client.get("acme/tiny", net.out / "second")
            assert net.body("second") == new != net.body("first"), "an edge says what main means now"
            assert by_source(got) == await asyncio.to_thread(by_owner, net)
            assert [name async for name in _each(client)] == ["acme/tiny"]
            second = await asyncio.to_thread(cli, "cli-second", "get", "acme/tiny")
            assert net.body("cli-second") == new and second["revision"] == got.revision != first["revision"]
            await asyncio.to_thread(cli, "pulled", "pull", "acme/tiny")
            assert net.body("pulled") == new

    asyncio.run(run())
    missing = cli("none", "get", "acme/tiny:none", check=False)
    assert missing["code"] == 8 and "all, embed, half" in missing["error"]
    held = cli("x", "get", "acme/tiny", cache=tmp_path / "empty")
    assert held["moved"] == 0, "who never heard of a node goes on by what is held and signed"


async def _each(client: Client) -> Any:
    for name in await client.models():
        yield name


def test_a_kept_file_with_junk_or_lies_in_it_costs_nothing_but_itself(net: Net, tmp_path: Path) -> None:
    def get(name: str) -> dict[str, Any]:
        words = ["get", "acme/tiny", "-o", str(net.out / name), "--router", net.router.url, "--json"]
        return result(command(*words, XDG_CACHE_HOME=str(tmp_path)))

    get("one")
    (file,) = (tmp_path / "nearshard" / "rings").iterdir()
    file.write_bytes(b"\xff" * 100)
    get("two")
    kept = json.loads(file.read_bytes())
    assert sorted(kept["view"]["regions"]) == ["default"]
    for node in kept["view"]["nodes"]:
        node["url"] = "http://127.0.0.1:9"
    file.write_bytes(json.dumps(kept).encode())
    assert get("three")["revision"], "and what is fresh and wrong is healed by the origin"
    assert net.body("three") == net.body("one")


async def test_an_edge_that_is_added_gets_its_share(net: Net) -> None:
    async with Client(net.router.url) as client:
        got = await client.get("acme/tiny", net.out / "before")
        assert set(by_source(got)) == {edge.url for edge in net.edges}
        edge = await asyncio.to_thread(net.add_edge)
        got = await client.get("acme/tiny", net.out / "after")
    found = by_source(got)
    assert found == await asyncio.to_thread(by_owner, net)
    assert found[edge.url] > 0


async def test_a_killed_edge_costs_nothing_and_is_reported(net: Net) -> None:
    async with Client(net.router.url) as client:
        await client.get("acme/tiny", net.out / "before")
        net.edges[0].kill()
        got = await client.get("acme/tiny", net.out / "after")
        assert net.body("after") == net.body("before")
        assert set(by_source(got)) == {net.edges[1].url}, "the other edge, not the origin"
    with urllib.request.urlopen(f"{net.router.url}/metrics", timeout=10) as answer:
        reports = [line for line in answer.read().decode().splitlines() if 'kind="report"' in line]
    assert any(line.startswith("nearshard_requests_total") and line.endswith(" 1.0") for line in reports), reports


def test_of_two_routers_one_may_be_down(net: Net, tmp_path: Path) -> None:
    down = "http://127.0.0.7:9"
    got = SyncClient([down, net.router.url]).get("acme/tiny", net.out / "sdk")
    assert by_source(got) == by_owner(net)
    for number, words in enumerate(
        (["--router", f"{down},{net.router.url}"], ["--router", down, "--router", net.router.url])
    ):
        command("get", "acme/tiny", "-o", str(net.out / str(number)), *words, XDG_CACHE_HOME=str(tmp_path))
        assert net.body(str(number)) == net.body("sdk")
    done = command("nodes", "--json", NEARSHARD_ROUTER=f"{down},{net.router.url}")
    assert {node["id"] for node in json.loads(done.stdout)} == {"n0", "n1"}
    assert command("get", "acme/tiny", "--router", "router:8700", check=False).returncode == 2
    assert command("get", "acme/tiny", "--region", "North", check=False).returncode == 2


# What routers and nodes say of the ring


def fields(url: str, **headers: str) -> dict[str, str]:
    """Of a HEAD, or of a GET where only that is answered on the short path; redirects are not followed."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.build_opener(Stay).open(request, timeout=10) as answer:
            return dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return dict(error.headers)


def test_the_epoch_comes_with_what_clients_see_anyway(net: Net) -> None:
    epoch = str(net.router.status()["epoch"])
    digest = next(iter(shards(net)))
    plan = {"Accept": "application/vnd.nearshard.plan+json"}
    for path, headers in (
        ("/shards/acme/tiny", {}), ("/shards/acme/tiny", plan), ("/models/acme/tiny/manifests/main", {}),
        (f"/blobs/{digest}", {}), ("/ring?near=1", {}),
    ):  # fmt: skip
        assert fields(net.router.url + path, **headers)["Nearshard-Epoch"] == epoch, path
    edge = net.edges[0].url

    def heard() -> bool:
        return fields(f"{edge}/models/acme/tiny/manifests/main")["Nearshard-Epoch"] == epoch

    wait_until(heard, "the edge heard the epoch")
    for headers in ({}, {"X-Slow": "the long way"}) * 2:
        found = fields(f"{edge}/blobs/{digest}", **headers)
        assert found["Nearshard-Epoch"] == epoch
    assert list(fields(f"{edge}/blobs/{digest}")) == list(fields(f"{edge}/blobs/{digest}", X_Slow="1"))
    assert "Nearshard-Epoch" not in fields(f"{net.origin.url}/blobs/{digest}")


def test_a_view_is_of_where_the_client_is(lab: Lab) -> None:
    router = lab.router(
        "http://127.0.0.1:9/base", default_region="north", networks='{"192.0.2.0/24": "south"}',
        trusted_proxies='["127.0.0.0/8"]', links='{"north>south": 5, "north>west": 3, "south>west": 9}', ttl="60",
    )  # fmt: skip
    for number, name in enumerate(("north-1", "south-1", "south-2", "west-1"), 1):
        record = {
            "url": f"http://127.0.0.1:{number}",
            "region": name.partition("-")[0],
            "weight": 1,
            "draining": name == "south-2",
        }
        request = urllib.request.Request(
            f"{router.url}/nodes/{name}",
            json.dumps(record).encode(),
            {"Content-Type": "application/json"},
            method="PUT",
        )
        urllib.request.urlopen(request, timeout=10).close()
    wait_nodes(router, 4)  # those that join within one breath make one ring

    def view(query: str = "near=100", **headers: str) -> Any:
        return get_json(f"{router.url}/ring?{query}", **{k.replace("_", "-"): v for k, v in headers.items()})

    plain = view()
    assert (plain["region"], plain["regions"], plain["left_off"]) == ("north", ["north", "west", "south"], 0)
    assert plain["origins"] == ["http://127.0.0.1:9/base"]
    assert {node["id"]: node["draining"] for node in plain["nodes"]}["south-2"]
    said = view(Nearshard_Region="south")
    assert (said["region"], said["regions"]) == ("south", ["south", "north", "west"])
    assert view(X_Forwarded_For="192.0.2.7")["region"] == "south"
    assert view("near=100&region=west")["regions"][0] == "west"
    few = view("near=1")
    assert (few["regions"], few["left_off"]) == (["north"], 3)
    answers = {
        region: fields(f"{router.url}/ring?near=9", **{"Nearshard-Region": region}) for region in ("north", "south")
    }
    assert answers["north"]["ETag"] != answers["south"]["ETag"]
    assert {answer["Vary"] for answer in answers.values()} == {"Nearshard-Region"}
    for bad in ("0", "-1", "x", "5000", "99999", "", "%D9%A1"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            view(f"near={bad}")
        assert refused.value.code == 400
        refused.value.close()
    assert {node["id"] for node in get_json(f"{router.url}/ring")["nodes"]} >= {"north-1", "west-1"}, "for nodes: all"
