"""What the router gathers of its network, how it asks for it, and who is shown what."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from shared.enrolment import Enrolled, enrolment_line
from shared.keys import load_or_make_key
from shared.node import Node
from tests.browser.network import Said, seen, status, usage
from tests.e2e.test_routing import ask
from tests.harness import Lab, command, get_json, make_model, wait_until
from tests.scripted import Asked, Script, source

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


async def test_nodes_are_asked_seldom_however_many_look(lab: Lab) -> None:
    said: Said = {
        ("berlin", "b-1"): status({"acme/llm": usage(900, 100), "": usage(5, 5)}),
        ("berlin", "b-2"): status({"acme/llm": usage(600, 0, hits=0)}),
        ("lagos", "l-1"): b"\xff no status",
        ("oslo", "o-1"): {"usage": {"day": "2020-01-01", "models": {"acme/llm": usage(10**6, 1)}}},
    }
    async with seen(lab, said) as net:
        documents = await asyncio.gather(*(net.network() for _ in range(20)))
        assert [net.asked(node) for node in net.nodes] == [1, 1, 1, 1]
    assert all(document["total"]["known"] == 2 for document in documents), "who looks meanwhile waits, too"
    document = documents[0]
    today = {region["region"]: region["today"] for region in document["regions"]}
    told = [today["berlin"][name] for name in ("served", "link", "spared", "hit_ratio")]
    assert told == [1505, 105, 1400, 0.6]
    assert today["lagos"] is None and today["oslo"] is None  # what is not known is not nothing
    assert [node["trouble"] for node in document["nodes"]] == ["", "", "upstream_error", ""]
    assert sum(node["share"] for node in document["nodes"][:2]) == pytest.approx(1, abs=0.001)
    models = [(one["model"], one["served"], len(one["sites"])) for one in document["models"]]
    assert models == [("acme/llm", 1500, 1), ("other", 5, 1)]
    assert document["total"]["known"] == 2


async def test_a_node_that_stands_still_holds_up_nobody_for_long(lab: Lab) -> None:
    async def still(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        script.holding.set()
        await script.release.wait()

    async with seen(lab, {("berlin", "b-1"): b"", ("berlin", "b-2"): status({})}) as net:
        net.nodes["b-1"].acts = [still]
        looking = asyncio.create_task(net.network())
        await net.nodes["b-1"].holding.wait()
        assert ask(net.router, "GET", f"/blobs/sha256:{'0' * 64}").status == 307
        assert not looking.done()
        assert [node["trouble"] for node in (await looking)["nodes"]] == ["upstream_timeout", ""]


def test_the_page_is_for_browsers_and_asks_for_nothing_else(lab: Lab) -> None:
    router = lab.router("http://127.0.0.1:1")
    assert ask(router, "GET", "/").json()["code"] == "unknown_path"
    assert ask(router, "GET", "/", Accept="*/*").status == 404
    page = ask(router, "GET", "/", Accept=BROWSER, Accept_Language="de, zh-TW;q=0.8, en;q=0.3")
    assert (page.status, page.headers["Content-Language"]) == (200, "zh")
    assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    text = page.body.decode()
    assert not re.search(r"<script(?![^>]*src)|<style|style=|\son\w+=|https?://", text) and "{{" not in text
    for file in re.findall(r'(?:src|href)="(/dashboard/[^"]+)"', text):
        answer = ask(router, "GET", file)
        assert answer.status == 200 and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert ask(router, "GET", file, If_None_Match=answer.headers["ETag"]).status == 304
    for path in ("/dashboard/index.html", "/dashboard/%2e%2e/config.py", "/dashboard/"):
        assert ask(router, "GET", path).status == 404
    english = ask(router, "GET", "/?lang=en", Accept=BROWSER, Accept_Language="zh")
    assert english.headers["Content-Language"] == "en"
    cookie = english.headers["Set-Cookie"].partition(";")[0]
    kept = ask(router, "GET", "/", Accept=BROWSER, Cookie=cookie, Accept_Language="zh")
    assert kept.headers["Content-Language"] == "en"


def test_who_may_join_and_is_not_there_is_away(lab: Lab, tmp_path: Path) -> None:
    key = load_or_make_key(tmp_path / "gone.key")
    file = tmp_path / "nodes.toml"
    file.write_text(enrolment_line(Enrolled(Node("gone-1", "http://127.0.0.1:9", "south", 1), key.public)) + "\n")
    router = lab.router("http://127.0.0.1:1", enrolled=str(file))
    document = get_json(f"{router.url}/network")
    assert [(one["region"], one["state"]) for one in document["regions"]] == [("south", "lost")]
    assert [(one["id"], one["state"]) for one in document["nodes"]] == [("gone-1", "away")]
    shown = command("top", "--router", router.url).stdout
    assert "0 of 1 nodes up" in shown and "✕ lost" in shown and "○ away" in shown
    assert "○ away" in command("nodes", "--router", router.url).stdout
    assert json.loads(command("nodes", "--router", router.url, "--json").stdout)[0]["id"] == "gone-1"


async def test_federated_rounds_of_public_models_are_shown(lab: Lab, tmp_path: Path) -> None:
    """Of an origin before the real one, that has a round."""
    make_model(tmp_path / "model")
    lab.publish(tmp_path / "model")
    origin = lab.origin()
    opened = {"number": 7, "state": "open", "counted": 3, "sites": 5, "deadline": "2030-01-01T00:00:00+00:00"}
    past = {"number": 6, "state": "published", "counted": 4}
    answer = {"model": "acme/tiny", "open": opened, "last": [past, "junk"]}
    async with source(Script(blobs={"/federated/acme/tiny": json.dumps(answer).encode()})) as federated:
        router = lab.router(federated.url, origin)

        def rounds() -> object:
            return get_json(f"{router.url}/network")["federated"]

        found = await asyncio.to_thread(wait_until, rounds, "a round")
        assert found == [{"model": "acme/tiny", "open": opened, "last": [past]}]
        shown = await asyncio.to_thread(command, "top", "--router", router.url)
        assert "acme/tiny: round 7, 3 of 5 sites counted" in shown.stdout
