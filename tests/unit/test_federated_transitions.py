"""The states of a round, and what its record alone decides: pure, so every case is looked at."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from origin.federated.admission import Duplicate, Takes, check_site, judge, reference_norm, usual_norm
from origin.federated.candidate import decode_floats, encode_floats, write_tasks
from origin.federated.documents import Entry, Noise, Round, Site
from origin.federated.transitions import FINAL, TABLE, Event, State, after
from origin.model_dir import read_tasks
from shared.digest import digest_of
from shared.errors import Conflict, RequestError
from shared.federated import Statement

NOW = datetime(2026, 1, 2, tzinfo=UTC)
BASE, OLDER, BODY = digest_of(b"base"), digest_of(b"older"), digest_of(b"body")
STATEMENT = Statement("berlin", "acme/tiny", 3, BASE, bytes(16), NOW, 512, BODY, 99, ("int4",))
SITES = ("berlin", "lima", "oslo")
OPEN = Round(
    rule="nnm",
    model="acme/tiny",
    number=3,
    base=BASE,
    to_ref="canary",
    min_sites=2,
    max_bytes=100,
    opened=NOW - timedelta(minutes=1),
    deadline=NOW + timedelta(hours=1),
    sites=SITES,
    late=0.5,
)
LAST = OPEN.model_copy(update={"number": 2, "base": OLDER, "state": State.PUBLISHED})


def entry(body: bytes, number: int, norm: float = 1.0) -> Entry:
    return Entry(digest=digest_of(body), size=9, examples=1, norm=norm, round=number, path="", time="")


def with_update(known: Round, found: Entry) -> Round:
    return known.model_copy(update={"updates": {"berlin": found}})


def test_every_state_is_reached_and_left_or_final() -> None:
    assert {State.PUBLISHED, State.EXPIRED, State.DISCARDED} == FINAL
    reached, todo = {State.OPEN}, [State.OPEN]
    while todo:
        before = todo.pop()
        found = {then for (state, _), then in TABLE.items() if state is before} - reached
        reached |= found
        todo += found
    assert reached == set(State)
    for event in Event:
        for state in State:
            if (state, event) not in TABLE:
                with pytest.raises(Conflict) as caught:
                    after(state, event)
                assert caught.value.error_code == "round_state"


def test_nothing_is_published_that_was_not_noted_as_a_candidate() -> None:
    before = {state for (state, _), then in TABLE.items() if then is State.PUBLISHED}
    assert before == {State.PUBLISHING}
    assert {state for (state, _), then in TABLE.items() if then is State.PUBLISHING} == {State.AGGREGATED, State.HELD}
    assert (State.PUBLISHING, Event.DISCARD) not in TABLE, "it may have been signed"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"site": "rome"}, "not_in_round"),
        ({"base": OLDER}, "stale_round"),
        ({"round": 4}, "stale_round"),
        ({"round": 1, "base": OLDER}, "stale_round"),
        ({"round": 2}, "stale_round"),
        ({"size": 101}, "too_large"),
        ({"codecs": ("sign",)}, "bad_update"),
    ],
)
def test_statements_that_are_not_taken(changes: dict[str, object], code: str) -> None:
    current = OPEN.model_copy(update={"codecs": ("int*",)})
    assert isinstance(judge(STATEMENT, [current, LAST], NOW), Takes)
    with pytest.raises(RequestError) as caught:
        judge(replace(STATEMENT, **changes), [current, LAST], NOW)  # type: ignore[arg-type]
    assert caught.value.error_code == code


def test_late_ones_count_once_wherever_they_were_counted() -> None:
    late = replace(STATEMENT, round=2, base=OLDER)
    assert judge(late, [OPEN, LAST], NOW) == Takes(OPEN)
    for rounds in ([with_update(OPEN, entry(b"body", 2)), LAST], [OPEN, with_update(LAST, entry(b"body", 2))]):
        assert judge(late, rounds, NOW) == Duplicate()
    for rounds in ([with_update(OPEN, entry(b"x", 2)), LAST], [OPEN, with_update(LAST, entry(b"x", 2))]):
        with pytest.raises(RequestError) as caught:
            judge(late, rounds, NOW)
        assert caught.value.error_code == "other_update"
    with_late = [with_update(OPEN, entry(b"x", 2)), LAST]
    assert judge(STATEMENT, with_late, NOW) == Takes(with_late[0]), "its own of this round takes the place"
    with pytest.raises(RequestError):
        judge(late, [OPEN.model_copy(update={"late": 0.0}), LAST], NOW)


def test_a_round_ends_at_its_deadline_to_the_second() -> None:
    judge(STATEMENT, [OPEN], OPEN.deadline - timedelta(seconds=1))
    with pytest.raises(RequestError) as caught:
        judge(STATEMENT, [OPEN], OPEN.deadline)
    assert caught.value.error_code == "stale_round"


def test_who_is_in_quarantine_or_of_another_time() -> None:
    check_site(STATEMENT, Site(key=""), NOW + timedelta(seconds=300))
    for site, at, code in (
        (Site(key="", quarantined=True), NOW, "quarantined"),
        (Site(key=""), NOW + timedelta(seconds=301), "clock_skew"),
        (Site(key=""), NOW - timedelta(seconds=301), "clock_skew"),
    ):
        with pytest.raises(RequestError) as caught:
            check_site(STATEMENT, site, at)
        assert caught.value.error_code == code
        assert caught.value.status == (403 if code == "quarantined" else 401)


def test_the_first_to_come_do_not_decide_what_is_usual() -> None:
    assert usual_norm([1e-9, 1e-9, 1, 1], 10) is None, "2 of 10 may be hostile: 4 say nothing"
    assert usual_norm([1e-9, 1e-9, 1, 1, 1], 10) == 1
    assert usual_norm([1, 1], 5) is None and usual_norm([1, 1, 1], 5) == 1
    noise = Noise(multiplier=1, clip=0.25, delta=1e-5)
    assert reference_norm(OPEN.model_copy(update={"noise": noise})) == 0.25


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_floats_of_every_type_come_back_rounded_to_the_nearest(dtype: str) -> None:
    import numpy as np

    exact = np.array([0.0, -1.5, 2.0**-10, 384.0], np.float32)
    assert (decode_floats(encode_floats(exact, dtype), dtype) == exact).all()
    between = np.array([1 + 2.0**-8 + 2.0**-12], np.float32)
    expected = {"BF16": 1 + 2.0**-7, "F16": 1 + 2.0**-8}.get(dtype, float(between[0]))
    assert decode_floats(encode_floats(between, dtype), dtype)[0] == expected
    assert decode_floats(encode_floats(np.array([1 + 2.0**-8], np.float32), "BF16"), "BF16")[0] == 1.0, "ties to even"
    for wrong in (np.nan, np.inf, *([3.4e38] if dtype in ("F16", "BF16") else [])):
        with pytest.raises(OverflowError):
            encode_floats(np.array([wrong], np.float32), dtype)


def test_tasks_are_written_as_they_are_read(tmp_path: object) -> None:
    from pathlib import Path

    file = Path(str(tmp_path)) / "tasks.toml"
    tasks = {
        "a.b": {"description": 'with "quotes" and ü\n', "files": ["x[1].json"], "tensors": ["w[0]*", "v"]},
        "c": {"description": "", "files": [], "file": "model.gguf"},
        "gone": {"description": "", "files": [], "tensors": ["lora"]},
    }
    write_tasks(file, tasks, ["lora"])
    found, _ = read_tasks(file)
    assert [(spec.name, spec.file, spec.description) for spec in found] == [
        ("a.b", "", 'with "quotes" and ü\n'),
        ("c", "model.gguf", ""),
    ]
    assert found[0].tensors == ("w[[]0][*]", "v") and found[0].files == ("x[[]1].json",)
