"""The account of nodes, over real processes: what it says is what was moved, also after a kill; and who sees what."""

from __future__ import annotations

import csv
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nearshard import SyncClient
from shared.errors import EXIT_NETWORK
from shared.usage import PRIVATE, Usage, parse_days, total
from tests.e2e.test_region import fetch, settle
from tests.harness import Lab, Service, command, get_json, make_model, wait_nodes, wait_settled, wait_until

MODEL, SECRET = "acme/tiny", "acme/secret"


def usage(edge: Service, token: str = "", query: str = "") -> dict[str, Usage]:
    """A node's numbers by model, of all days."""
    fields = {"Authorization": f"Bearer {token}"} if token else {}
    days = parse_days(get_json(f"{edge.url}/usage{query}", None, **fields)["days"])
    return {model: total(day[model] for day in days.values() if model in day) for model in set().union(*days.values())}


def test_what_nodes_say_is_what_was_moved_also_after_a_kill(lab: Lab, tmp_path: Path) -> None:
    make_model(lab.folder / "model", width=512)
    revision = lab.publish(lab.folder / "model", MODEL, "--shard-target", "64KiB", "--shard-limit", "64KiB")
    origin = lab.origin()
    router = lab.router(origin)
    edges = [lab.edge(origin, router=router, node=f"n{n}", region="default") for n in range(2)]
    wait_nodes(router, 2)
    settle(edges)
    plan = get_json(f"{edges[0].url}/shards/{MODEL}", Accept="application/vnd.nearshard.plan+json")
    size = plan["layout"]["size"]

    got = SyncClient(router.url).get(MODEL, tmp_path / "out")  # by shards, of both nodes
    for edge in edges:
        wait_settled(edge)
    for _ in range(3):
        fetch(f"{edges[0].url}/shards/{MODEL}@{revision}")  # by the task, of one: half of it from its peer
    wait_settled(edges[0])
    said = [usage(edge) for edge in edges]
    sums = {model: total(one[model] for one in said if model in one) for model in set().union(*said)}
    assert sums.keys() == {MODEL}, "also where only shards were asked for"
    whole = sums[MODEL]
    assert whole.served == got.moved + 3 * size
    assert whole.link == sum(edge.status()["upstream_bytes"] for edge in edges) == got.moved
    assert whole.peers == sum(edge.status()["peer_bytes"] for edge in edges) > 0

    report = reported(router, tmp_path / "report", "--price", "$100/GB")
    assert report["total"]["served"] == whole.served and report["total"]["link"] == got.moved
    assert report["sites"]["default"]["money_saved"] == pytest.approx((whole.served - got.moved) / 1e7, abs=1e-3)
    assert report["models"][MODEL]["hits"] == whole.hits > 0 and report["silent"] == []
    assert "<svg" in (tmp_path / "report" / "report.html").read_text()
    rows = list(csv.DictReader((tmp_path / "report" / "report.csv").read_text().splitlines()))
    assert sum(int(row["spared_bytes"]) for row in rows) == whole.served - got.moved

    edges[1].kill()
    report = reported(router, tmp_path / "report")
    assert report["total"]["served"] == said[0][MODEL].served
    assert [one["node"] for one in report["silent"]] == ["n1"]
    assert "1 node did not answer; what was served there is missing here: n1 (default)." in report["summary"]
    edges[0].kill()
    failed = command("report", "--router", router.url, "-o", str(tmp_path), check=False)
    assert failed.returncode == EXIT_NETWORK and "none of 2 nodes" in failed.stderr


def reported(router: Service, out: Path, *words: str) -> Any:
    """What ``nearshard report`` says; its files in ``out``."""
    return json.loads(
        command("report", "--since", "2d", "--router", router.url, "-o", str(out), "--json", *words).stdout
    )


