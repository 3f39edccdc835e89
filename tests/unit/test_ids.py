"""Names and task ids: one strict spelling each, and a way back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.digest import digest_of
from shared.errors import BadId
from shared.ids import (
    MAX_MODEL,
    MAX_NAME,
    TaskId,
    as_revision,
    is_revision,
    parse_model,
    parse_name,
    parse_ref,
    parse_ref_or_revision,
    parse_task_id,
)
from tests.unit.strategies import quick, task_ids

REVISION = digest_of(b"")
NOT_WORDS = [
    "", "..", ".", "-a", "_a", ".a", "A", "ä", "a b", " a", "a ", "a\n", "a\0", "a\r\nb", "a\\b", "a%2fb", "a?b", "a#b",
    "\u0660", "\uff41", "a" * 10_240,
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "task_id"),
    [
        ("acme/minilm", TaskId("acme/minilm", "all", "main")),
        ("acme/minilm:embed-3l", TaskId("acme/minilm", "embed-3l", "main")),
        ("acme/minilm@v2", TaskId("acme/minilm", "all", "v2")),
        ("acme/minilm:embed-3l@v2", TaskId("acme/minilm", "embed-3l", "v2")),
        (f"acme/minilm@{REVISION}", TaskId("acme/minilm", "all", REVISION)),
        ("0/0:0@0", TaskId("0/0", "0", "0")),
        ("a.b_c-d/e..f:g.h@i", TaskId("a.b_c-d/e..f", "g.h", "i")),
    ],
)
def test_a_task_id_says_model_task_and_ref(text: str, task_id: TaskId) -> None:
    assert parse_task_id(text) == task_id


@quick
@given(task_ids)
def test_a_task_id_that_is_written_out_is_read_back(task_id: TaskId) -> None:
    assert parse_task_id(str(task_id)) == task_id


@quick
@given(task_ids, task_ids)
def test_the_ring_key_leaves_out_the_ref_only(one: TaskId, other: TaskId) -> None:
    assert TaskId(one.model, one.task, other.ref).ring_key == one.ring_key
    assert (one.ring_key == other.ring_key) == ((one.model, one.task) == (other.model, other.task))


@pytest.mark.parametrize(
    "text",
    [
        "", "acme", "acme/", "/minilm", "acme/minilm/x", "acme//minilm", "acme/minilm:", "acme/minilm@",
        "acme/minilm:@v2", "acme/minilm:a:b", "acme/minilm@v1@v2", "acme/minilm@v1:a", "../../etc/passwd", "acme/..",
        "Acme/minilm", "acme/minilm:Embed", "acme/minilm@V2", f"acme/minilm@{REVISION.upper()}",
        f"acme/minilm@{REVISION[:-1]}", f"acme/minilm@{REVISION}0",
        f"acme/minilm@md5:{REVISION[7:]}", f"acme/minilm:{REVISION}", "acme/minilm\n",
        "acme/minilm%00", "acme/mini\0lm", "a" * 10_240, "a/" + "b" * 10_240,
    ],
)  # fmt: skip
def test_any_other_spelling_of_a_task_id_is_a_bad_id(text: str) -> None:
    with pytest.raises(BadId):
        parse_task_id(text)


@pytest.mark.parametrize("text", NOT_WORDS)
@pytest.mark.parametrize("parse", [parse_name, parse_ref, parse_ref_or_revision])
def test_a_name_is_one_lower_case_word(parse: Callable[[str], str], text: str) -> None:
    with pytest.raises(BadId):
        parse(text)


@pytest.mark.parametrize("text", NOT_WORDS)
def test_a_model_is_two_lower_case_words(text: str) -> None:
    for model in (f"{text}/a", f"a/{text}", text):
        with pytest.raises(BadId):
            parse_model(model)


def test_names_have_an_end() -> None:
    assert parse_name("a" * MAX_NAME)
    assert parse_model("a/" + "b" * (MAX_MODEL - 2))
    with pytest.raises(BadId):
        parse_name("a" * (MAX_NAME + 1))
    with pytest.raises(BadId):
        parse_model("a/" + "b" * (MAX_MODEL - 1))


@pytest.mark.parametrize("length", [40, 64])
def test_a_ref_cannot_look_like_a_commit(length: int) -> None:
    with pytest.raises(BadId):
        parse_ref("0a" * (length // 2))
    assert parse_ref("0a" * (length // 2 - 1))


def test_only_a_digest_is_a_revision() -> None:
    assert is_revision(parse_ref_or_revision(REVISION))
    assert as_revision(REVISION) == REVISION
    assert not is_revision(parse_ref_or_revision("sha256"))


@pytest.mark.parametrize("parse", [parse_model, parse_name, parse_ref, parse_ref_or_revision])
@quick
@given(text=st.text() | st.text("ab01.-_/:@", max_size=12))
def test_any_text_is_a_name_or_a_bad_id(parse: Callable[[str], str], text: str) -> None:
    with suppress(BadId):
        assert parse(text) == text


@quick
@given(st.text() | st.text("ab01.-_/:@", max_size=12))
def test_any_text_is_a_task_id_or_a_bad_id(text: str) -> None:
    try:
        task_id = parse_task_id(text)
    except BadId:
        return
    assert parse_task_id(str(task_id)) == task_id
    assert str(task_id).startswith(text.partition("@")[0])
