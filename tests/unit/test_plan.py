"""Plans: what is built is what a client reads, and a hostile one costs time but never more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import codec
from shared.digest import Digest, digest_of
from shared.errors import BadId, RequestError, UpstreamError
from shared.ids import TaskId
from shared.layout import Layout, Slice
from shared.manifest import Delta, Manifest, Task
from shared.plan import JSON, MAX_HAVE, MSGPACK, build, decode, negotiate, parse_have
from tests.unit.strategies import quick, texts

A, B, C, UNUSED = (digest_of(letter) for letter in (b"a", b"b", b"c", b"unused"))
SHA = "ab" * 32
TASK = Task("embed", Layout(15, SHA, (Slice(B, 5, 10), Slice(A, 0, 5))), "model.safetensors", ("config.json",))
MANIFEST = Manifest(
    "acme/minilm",
    {A: 5, B: 20, C: 7, UNUSED: 1},
    {"config.json": Layout(12, SHA, (Slice(C, 0, 7), Slice(B, 0, 5))), "other": Layout(1, SHA, (Slice(UNUSED, 0, 1),))},
    {"embed": TASK},
)


def sources(digest: Digest) -> Sequence[str]:
    """Two nodes, in another order for another shard."""
    nodes = ["http://edge-1:8720", "https://edge-2"]
    return nodes if digest == A else nodes[::-1]


PLAN = build(MANIFEST, TASK, sources)


def test_a_plan_lists_each_shard_of_the_task_and_its_files_once() -> None:
    assert [(shard["digest"], shard["size"]) for shard in PLAN["shards"]] == [(B, 20), (A, 5), (C, 7)]


def test_a_plan_has_the_layouts_by_the_numbers_of_its_shards() -> None:
    assert PLAN["layout"] == {"size": 15, "sha256": SHA, "slices": [[0, 5, 10], [1, 0, 5]]}
    assert PLAN["files"] == [
        {"path": "config.json", "layout": {"size": 12, "sha256": SHA, "slices": [[2, 0, 7], [0, 0, 5]]}}
    ]


def test_a_plan_is_pinned_to_its_revision() -> None:
    assert PLAN["revision"] == MANIFEST.revision
    assert PLAN["task_id"] == f"acme/minilm:embed@{MANIFEST.revision}"


def test_a_client_reads_the_plan_that_was_built() -> None:
    plan = decode(codec.encode(PLAN))
    assert plan.task_id == TaskId("acme/minilm", "embed", MANIFEST.revision)
    assert plan.revision == MANIFEST.revision
    assert list(plan.urls) == [B, A, C]
    assert plan.urls[A] == (f"http://edge-1:8720/blobs/{A}", f"https://edge-2/blobs/{A}")
    assert plan.urls[B] == (f"https://edge-2/blobs/{B}", f"http://edge-1:8720/blobs/{B}")


OLD, OLDER, PARCEL, BEFORE, SMALL = (digest_of(word) for word in (b"old", b"older", b"parcel", b"before", b"small"))
NEXT = replace(
    MANIFEST,
    deltas=(Delta(B, PARCEL, (Slice(OLD, 0, 20),)), Delta(A, SMALL), Delta(OLD, BEFORE, (Slice(OLDER, 3, 9),))),
    others={OLD: 20, PARCEL: 4, BEFORE: 3, OLDER: 12, SMALL: 2},
)


@pytest.mark.parametrize(
    ("have", "steps"),
    [
        ((), {B: [], A: [SMALL], C: []}),
        ((OLD,), {B: [PARCEL], A: [SMALL], C: []}),
        ((OLDER, C), {B: [BEFORE, PARCEL], A: [SMALL], C: []}),
        ((A, B), {B: [], A: [], C: []}),
    ],
)
def test_a_plan_names_the_parcels_to_decode_in_order_for_who_has_what_they_are_upon(
    have: Sequence[Digest], steps: Mapping[Digest, Sequence[Digest]]
) -> None:
    plan = build(NEXT, TASK, sources, have=have, private=True)
    assert {shard["digest"]: [step["digest"] for step in shard["deltas"]] for shard in plan["shards"]} == steps
    assert list(decode(codec.encode(plan)).urls) == [B, A, C]
    for step in (step for shard in plan["shards"] for step in shard["deltas"]):
        assert step["size"] == NEXT.size_of(step["digest"])
        assert step["urls"][0].endswith(f"/models/acme/minilm/blobs/{step['digest']}")
        (delta,) = (delta for delta in NEXT.deltas if delta.parcel == step["digest"])
        assert step["target"] == delta.target
        assert step["base"] == [[part.digest, part.offset, part.length] for part in delta.base]


def test_what_a_client_has_is_named_by_revisions_and_not_by_many() -> None:
    assert parse_have([]) == () and parse_have([A, B, A]) == (A, B)
    for values in (["main"], [""], [A.upper()], [A + ","], [A] * (MAX_HAVE + 1)):
        with pytest.raises(BadId):
            parse_have(values)


def test_the_plan_is_the_same_in_json() -> None:
    assert codec.decode_json(codec.encode_json(PLAN)) == codec.decode(codec.encode(PLAN), 1 << 20)


def wire(*urls: object, **fields: object) -> bytes:
    """A plan of one shard, with something changed."""
    plan: dict[str, Any] = {"task_id": "a/b", "revision": A, "shards": [{"digest": B, "urls": list(urls)}]}
    return codec.encode(plan | fields)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://host/x", "gopher://host", "unix:/run/x", "data:,x", "javascript:1", "//host/x",
        "host/x", "/etc/passwd", "", " http://host/x", "http:/host", "https:host", "http://host/" + "a" * 2048,
        5, None, ["http://host"], b"http://host",
    ],
)  # fmt: skip
def test_anything_but_a_plain_web_url_is_dropped(url: object) -> None:
    assert decode(wire("http://good/x", url, "https://good/y")).urls[B] == ("http://good/x", "https://good/y")


@pytest.mark.parametrize("data", [b"", b"\xc1", b"[]", *map(codec.encode, ([], "text", None, 5, {}))])
def test_a_body_that_is_no_plan_is_the_mistake_of_its_source(data: bytes) -> None:
    with pytest.raises(UpstreamError):
        decode(data)


@pytest.mark.parametrize(
    "fields",
    [
        *({"task_id": value} for value in ("A/b", "../x", b"a/b", 5, None, ["a/b"])),
        *({"revision": value} for value in ("main", 5, None, [str(A)])),
        *({"shards": value} for value in (5, None, [5], ["text"])),
        {"shards": [{}]},
        {"shards": {"a": 1}},
        *({"shards": [{"digest": value, "urls": []}]} for value in ("md5:1", None, [A])),
        *({"shards": [{"digest": A, "urls": value}]} for value in (5, None)),
    ],
    ids=str,
)
def test_a_malformed_plan_is_the_mistake_of_its_source(fields: dict[str, object]) -> None:
    with pytest.raises(UpstreamError):
        decode(wire(**fields))


values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | texts | st.just(str(A)) | st.just("a/b:t@main"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["digest", "urls", "x"]), inner),
    max_leaves=6,
)


@quick
@given(st.fixed_dictionaries({}, optional={"task_id": values, "revision": values, "shards": values}) | values)
def test_any_value_is_a_plan_or_the_mistake_of_its_source(value: object) -> None:
    try:
        plan = decode(codec.encode(value))
    except UpstreamError:
        return
    assert all(url.startswith(("http://", "https://")) for urls in plan.urls.values() for url in urls)


BYTES = "application/octet-stream"
OFFERS = (BYTES, MSGPACK, JSON)


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        (None, BYTES),
        ("", BYTES),
        ("*/*", BYTES),
        ("application/*", BYTES),
        (BYTES, BYTES),
        (MSGPACK, MSGPACK),
        (JSON, JSON),
        (JSON.upper(), JSON),
        (f"{JSON}, {MSGPACK}", MSGPACK),  # as good to the client: our order
        (f"{JSON}, {MSGPACK};q=0.9", JSON),
        (f"{JSON};q=0.1, {MSGPACK} ; q=0.2", MSGPACK),
        (f"*/*, {MSGPACK}", MSGPACK),  # it took the trouble to name it
        (f"*/*;q=0.9, {MSGPACK};q=0.5", BYTES),
        (f"{BYTES};q=0, */*", MSGPACK),
        (f"*/*;q=0, {JSON}", JSON),
        (f"text/html, {JSON};q=0.001", JSON),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", BYTES),  # a browser
        (f"{JSON};q=bad, {MSGPACK}", MSGPACK),
        (f"{JSON};q=nan, {MSGPACK};q=0.1", MSGPACK),
        (f"{MSGPACK};version=1", MSGPACK),
    ],
)
def test_the_client_gets_what_it_likes_best(accept: str | None, answer: str) -> None:
    assert negotiate(accept, OFFERS) == answer


@pytest.mark.parametrize(
    "accept", ["text/html", "text/*", f"{BYTES};q=0", "*/*;q=0", "*/*;q=bad", "*/*;q=-1", ",", ";", "application", "*"]
)
def test_a_client_that_likes_nothing_of_ours_gets_406_and_the_list(accept: str) -> None:
    with pytest.raises(RequestError) as caught:
        negotiate(accept, OFFERS)
    assert (caught.value.status, caught.value.public) == (406, {"available": list(OFFERS)})


@quick
@given(st.text() | st.lists(st.sampled_from([*OFFERS, "*/*", ",", ";q=", "0.5", "x", " "])).map("".join))
def test_any_accept_is_answered_with_an_offer_or_406(accept: str) -> None:
    try:
        assert negotiate(accept, OFFERS) in OFFERS
    except RequestError as error:
        assert error.status == 406
