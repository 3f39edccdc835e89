"""A node's account and records of usage: nothing is lost or counted twice, whatever comes in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.account import PENDING, About, Account, Name
from edge_node.shard_key import shard_key
from shared.digest import digest_of
from shared.errors import DecodeError, NearshardError
from shared.manifest import Manifest
from shared.outcome import Outcome
from shared.usage import (
    BOUNDS,
    KEEP_DAYS,
    MAX_MODELS,
    NO_MODEL,
    OTHER,
    PRIVATE,
    Usage,
    as_document,
    day_of,
    from_numbers,
    parse_days,
    total,
)
from tests.unit.strategies import few, quick

SHARD, OWN = digest_of(b"shard"), digest_of(b"own")
counts = st.integers(0, 1 << 40)
usages = st.lists(counts, min_size=len(Usage().numbers()), max_size=len(Usage().numbers())).map(from_numbers)


class Days:
    """The day, in a test's hands."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> str:
        return day_of(self.now * 86_400)


def manifest(model: str = "acme/tiny") -> Manifest:
    return Manifest(model, {SHARD: 100}, {}, {})


@quick
@given(st.lists(usages, max_size=5), st.lists(usages, max_size=5))
def test_sums_do_not_depend_on_the_order(some: list[Usage], more: list[Usage]) -> None:
    assert total([*some, *more]) == total([*more, total(some)])


@quick
@given(st.lists(st.floats(0, 2000), min_size=1, max_size=50), st.floats(0.01, 1))
def test_a_quantile_is_in_the_class_of_the_time_that_it_is(times: list[float], share: float) -> None:
    usage = Usage()
    for seconds in times:
        usage.answered(1, seconds, hit=True)
    found = usage.quantile(share)
    rank = max(0, -(-len(times) * share // 1) - 1)
    time = sorted(times)[int(rank)]
    above = next((bound for bound in BOUNDS if time <= bound), BOUNDS[-1])
    below = max((bound for bound in BOUNDS if bound < time), default=0.0)
    assert found is not None and below <= found <= above
    assert Usage().quantile(share) is None


days = st.dictionaries(
    st.integers(0, 500).map(lambda number: day_of(number * 86_400)),
    st.dictionaries(st.sampled_from(["acme/a", "acme/b", NO_MODEL, OTHER, PRIVATE]), usages, max_size=3),
    max_size=4,
)


@few
@given(days)
def test_what_a_node_answers_is_read_as_it_was_meant(said: dict[str, dict[str, Usage]]) -> None:
    assert parse_days(as_document(said)) == said


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {"yesterday": {}},
        {"2026-1-1": {}},
        {"2026-01-01": []},
        {"2026-01-01": {"=cmd": Usage().counts() | {"ready": Usage().ready}}},
        {"2026-01-01": {"a/b": Usage().counts()}},
        {"2026-01-01": {"a/b": Usage().counts() | {"ready": [0]}}},
        {"2026-01-01": {"a/b": Usage().counts() | {"ready": [0.5] * len(Usage().ready)}}},
        {"2026-01-01": {"a/b": Usage().counts() | {"served": -1, "ready": Usage().ready}}},
        {day_of(number * 86_400): {} for number in range(KEEP_DAYS + 2)},
    ],
)
def test_what_is_no_usage_is_refused(document: object) -> None:
    with pytest.raises(DecodeError):
        parse_days(document)


def test_a_shard_is_counted_to_the_model_that_has_it() -> None:
    account = Account(Days())
    account.learn(manifest(), "")
    account.learn(manifest("acme/secret"), "acme/secret")  # the same bytes: to who asks in public, they are not its
    public, private, unknown = shard_key(SHARD), shard_key(OWN, "acme/secret"), shard_key(OWN)
    revision = manifest().revision
    assert account.model_of(public) == Name("acme/tiny", private=False)
    assert account.model_of(private) == Name("acme/secret", private=True)
    assert account.model_of(unknown).model == NO_MODEL
    assert account.model_of(unknown, "acme/other").model == NO_MODEL, "nobody has said that there is such a model"
    assert account.model_of(unknown, f"acme/tiny@{revision}").model == "acme/tiny"
    assert account.model_of(public, "not a model").model == "acme/tiny"

    account.claim(unknown, f"acme/other@{revision}")
    account.received(unknown, Outcome.FILL_ORIGIN, 5)
    assert account.unknown() == {"acme/other"}
    account.learn_public("acme/other")
    account.received(unknown, Outcome.FILL_PEER, 7)
    account.received(private, Outcome.FILL_PARENT, 11)
    account.saved(public, 13)
    account.pending(About.shard(public, "x" * 4000)).answered(17, 0.3, hit=True)
    _, models = account.today()
    assert models["acme/other"] == Usage(link=5, peers=7)
    assert models["acme/tiny"].counts() == Usage(saved=13, served=17, requests=1, hits=1).counts()
    assert models[PRIVATE].link == 11
    assert "acme/secret" not in models
    assert account.today(everything=True)[1]["acme/secret"].link == 11


@quick
@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3), st.integers(1, 1 << 40), st.booleans()), max_size=30))
def test_every_byte_is_in_one_day_also_after_restarts(steps: list[tuple[int, int, int, bool]]) -> None:
    """Days pass, clocks are set back, the node is started again: nothing is lost or twice."""
    days = Days()
    days.now = 20_000
    account, expected = Account(days), 0
    for passed, model, size, restart in steps:
        account.fold()
        days.now += passed
        account.pending(About(f"acme/m{model}", private=model == 3)).answered(size, None, hit=False)
        expected += size
        if restart:
            account.fold()
            kept = account.encode()
            account = Account(days)
            account.take_up(kept)
    kept_days = account.since("1970-01-01")
    assert sum(usage.served for day in kept_days.values() for usage in day.values()) == expected
    assert list(kept_days) == sorted(kept_days)


def test_an_account_is_bounded() -> None:
    days = Days()
    account = Account(days)
    for number in range(PENDING + 1):
        account.pending(About.shard(shard_key(digest_of(str(number).encode())))).served += 1
    assert account.today()[1] == {NO_MODEL: Usage(served=PENDING + 1)}
    for number in range(MAX_MODELS + 5):
        account.pending(About(f"acme/m{number}")).served += 1
    models = account.today()[1]
    assert len(models) == MAX_MODELS + 1
    assert models[OTHER].served == 6
    for _ in range(KEEP_DAYS + 10):
        days.now += 1
        account.pending(About("acme/tiny")).served += 1
        account.fold()
    assert len(account.since("1970-01-01")) == KEEP_DAYS
    again = Account(days)
    again.take_up(account.encode())
    assert again.since("1970-01-01") == account.since("1970-01-01")


@quick
@given(st.data())
def test_a_damaged_file_is_refused_and_changes_nothing(data: st.DataObject) -> None:
    account = Account(Days())
    account.pending(About("acme/tiny")).answered(100, 1.0, hit=False)
    account.fold()
    kept = bytearray(account.encode())
    if data.draw(st.booleans()):
        kept = kept[: data.draw(st.integers(0, len(kept) - 1))]
    else:
        kept[data.draw(st.integers(0, len(kept) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(NearshardError):
        account.take_up(bytes(kept))
    assert account.today()[1]["acme/tiny"].served == 100
