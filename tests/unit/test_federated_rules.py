"""The rules by themselves: what they compute, and how far hostile sites can move it."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from origin.federated.rules import (
    Rule,
    TooFewSites,
    clip_norm,
    exchanges,
    krum,
    mean,
    mixed_mean,
    neighbours,
    parse_rule,
    scale,
    trimmed_mean,
    weights,
)
from shared.errors import ConfigError
from shared.federated import accepts
from shared.updates.codecs import codec

Array = npt.NDArray[np.float32]
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, sites: int, hostile: int, size: int = 64) -> tuple[Array, Array]:
    """Honest arrays with some values in common, and hostile ones anywhere."""
    rng = np.random.default_rng(seed)
    honest = np.round(rng.normal(rng.normal(size=size), 1.0, (sites - hostile, size)), rng.integers(0, 8))
    bad = rng.normal(size=(hostile, 1)) * 10.0 ** rng.integers(-3, 30, (hostile, 1)) * rng.normal(size=(hostile, size))
    return honest.astype(np.float32), bad.astype(np.float32)


def shuffled(seed: int, *groups: Array) -> list[Array]:
    return list(np.random.default_rng(seed).permutation(np.concatenate(groups)))


# The network


@pytest.mark.parametrize("lanes", range(1, 11))
def test_the_network_leaves_out_the_smallest_and_largest(lanes: int) -> None:
    """A network that is right for all zeros and ones is right for anything (Knuth, 5.3.4, theorem Z)."""
    bits = np.array(list(itertools.product([0, 1], repeat=lanes)), np.float32).T
    for f in range((lanes - 1) // 2 + 1):
        expected = np.sort(bits, axis=0)[f : lanes - f]
        kept = trimmed_mean(list(bits), f).kept
        assert (np.sort(np.array(kept), axis=0) == expected).all(), f


def test_the_network_does_less_than_a_sort() -> None:
    """A sort of ten needs 29 exchanges, each of which makes two arrays."""
    assert sum(step.keeps_low + step.keeps_high for step in exchanges(10, 1)) <= 24
    assert sum(step.keeps_low + step.keeps_high for step in exchanges(10, 2)) <= 42
    assert exchanges(7, 0) == ()


# The rules


@given(SEEDS, st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_trimmed_mean_is_what_a_sort_gives(seed: int, sites: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(0, (sites - 1) // 2))
    honest, _ = draw(seed, sites, 0)
    combined = trimmed_mean(list(honest), f)
    expected = np.sort(honest, axis=0)[f : sites - f].mean(axis=0, dtype=np.float64)
    assert combined.values == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(combined.kept) == sites - 2 * f == Rule("trimmed", f).kept(sites)


@given(SEEDS, st.integers(3, 20), st.data())
@settings(max_examples=60, deadline=None)
def test_hostile_sites_move_the_trimmed_mean_within_its_bound(seed: int, sites: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(1, (sites - 1) // 2))
    honest, bad = draw(seed, sites, data.draw(st.integers(0, f)))
    values = shuffled(seed, honest, bad)
    ordered, kept = np.sort(honest, axis=0).astype(np.float64), sites - 2 * f
    slack = 1e-5 * np.abs(honest).max()
    found = trimmed_mean(values, f).values
    assert (found >= ordered[:kept].mean(axis=0) - slack).all()
    assert (found <= ordered[-kept:].mean(axis=0) + slack).all()
    shares = np.random.default_rng(seed).uniform(0.01, 100.0, sites)
    weighted = trimmed_mean(values, f, (shares / shares.sum()).tolist()).values
    assert (weighted >= ordered[0] - slack).all()
    assert (weighted <= ordered[-1] + slack).all()


@given(SEEDS, st.integers(3, 12))
@settings(max_examples=30, deadline=None)
def test_weights_go_with_their_values(seed: int, sites: int) -> None:
    f = (sites - 1) // 3
    values = np.random.default_rng(seed).permuted(np.tile(np.arange(sites), (64, 1)), axis=1).T.astype(np.float32)
    shares = np.random.default_rng(seed + 1).uniform(0.1, 1.0, sites)
    order = np.argsort(values, axis=0)[f : sites - f]
    expected = (np.take_along_axis(values, order, 0) * shares[order]).sum(axis=0) / shares[order].sum(axis=0)
    assert trimmed_mean(list(values), f, shares.tolist()).values == pytest.approx(expected, rel=1e-5)
    whole = (shares / shares.sum()).tolist()
    assert mean(list(values), whole).values == pytest.approx(whole @ values, rel=1e-5)


@given(SEEDS, st.integers(5, 16), st.data())
@settings(max_examples=60, deadline=None)
def test_hostile_sites_move_krum_within_its_bound(seed: int, sites: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(1, (sites - 3) // 2))
    hostile = data.draw(st.integers(0, f))
    honest, bad = (group.astype(np.float64) for group in draw(seed, sites, hostile))
    # Beside all honest ones, near them, and in one place: what goes unseen most easily.
    bad = np.where(data.draw(st.booleans()), honest.mean(axis=0) + bad / np.abs(bad).max(initial=1e-30) * 3, bad)
    values = np.concatenate([bad[:1].repeat(hostile, axis=0) if data.draw(st.booleans()) else bad, honest])
    chosen = krum(np.square(values[:, None] - values[None]).sum(axis=2), f)
    assert len(chosen) == sites - f == Rule("krum", f).kept(sites)
    apart = np.linalg.norm(honest[:, None] - honest[None], axis=2).max()
    bound = (1 + np.sqrt((sites - f - 2) / (sites - 2 * f - 1))) * apart
    assert np.linalg.norm(values[chosen].mean(axis=0) - honest, axis=1).max() <= bound * (1 + 1e-6)


@given(SEEDS, st.integers(3, 16), st.data())
@settings(max_examples=60, deadline=None)
def test_hostile_sites_move_mixed_neighbours_within_their_bound(seed: int, sites: int, data: st.DataObject) -> None:
    f = data.draw(st.integers(1, (sites - 1) // 2))
    hostile = data.draw(st.integers(0, f))
    honest, bad = draw(seed, sites, hostile)
    # Beside all honest ones, near them, and in one place: what goes unseen most easily.
    bad = np.where(data.draw(st.booleans()), honest.mean(axis=0) + bad / np.abs(bad).max(initial=1e-30) * 3, bad)
    values = np.concatenate([bad[:1].repeat(hostile, axis=0) if data.draw(st.booleans()) else bad, honest])
    wide = values.astype(np.float64)
    near = neighbours(np.square(wide[:, None] - wide[None]).sum(axis=2), f)
    assert all(len(chosen) == sites - f and site in chosen for site, chosen in enumerate(near))
    shares = np.random.default_rng(seed).uniform(0.1, 10.0, sites) if data.draw(st.booleans()) else np.ones(sites)
    shares /= shares.sum()
    means = np.stack([np.average(wide[near[site]], axis=0, weights=shares[near[site]]) for site in range(sites)])
    honest_means = means[hostile:]
    apart = np.linalg.norm(wide[hostile:, None] - wide[None, hostile:], axis=2).max()
    assert np.linalg.norm(honest_means - wide[hostile:], axis=1).max() <= apart * (1 + 1e-6)
    found = mixed_mean(list(values), f, near, shares.tolist()).values
    slack = 1e-5 * np.abs(honest).max()
    assert (found >= honest_means.min(axis=0) - slack).all()
    assert (found <= honest_means.max(axis=0) + slack).all()


def test_mixing_leaves_out_nothing_where_nobody_is_far_and_who_is_otherwise() -> None:
    places = np.array([0.0, 1.0, 50.0, 2.0, 3.0])
    near = neighbours(np.square(places[:, None] - places[None]), 1)
    assert near == [[0, 1, 3, 4], [0, 1, 3, 4], [1, 2, 3, 4], [0, 1, 3, 4], [0, 1, 3, 4]]
    values = [np.full(3, place, np.float32) for place in places]
    assert mixed_mean(values, 1, near, [0.2] * 5).values == pytest.approx([1.5] * 3)


def test_krum_leaves_out_who_is_far_away() -> None:
    places = np.array([0.0, 1.0, 50.0, 2.0, 3.0])
    assert krum(np.square(places[:, None] - places[None]), 1) == [0, 1, 3, 4]


# Before the rules


@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=20), st.lists(st.floats(0, 1e38), max_size=20))
@settings(max_examples=60, deadline=None)
def test_fewer_than_half_do_not_choose_the_clip(honest: list[float], bad: list[float]) -> None:
    assume(len(bad) < len(honest))
    clip = clip_norm(honest + bad)
    assert min(honest) <= clip <= max(honest)
    for norm in honest + bad:
        assert norm * scale(norm, clip) <= clip * (1 + 1e-12)
        assert scale(norm, clip) == 1.0 or norm > clip


def test_weights() -> None:
    assert weights([5, 500], [0, 0], by_examples=False, late=1.0) == [1.0, 1.0]
    assert weights([1, 1, 1], [0, 1, 2], by_examples=False, late=0.5) == [1.0, 0.5, 0.25]
    claimed = weights([100, 200, 10**9], [0, 1, 0], by_examples=True, late=0.5)
    assert claimed == [100.0, 100.0, 400.0], "what one site says of itself counts twice the median at most"


@pytest.mark.parametrize("text", ["nnm", "nnm:2", "trimmed", "trimmed:2", "median", "krum", "krum:3", "mean"])
def test_names_of_rules(text: str) -> None:
    assert str(parse_rule(text)) == text


@pytest.mark.parametrize(
    "text", ["", "trimmed:0", "median:1", "mean:1", "krum:-1", "nnm:0", "trimmed: 1", "Trimmed", "best"]
)
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(ConfigError, match="is no rule"):
        parse_rule(text)


@pytest.mark.parametrize(
    ("text", "sites", "f"),
    [
        ("trimmed", 3, 1),
        ("trimmed", 9, 2),
        ("trimmed", 20, 4),
        ("krum", 5, 1),
        ("median", 10, 4),
        ("mean", 1, 0),
        ("nnm", 3, 1),
        ("nnm", 10, 3),
        ("nnm:2", 9, 2),
    ],
)
def test_hostile_sites_that_a_rule_is_set_for(text: str, sites: int, f: int) -> None:
    assert parse_rule(text).f(sites) == f


@pytest.mark.parametrize(("text", "sites"), [("trimmed", 2), ("trimmed:3", 6), ("krum", 4), ("mean", 0), ("nnm", 2)])
def test_too_few_sites(text: str, sites: int) -> None:
    with pytest.raises(TooFewSites):
        parse_rule(text).f(sites)


@pytest.mark.parametrize(
    ("text", "sites", "goes", "not_"),
    [
        (
            "trimmed",
            10,
            "fp32 bf16 int8 int4 int4:clipped step:0.25 step:0.5 step:1 lowrank:4",
            "sign ternary top:0.1:sign",
        ),
        ("trimmed", 8, "int4 step:2 sign ternary", "top:0.1:sign"),
        ("trimmed:1", 20, "sign", "top:0.1:int8"),
        ("median", 3, "int4", "sign top:0.1:sign step:1.5"),
        ("krum", 10, "sign top:0.1:sign", ""),
        ("mean", 10, "sign top:0.1:sign ternary", ""),
        ("nnm", 10, "sign top:0.1:sign ternary", ""),
    ],
)
def test_codecs_that_go_with_a_rule(text: str, sites: int, goes: str, not_: str) -> None:
    globs = parse_rule(text).codecs(sites)
    assert all(accepts(globs, name) for name in goes.split())
    assert not any(accepts(globs, name) for name in not_.split())


def test_what_goes_with_a_rule_adds_up_over_rounds() -> None:
    """Sites that keep what their codecs drop: the rounds' results are near the sum of the honest means, or are not."""
    rng, sites, shape = np.random.default_rng(3), 10, (32, 256)
    common = rng.standard_normal(shape).astype(np.float32)
    trains = [common + rng.standard_normal((sites, *shape)).astype(np.float32) for _ in range(20)]
    honest = sum(train.mean(0, dtype=np.float64) for train in trains)

    def made_one(came: Array, rule: Rule) -> Array:
        f = rule.f(sites)
        if rule.name == "trimmed":
            return trimmed_mean(list(came), f).values
        wide = came.reshape(sites, -1).astype(np.float64)
        near = neighbours(np.square(wide[:, None] - wide[None]).sum(axis=2), f)
        return mixed_mean(list(came), f, near, [1 / sites] * sites).values

    def off(name: str, rule: str = "trimmed") -> float:
        left, result, used = np.zeros((sites, *shape), np.float32), np.zeros(shape), codec(name)
        for train in trains:
            sent = train + left
            came = np.stack([used.decode(used.encode(one), *shape) for one in sent])
            left = sent - came
            result += made_one(came, parse_rule(rule))
        return float(np.linalg.norm(result - honest) / np.linalg.norm(honest))

    assert off("step:0.5") < 0.05 and off("step:1") < 0.05 and off("int4") < 0.05
    assert off("sign") > 0.25 and off("top:0.1:sign") > 0.5
    assert off("step:0.5", "nnm") < 0.05 and off("sign", "nnm") < 0.15 and off("top:0.1:sign", "nnm") < 0.15
