"""What is made of nodes' words, of a reader's languages, and of the log, for those who look."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.dashboard import LANGUAGES, language, page, wants_page
from router.overview import MAX_MODELS, Report, Seen, network, order, parse_report
from shared.log import MAX_RECENT, Recent
from shared.node import Node
from shared.ring import VNODES, Ring, place_of
from shared.usage import Usage
from tests.unit.strategies import quick

FOLDER = Path(__file__).parents[2] / "router" / "dashboard"
WORDS = json.loads((FOLDER / "words.json").read_text())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
PARTS = ("sent_bytes", "upstream_bytes", "fills", "memory", "disk", "usage", "errors")


def counts(served: int) -> dict[str, int]:
    """Of a model, as a node tells them."""
    return {**Usage(served=served).counts()}


@quick
@given(JSON | st.fixed_dictionaries({}, optional=dict.fromkeys(PARTS, JSON)))
def test_whatever_a_node_says_is_a_report(document: object) -> None:
    report = parse_report(document)
    told = {"in_flight": 0, "draining": False, "load": 0.0, "health": {"ejected": False, "failures": 0}}
    json.dumps(network([Seen(Node("a", "http://a", "r", 1), told, report=report)], report.day, 10), allow_nan=False)


def test_a_node_cannot_fill_memory_with_models() -> None:
    models = {f"acme/m{n}": counts(n) for n in range(1000)} | {"no model!": counts(7), "": counts(1)}
    report = parse_report({"usage": {"day": "2026-01-31", "models": models}})
    assert len(report.models) == MAX_MODELS + 1 and next(iter(report.models)) == "acme/m999"
    assert report.usage.served == sum(range(1000)) + 1  # none is lost but what is no model


def seen(node: str, region: str, told: Mapping[str, Any] | None, served: int | None = None) -> Seen:
    """A node that served so much of acme/llm today."""
    report = None if served is None else Report(day="today", models={"acme/llm": Usage(served=served)})
    return Seen(Node(node, f"http://{node}", region, 1), told, report=report)


def told(*, ejected: bool = False, failures: int = 0, draining: bool = False) -> dict[str, Any]:
    """As the selection describes a node."""
    health = {"ejected": ejected, "failures": failures}
    return {"in_flight": 1, "draining": draining, "load": 0.0, "health": health}


@pytest.mark.parametrize(
    ("nodes", "state"),
    [
        ([told(), told(draining=True)], "well"),
        ([told(), told(failures=1)], "impaired"),
        ([told(), None], "impaired"),
        ([told(ejected=True), None], "lost"),
    ],
)
def test_how_a_region_is(nodes: list[Mapping[str, Any] | None], state: str) -> None:
    document = network([seen(f"n{n}", "r", one, 10) for n, one in enumerate(nodes)], "today", 10)
    assert document["regions"][0]["state"] == state
    assert document["total"]["today"]["served"] == 10 * len(nodes)  # also of those that are gone by now


def test_where_not_all_are_shown_those_in_trouble_are() -> None:
    nodes = [seen(f"n{n}", "r", told(), 1) for n in range(9)] + [seen("ill", "s", told(ejected=True))]
    assert order(nodes)[0].node.id == "ill"
    document = network(nodes, "today", 3)
    assert [node["id"] for node in document["nodes"]] == ["n0", "n1", "ill"]
    assert (document["left_off"], document["total"]["nodes"], document["total"]["known"]) == (7, 10, 9)
    assert network(nodes, "tomorrow", 3)["total"]["today"] is None


def test_shares_are_what_keys_find() -> None:
    ring = Ring({"a": 1, "b": 2, "c": 1})
    shares = ring.shares()
    assert sum(shares.values()) == pytest.approx(1) and len(ring.words) == 4 * VNODES
    found = [ring.owners_at(place_of(str(n)), 1)[0] for n in range(4000)]
    for name, share in shares.items():
        assert share == pytest.approx(found.count(name) / 4000, abs=0.03)
    assert Ring({}).shares() == {}


@pytest.mark.parametrize(
    ("accepted", "code"),
    [("", "en"), ("zh", "zh"), ("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("en-GB,zh;q=0.9", "en"), ("de,fr", "en"),
     ("en;q=0.2, zh-TW;q=0.3", "zh"), ("zh;q=0", "en"), (";;q=x,\xff", "en"), ("*", "en")],
)  # fmt: skip
def test_the_language_that_is_read(accepted: str, code: str) -> None:
    assert language(accepted) == code


def test_only_who_asks_for_html_gets_html() -> None:
    assert wants_page("text/html") and wants_page("application/json, Text/HTML;q=0.9")
    assert not any(map(wants_page, ("", "*/*", "text/*", "application/json", "text/htmlx")))


def test_every_word_is_in_both_languages_and_used() -> None:
    assert all(set(told) == set(LANGUAGES) and all(told.values()) for told in WORDS.values())
    template, script = (FOLDER / "index.html").read_text(), (FOLDER / "app.js").read_text()
    for code in LANGUAGES:
        assert "{{" not in page(template, WORDS, code)
    named = set(re.findall(r"\{\{([a-z_]+)\}\}", template)) - {"lang", "other_lang"}
    quoted = set(re.findall(r'"([a-z_]+)"', script))
    called = set(re.findall(r't\("([a-z_]+)"', script)) | set(re.findall(r'(?:figure|cell)\("([a-z_]+)"', script))
    assert called <= WORDS.keys()
    assert {word for word in WORDS if not word.startswith("round_")} - named - quoted == STATES - quoted
    gaps = {name: [sorted(re.findall(r"\{\w+\}", told[code])) for code in LANGUAGES] for name, told in WORDS.items()}
    assert all(one == other for one, other in gaps.values())


STATES = {"well", "failing", "ejected", "draining", "away", "lost", "impaired", "empty"}
"""Words that are looked up by a node's or a region's state."""


def test_the_last_warnings_are_kept_and_nothing_of_them_that_not_all_may_see() -> None:
    now = iter(range(10_000))
    recent = Recent(lambda: next(now))
    for _ in range(3):
        recent(
            None, "", {"level": "warning", "event": "a source failed", "code": "busy", "path": "/shards/acme/secret"}
        )
    recent(None, "", {"level": "info", "event": "ready"})
    assert recent.kept() == [{"time": 2, "level": "warning", "count": 3, "event": "a source failed", "code": "busy"}]
    for n in range(1000):
        recent(None, "", {"level": "error", "event": "x" * 1000, "node": f"n{n}"})
    kept = recent.kept()
    assert len(kept) == MAX_RECENT and kept[0]["node"] == "n999" and len(kept[0]["event"]) == 200
