"""What nodes see of the revisions in a rollout: counted, told in few bytes, put together."""

from __future__ import annotations

from typing import Any

import pytest

from edge_node.canary import Canary
from router.exchange import moved
from shared.codec import encode_json
from shared.digest import Digest, digest_of
from shared.enrolment import MAX_BODY
from shared.errors import NotFound, RequestError, UpstreamError
from shared.node import State, parse_state
from shared.trials import MAX_TRIALS, Trial, by_site
from tests.clock import HandClock

OLD, NEW = digest_of(b"old"), digest_of(b"new")
MODEL = "acme/lm"


def test_requests_errors_and_times_are_counted_while_there_is_a_rollout() -> None:
    clock, on_trial = HandClock(), {MODEL: {OLD, NEW}}
    canary = Canary(clock, lambda model: on_trial.get(model, set()))

    def ask(revision: Digest, *, whole: bool = True, seconds: float = 1, error: Exception | None = None) -> None:
        with canary.counted(MODEL, revision, whole=whole):
            clock.now += seconds
            if error:
                raise error

    ask(OLD)
    ask(digest_of(b"an older one"))
    for seconds in (1, 3, 2):
        ask(NEW, seconds=seconds)
    ask(NEW, whole=False, seconds=99)
    for error in (UpstreamError("gone"), NotFound("no such file"), ConnectionResetError()):
        with pytest.raises(type(error)):
            ask(NEW, error=error)
    assert canary.trials() == sorted(
        [Trial(MODEL, OLD, 1, 0, 1000), Trial(MODEL, NEW, 7, 1, 2000)], key=lambda trial: trial.revision
    )
    assert canary.watches(MODEL) and not canary.watches("acme/other")
    on_trial.clear()
    assert canary.trials() == []


def test_a_node_tells_of_few_and_a_heartbeat_has_room_for_them() -> None:
    canary = Canary(HandClock(), lambda _: {OLD})
    for n in range(3 * MAX_TRIALS):
        with canary.counted(f"{'a' * 60}/{n:060d}", OLD, whole=True):
            pass
    state = State(trials=tuple(canary.trials()))
    assert len(state.trials) == MAX_TRIALS and len(encode_json(state.record())) < MAX_BODY // 2
    assert parse_state(state.record()) == state
    assert parse_state({"in_flight": 1}).trials == (), "of a node that knows nothing of them"


@pytest.mark.parametrize(
    "wrong",
    [
        None, {}, [1], [[]], [[MODEL, NEW, 1, 1]], [[MODEL, NEW, -1, 0, None]], [[MODEL, NEW, 1, True, None]],
        [[MODEL, NEW, 1, 0, float("nan")]], [[MODEL, NEW, 1, 0, "1"]], [["lm", NEW, 1, 0, 1]], [[MODEL, "x", 1, 0, 1]],
        [[MODEL, None, 1, 0, 1]], [[MODEL, NEW, 1, 0, 1]] * (MAX_TRIALS + 1),
    ],
)  # fmt: skip
def test_what_is_no_trial_is_refused(wrong: Any) -> None:
    with pytest.raises(RequestError):
        parse_state({"trials": wrong})


def test_nodes_of_a_site_are_put_together() -> None:
    told = [
        ("a", Trial(MODEL, NEW, 90, 1, 50.0)),
        ("a", Trial(MODEL, NEW, 10, 2, 900.0)),
        ("b", Trial(MODEL, OLD, 1, 0, None)),
    ]
    first, second = by_site(told)
    assert first == {"site": "a", "revision": NEW, "requests": 100, "errors": 3, "ready_p50_ms": 50.0, "nodes": 2}
    assert (second["site"], second["ready_p50_ms"]) == ("b", None)


def test_other_routers_hear_of_an_error_at_once_and_of_requests_by_the_quarter() -> None:
    before = State(trials=(Trial(MODEL, NEW, 100, 0, 5.0),))
    assert moved(State(), before) and moved(before, State(trials=(Trial(MODEL, NEW, 101, 1, 5.0),)))
    assert moved(before, State(trials=(Trial(MODEL, NEW, 150, 0, 5.0),)))
    assert not moved(before, State(trials=(Trial(MODEL, NEW, 110, 0, 9.0),)))
