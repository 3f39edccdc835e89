"""The account of nodes, over real processes: what it says is what was moved, also after a kill; and who sees what."""

from __future__ import annotations

from pathlib import Path

from nearshard import SyncClient
from shared.usage import Usage, parse_days, total
from tests.e2e.test_region import fetch, settle
from tests.harness import Lab, Service, get_json, make_model, wait_nodes, wait_settled

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