def test_an_account_survives_an_end_and_a_kill_and_a_damaged_one_is_begun_anew(lab: Lab) -> None:
    make_model(lab.folder / "model", width=64)
    revision = lab.publish(lab.folder / "model", MODEL)
    edge = lab.edge(lab.origin(), node="n0")
    url, file = f"{edge.url}/shards/{MODEL}@{revision}", lab.folder / "n0" / "usage.msgpack"
    fetch(url)
    before = usage(edge)[MODEL].counts()
    edge.stop()
    edge.start()
    assert usage(edge)[MODEL].counts() == before, "all of it was kept at the end"

    stamp = file.stat().st_mtime_ns
    fetch(url)
    before = usage(edge)[MODEL].counts()
    wait_until(lambda: file.stat().st_mtime_ns != stamp, "the account is written")
    edge.kill()
    edge.start()
    assert usage(edge)[MODEL].counts() == before
    assert file.stat().st_mode & 0o077 == 0, "names of private models are in it"

    edge.stop()
    file.write_bytes(file.read_bytes()[:-1])
    edge.start()
    assert usage(edge) == {}
    assert "begun anew" in edge.text()
    fetch(url)
    assert usage(edge)[MODEL].requests == 1


def test_what_is_counted_and_who_sees_whose_name(lab: Lab, tmp_path: Path) -> None:
    make_model(lab.folder / "model", width=64)
    for model, words in ((MODEL, ()), (SECRET, ("--private",)), ("acme/late", ())):
        lab.publish(lab.folder / "model", model, *words)
    origin = lab.origin()
    edge = lab.edge(origin, ref_lifetime="3600")
    url, token = f"{edge.url}/shards/{MODEL}", lab.token(f"{SECRET}:read")
    get_json(f"{edge.url}/models/acme/late")

    def ask(url: str, method: str = "GET", **fields: str) -> tuple[int, Mapping[str, str]]:
        named = {name.replace("_", "-"): value for name, value in fields.items()}
        asked = urllib.request.Request(url, headers=named, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=20) as answer:
                return answer.status, {**answer.headers, "size": str(len(answer.read()))}
        except urllib.error.HTTPError as error:
            with error:
                return error.code, {}

    size = int(ask(url)[1]["size"])
    wait_settled(edge)
    cold = usage(edge)[MODEL]
    assert (cold.served, cold.link, cold.requests, cold.hits, sum(cold.ready)) == (size, size, 1, 0, 1)
    assert ask(url, Range="bytes=10-109")[0] == 206
    code, fields = ask(url, "HEAD")
    assert code == 200
    assert ask(url, If_None_Match=fields["ETag"])[0] == 304
    assert ask(url, Nearshard_Hop="peer")[0] == 200
    assert ask(f"{edge.url}/shards/acme/nothing")[0] == 404
    warm = usage(edge)
    assert warm.keys() == {MODEL}, "not what there is not"
    assert (warm[MODEL].served, warm[MODEL].requests, warm[MODEL].hits) == (size + 100, 2, 1)
    assert sum(warm[MODEL].ready) == 1, "a part says nothing of the time of the whole"

    assert ask(f"{edge.url}/shards/{SECRET}", Authorization=f"Bearer {token}")[0] == 200
    origin.kill()
    assert ask(f"{edge.url}/shards/acme/late")[0] == 502
    assert usage(edge)["acme/late"].errors == 1
    everything = usage(edge, lab.token("*/*:admin"))
    assert everything[SECRET].served == everything[SECRET].link == size
    for other in ("", token, lab.token("acme/*:admin"), lab.token("*/*:enroll")):
        shown = usage(edge, other)
        assert shown.keys() == {MODEL, "acme/late", PRIVATE} and shown[PRIVATE] == everything[SECRET]
    today = edge.status()["usage"]
    assert today["day"] == datetime.now(UTC).date().isoformat()
    assert today["models"] == {model: one.counts() for model, one in usage(edge).items()}
    assert usage(edge, query="?since=2999-01-01") == {}
    for query in ("?since=", "?since=yesterday", "?since=2026-02-30"):
        assert ask(f"{edge.url}/usage{query}")[0] == 400
    assert ask(f"{edge.url}/usage", Authorization="Bearer a.b.c")[0] == 401
