"""The enrolment file, and what a node's word is worth by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.enrolment_file import EnrolmentFile
from shared import log
from shared.enrolment import (
    HEARTBEAT,
    Enrolled,
    change_enrolment,
    check_proven,
    enrolment_line,
    is_loopback,
    parse_enrolment,
    parse_signature,
    parse_told,
    sign,
)
from shared.errors import DecodeError, RequestError
from shared.keys import NodeKey
from shared.node import Node

KEY, OTHER = NodeKey.generate(), NodeKey.generate()
NODE = Node("a", "http://10.0.0.1:8720", "north", 2)
ENROLLED = {"a": Enrolled(NODE, KEY.public), "b": Enrolled(Node("b", NODE.url, "north", 1), OTHER.public)}
SAID: dict[str, Any] = {**NODE.record(), "boot": "b0", "sequence": 1, "nonce": "0a"}

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
nodes = st.builds(
    lambda name, host, port, region, weight, key: Enrolled(
        Node(name, f"http://{host}:{port}", region, weight), key.public
    ),
    names,
    st.sampled_from(["10.0.0.1", "edge.example", "[2001:db8::1]"]),
    st.integers(1, 65535),
    names,
    st.integers(1, 10),
    st.builds(NodeKey.generate),
)


@given(st.lists(nodes, unique_by=lambda known: known.node.id, max_size=5), nodes)
def test_a_line_is_added_replaced_and_removed_and_others_stay(before: list[Enrolled], new: Enrolled) -> None:
    text = "# ours\n" + "".join(f"{enrolment_line(known)}\n" for known in before)
    expected = {known.node.id: known for known in before}
    assert parse_enrolment(text) == (expected, {})
    changed = change_enrolment(text, new.node.id, new)
    assert parse_enrolment(changed) == ({**expected, new.node.id: new}, {})
    removed = change_enrolment(changed, new.node.id, None)
    assert parse_enrolment(removed)[0] == {name: known for name, known in expected.items() if name != new.node.id}
    assert removed.startswith("# ours\n")


def test_a_line_goes_above_tables() -> None:
    table = f'[b]\nurl = "http://b:1"\nregion = "north"\nkey = "{OTHER.public.hex()}"\n'
    nodes, wrong = parse_enrolment(change_enrolment(table, "a", ENROLLED["a"]))
    assert nodes.keys() == {"a", "b"} and not wrong
    with pytest.raises(RequestError):
        change_enrolment(table, "b", None)


@pytest.mark.parametrize(
    "text", ["a = ", "a = {}\na = {}", "\0", "x" * 100, "a = " + "[" * 10_000, "a = " + "9" * 5000]
)
def test_what_is_not_toml_is_refused_as_a_whole(text: str) -> None:
    with pytest.raises(DecodeError):
        parse_enrolment(text)


@pytest.mark.parametrize(
    "change",
    [
        {"key": None}, {"key": 7}, {"key": ""}, {"key": "01" + "00" * 31}, {"key": "AB" * 32}, {"url": "file:///x"},
        {"url": "http://169.254.169.254"}, {"url": None}, {"region": "NORTH"}, {"weight": 0}, {"weight": 11},
        {"weight": "1"}, {"weight": True}, {"secret": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_node_that_is_not_acceptable_is_out_and_others_are_in(change: dict[str, Any]) -> None:
    record: dict[str, Any] = {"url": NODE.url, "region": "north", "weight": 1, "key": KEY.public.hex()} | change
    values = ", ".join(f"{key} = {_toml(value)}" for key, value in record.items() if value is not None)
    nodes, wrong = parse_enrolment(f"a = {{ {values} }}\n{enrolment_line(ENROLLED['b'])}\n'../x' = 1\n")
    assert nodes == {"b": ENROLLED["b"]} and wrong.keys() == {"a", "../x"}


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_a_signed_word_of_an_enrolled_node_is_proven() -> None:
    body, signature = sign(KEY, HEARTBEAT, SAID)
    told = parse_told("a", body, parse_signature(signature))
    assert told.node == NODE and (told.boot, told.sequence, told.nonce) == ("b0", 1, "0a")
    check_proven(told, ENROLLED)


@pytest.mark.parametrize(
    ("change", "key", "code"),
    [
        ({}, OTHER, "bad_signature"),
        ({"url": "http://10.0.0.2:8720"}, KEY, "not_as_enrolled"),
        ({"url": "http://10.0.0.1:8721"}, KEY, "not_as_enrolled"),
        ({"region": "south"}, KEY, "not_as_enrolled"),
        ({"weight": 3}, KEY, "not_as_enrolled"),
        ({"id": "b"}, KEY, "bad_node"),
        ({"url": "http://169.254.169.254"}, KEY, "bad_node"),
        ({"url": "file:///etc/passwd"}, KEY, "bad_node"),
        ({"region": 7}, KEY, "bad_node"),
        ({"sequence": -1}, KEY, "bad_node"),
        ({"sequence": 2**52}, KEY, "bad_node"),
        ({"sequence": "1"}, KEY, "bad_node"),
        ({"sequence": True}, KEY, "bad_node"),
        ({"boot": "x y"}, KEY, "bad_node"),
        ({"boot": "0" * 33}, KEY, "bad_node"),
        ({"nonce": 7}, KEY, "bad_node"),
        ({"in_flight": -1}, KEY, "bad_node"),
        ({"pad": "x" * 20_000}, KEY, "too_large"),
    ],
    ids=range(18),
)
def test_what_is_signed_by_another_or_is_not_as_enrolled_is_refused(
    change: dict[str, Any], key: NodeKey, code: str
) -> None:
    body, signature = sign(key, HEARTBEAT, {**SAID, **change})
    with pytest.raises(RequestError) as refused:
        check_proven(parse_told("a", body, parse_signature(signature)), ENROLLED)
    assert refused.value.error_code == code


def test_less_weight_than_enrolled_is_the_nodes_own_choice() -> None:
    body, signature = sign(KEY, HEARTBEAT, {**SAID, "weight": 1})
    told = parse_told("a", body, parse_signature(signature))
    check_proven(told, ENROLLED)
    assert told.node.weight == 1


def test_nobody_else_is_enrolled() -> None:
    body, signature = sign(KEY, HEARTBEAT, {**SAID, "id": "c"})
    with pytest.raises(RequestError) as refused:
        check_proven(parse_told("c", body, parse_signature(signature)), ENROLLED)
    assert refused.value.error_code == "not_enrolled"


@pytest.mark.parametrize("field", ["", "0" * 127, "0" * 129, "A" * 128, "g" * 128, "0" * 128 + "\n", "é" * 128])
def test_a_signature_has_one_spelling(field: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_signature(field)
    assert refused.value.status == 401


@given(st.binary(max_size=200))
def test_any_bytes_are_a_word_or_an_error_of_theirs(body: bytes) -> None:
    try:
        parse_told("a", body)
    except RequestError as error:
        assert 400 <= error.status < 500


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("http://127.0.0.1:1", True), ("http://127.9.9.9", True), ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("http://[::ffff:127.0.0.1]:1", True), ("http://10.0.0.1:1", False), ("http://[::ffff:10.0.0.1]", False),
        ("http://127.0.0.1.example", False), ("http://localhost.example", False), ("http://[2001:db8::1]", False),
    ],
)  # fmt: skip
def test_without_enrolment_only_loopback_may_join(url: str, own: bool) -> None:
    assert is_loopback(url) == own
    told = parse_told("x", f'{{"url":"{url}","region":"north"}}'.encode())
    if own:
        check_proven(told, None)
    else:
        with pytest.raises(RequestError) as refused:
            check_proven(told, None)
        assert refused.value.error_code == "not_enrolled"


async def test_an_empty_file_is_one_that_is_being_written(tmp_path: Path) -> None:
    """An editor empties a file and then writes it: a router that looks in between throws nobody out."""
    file = tmp_path / "nodes.toml"
    node = Enrolled(NODE, KEY.public)
    file.write_text(change_enrolment("", NODE.id, node))
    enrolment = EnrolmentFile(file, log.get("test"))
    file.write_text("")
    assert not await enrolment.changed()
    assert enrolment.nodes == {NODE.id: node} and "cannot be read" in enrolment.trouble
    file.write_text(change_enrolment(change_enrolment("", NODE.id, node), NODE.id, None))
    assert await enrolment.changed()
    assert not enrolment.nodes and not enrolment.trouble
