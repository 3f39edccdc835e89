"""Updates made one: from documents and from memory, in little memory, whoever sends them."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest

from origin.federated.aggregate import Aggregation, Contribution, Readable, measure
from origin.federated.rules import Rule, TooFewSites, parse_rule, scale
from shared.errors import DecodeError, NonFinite
from shared.updates.codecs import codec
from shared.updates.document import Update, open_update, write_update
from shared.updates.segments import Segment, segments

Array = npt.NDArray[np.float32]
Tensors = Mapping[str, Array]
RULES = ("nnm", "trimmed", "median", "krum", "mean")


class InMemory:
    """An update that is there as arrays: for what is about values, not documents."""

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors

    def read(self, name: str, number: int, /) -> Array:
        array = self._tensors[name]
        segment = segments(array.shape)[number]
        return _cut(array, segment).reshape(segment.rows, segment.columns).copy()


def _cut(array: Array, segment: Segment) -> Array:
    return array.reshape(-1)[segment.first : segment.first + segment.count]


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in tensors.items()}


def document(tensors: Tensors, name: str) -> Update:
    """A real one, written and opened again."""
    file = io.BytesIO()

    written = write_update(file, shapes(tensors), lambda tensor, segment: _cut(tensors[tensor], segment), codec(name))
    return open_update(file, written.size)


def contributions(
    updates: Sequence[Tensors], opened: Callable[[Tensors], Readable] = InMemory, weights: list[float] | None = None
) -> list[Contribution]:
    """Of sites ``site-00`` and on."""
    found = []
    for number, tensors in enumerate(updates):
        update = opened(tensors)
        weight = weights[number] if weights else 1.0
        found.append(Contribution(f"site-{number:02}", weight, measure(update, shapes(tensors)), update))
    return found


def collected(aggregation: Aggregation, like: Tensors) -> dict[str, Array]:
    """The whole result, put together."""
    found = {name: np.full(array.size, np.nan, np.float32) for name, array in like.items()}
    for name, segment, values in aggregation:
        assert values.shape == (segment.rows, segment.columns)
        found[name][segment.first : segment.first + segment.count] = values.reshape(-1)
    assert all(np.isfinite(array).all() for array in found.values())
    return {name: array.reshape(like[name].shape) for name, array in found.items()}


def flat(tensors: Tensors) -> npt.NDArray[np.float64]:
    return np.concatenate([array.reshape(-1) for array in tensors.values()]).astype(np.float64)


def updates_of(sites: int, seed: int = 1) -> list[Tensors]:
    """Some tensors: of several segments, of one, of no axis, and an empty one."""
    rng = np.random.default_rng(seed)
    forms = {"a": (1100, 1000), "b.weight": (30, 70), "b.bias": (70,), "scale": (), "none": (0, 4)}
    signal = {name: rng.standard_normal(shape, np.float32) for name, shape in forms.items()}
    return [
        {
            name: np.float32(0.5 + site % 3) * (array + rng.standard_normal(array.shape, np.float32))
            for name, array in signal.items()
        }
        for site in range(sites)
    ]


# What comes out


def expected(updates: Sequence[Tensors], f: int) -> npt.NDArray[np.float64]:
    """Clipped to the median norm, sorted, and the middle averaged."""
    values = np.stack([flat(tensors) for tensors in updates])
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    values *= np.minimum(1.0, np.median(norms) / norms)
    found: npt.NDArray[np.float64] = np.sort(values, axis=0)[f : len(values) - f].mean(axis=0)
    return found


@pytest.mark.parametrize(("rule", "f"), [("trimmed", 1), ("trimmed:2", 2), ("median", 3), ("mean", 0)])
def test_updates_are_made_one(rule: str, f: int) -> None:
    sent = updates_of(7)
    aggregation = Aggregation(contributions(sent), shapes(sent[0]), parse_rule(rule), workers=3)
    found = collected(aggregation, sent[0])
    assert np.allclose(flat(found), expected(sent, f), rtol=1e-4, atol=1e-5)
    for site, tensors in zip(aggregation.statistics(), sent, strict=True):
        norm = np.linalg.norm(flat(tensors))
        assert site.norm == pytest.approx(norm)
        assert site.scale == pytest.approx(min(1.0, aggregation.clip / norm))
        assert site.distance == pytest.approx(np.linalg.norm(site.scale * flat(tensors) - flat(found)), rel=1e-4)
        assert site.share == pytest.approx(1 / 7)


@pytest.mark.parametrize("name", ["int4", "sign"])
def test_what_counts_is_what_is_decoded(name: str) -> None:
    sent = updates_of(5)
    opened = [document(tensors, name) for tensors in sent]
    whole = shapes(sent[0])
    decoded = [
        {
            tensor: np.concatenate(
                [np.zeros(0, np.float32), *(one.read(tensor, k).reshape(-1) for k in range(len(segments(shape))))]
            ).reshape(shape)
            for tensor, shape in whole.items()
        }
        for one in opened
    ]
    given = [Contribution(f"s{k}", 1.0, measure(one, whole), one) for k, one in enumerate(opened)]
    found = collected(Aggregation(given, whole, parse_rule("trimmed")), sent[0])
    assert np.allclose(flat(found), expected(decoded, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("equal", [True, False])
def test_the_order_of_sites_memory_and_threads_change_nothing(rule: str, equal: bool) -> None:
    """Bit for bit."""
    sent = updates_of(6)
    given = contributions(sent, weights=None if equal else [1.0, 0.5, 3.0, 0.25, 1.0, 2.0])
    whole, parsed = shapes(sent[0]), parse_rule(rule)

    def bits(aggregation: Aggregation) -> bytes:
        return flat(collected(aggregation, sent[0])).tobytes()

    first = bits(Aggregation(given, whole, parsed, workers=1))
    assert first == bits(Aggregation(given[::-1], whole, parsed, workers=3))
    small = (12 << 20) + 6 * 4 * 200_002  # beside three segments, room for parts of some 100,000 elements of each site
    assert first == bits(Aggregation(given[3:] + given[:3], whole, parsed, budget=small))
    assert first == bits(Aggregation(given, whole, parsed, budget=small, scratch=io.BytesIO()))


def test_weights_count() -> None:
    sent = updates_of(5)
    heavy = [1e-9] * 4 + [1.0]
    found = collected(Aggregation(contributions(sent, weights=heavy), shapes(sent[0]), parse_rule("mean")), sent[4])
    clip = float(np.median([np.linalg.norm(flat(tensors)) for tensors in sent]))
    last = flat(sent[4]) * scale(float(np.linalg.norm(flat(sent[4]))), clip)
    assert np.allclose(flat(found), last, rtol=1e-4, atol=1e-5)


def test_a_fixed_norm_takes_the_place_of_the_median() -> None:
    sent = updates_of(5)
    aggregation = Aggregation(contributions(sent), shapes(sent[0]), parse_rule("mean"), 1.5)
    assert np.linalg.norm(flat(collected(aggregation, sent[0]))) <= 1.5
    for site in aggregation.statistics():
        assert site.scale * site.norm == pytest.approx(1.5)


def test_hostile_sites_add_to_the_mean_their_share_of_the_clip_at_most() -> None:
    sent = updates_of(6)
    bad = [{name: array * np.float32(-1e9) for name, array in tensors.items()} for tensors in sent[:2]]
    aggregation = Aggregation(contributions([*bad, *sent[2:]]), shapes(sent[0]), parse_rule("mean"))
    found = flat(collected(aggregation, sent[0]))
    honest = [flat(tensors) for tensors in sent[2:]]
    assert aggregation.clip <= max(float(np.linalg.norm(one)) for one in honest)
    kept = np.sum([one * scale(float(np.linalg.norm(one)), aggregation.clip) for one in honest], axis=0) / 6
    assert np.linalg.norm(found - kept) <= aggregation.clip * 2 / 6 * (1 + 1e-5)


# What does not count


def test_a_site_with_what_is_not_finite_is_left_out() -> None:
    sent = updates_of(5)
    given = contributions(sent)
    spoilt = InMemory({**sent[0], "b.bias": np.full(70, np.inf, np.float32)})
    with pytest.raises(NonFinite):
        measure(spoilt, shapes(sent[0]))
    bad = Contribution("bad", 1.0, float("nan"), spoilt)
    whole, rule = shapes(sent[0]), parse_rule("trimmed")
    aggregation = Aggregation([bad, *given], whole, rule)
    assert aggregation.refused == ("bad",)
    assert (
        flat(collected(aggregation, sent[0])).tobytes()
        == flat(collected(Aggregation(given, whole, rule), sent[0])).tobytes()
    )
    with pytest.raises(TooFewSites):
        Aggregation([bad, *given[:2]], whole, rule)


def test_a_result_that_is_not_finite_is_an_error() -> None:
    big = [{"w": np.full((1, 4), 3e38, np.float32)} for _ in range(5)]
    with pytest.raises(NonFinite, match="w: the aggregate"):
        list(Aggregation(contributions(big), {"w": (1, 4)}, parse_rule("trimmed")))


def test_a_document_that_is_damaged_is_an_error() -> None:
    sent = updates_of(3)
    given = contributions(sent, lambda tensors: document(tensors, "int8"))
    assert isinstance(given[1].update, Update)
    given[1].update._file.seek(20)
    given[1].update._file.truncate()
    with pytest.raises(DecodeError):
        list(Aggregation(given, shapes(sent[0]), parse_rule("trimmed")))


def test_updates_of_zeros() -> None:
    given = contributions([{"w": np.zeros((2, 3), np.float32)} for _ in range(5)])
    aggregation = Aggregation(given, {"w": (2, 3)}, parse_rule("trimmed"))
    assert not flat(collected(aggregation, {"w": np.zeros((2, 3), np.float32)})).any()
    assert {(site.distance, site.trimmed, site.scale) for site in aggregation.statistics()} == {(0.0, 0.0, 1.0)}


# Memory


@pytest.mark.parametrize("scratch", [True, False])
def test_memory_is_the_budgets_whatever_the_number_of_sites(scratch: bool) -> None:
    class Made:
        """Decodes to 4 MiB, and takes none while it does not."""

        def __init__(self, site: int) -> None:
            self._site = site

        def read(self, name: str, number: int, /) -> Array:
            return np.full((1, 1 << 20), self._site, np.float32)

    sites, budget = 40, 40 << 20
    given = [Contribution(f"{site:02}", 1.0, 1e9, Made(site)) for site in range(sites)]
    file = io.BytesIO(bytes(sites * 4 << 20)) if scratch else None  # before memory is watched: stands for a disk
    aggregation = Aggregation(given, {"w": (1 << 20,)}, parse_rule("trimmed:2"), budget=budget, scratch=file)
    tracemalloc.start()
    try:
        ((_, _, values),) = aggregation
        assert tracemalloc.get_traced_memory()[1] < budget
    finally:
        tracemalloc.stop()
    assert np.unique(values) == pytest.approx((sites - 1) / 2)


# Who attacks


def attacks(honest: Array, f: int, old: Array) -> Iterator[tuple[str, list[Array]]]:
    """What ``f`` sites that know all honest updates send together."""
    mean, spread = honest.mean(axis=0), honest.std(axis=0)
    yield "scaled", [one * np.float32(1e6) for one in honest[:f]]
    yield "sign flip", [-one for one in honest[:f]]
    yield "sign flip times ten", [-10 * mean] * f
    sites = len(honest) + f
    # A little is enough (Baruch et al. 2019): as far out as honest sites are that have a majority with it.
    z = NormalDist().inv_cdf((sites - f - (sites // 2 + 1 - f)) / (sites - f))
    yield "ALIE", [mean - np.float32(z) * spread] * f
    yield "ALIE, further", [mean - spread] * f
    yield "zeros", [0 * mean] * f
    yield "replay", [old] * f


def worst(sites: int, f: int, rule: str) -> float:
    """The largest error of the result, as a share of the honest mean's norm. What honest sites have in common is as
    large as what each has of its own."""
    rng = np.random.default_rng(sites)
    signal = rng.standard_normal((2, 3000), np.float32)
    honest = signal[0] + rng.standard_normal((sites - f, 3000), np.float32)
    replayed = signal[1] + rng.standard_normal(3000, np.float32)
    mean, errors = flat({"": honest.mean(axis=0)}), []
    for _, bad in attacks(honest, f, replayed) if f else [("", [])]:
        sent: list[Tensors] = [{"w": one} for one in [*bad, *honest]]
        found = collected(Aggregation(contributions(sent), {"w": (3000,)}, parse_rule(rule), workers=1), sent[0])
        errors.append(float(np.linalg.norm(flat(found) - mean) / np.linalg.norm(mean)))
    return max(errors)


@pytest.mark.parametrize(
    ("sites", "hostile", "figure", "goal"),
    [
        (5, 0, 0.09, None), (10, 0, 0.10, None), (20, 0, 0.07, None), (5, 1, 0.23, 0.35), (10, 1, 0.16, 0.20),
        (10, 2, 0.28, 0.35), (10, 3, 0.42, None), (20, 3, 0.215, None), (20, 6, 0.41, None),
    ],
)  # fmt: skip
def test_the_default_against_hostile_sites(sites: int, hostile: int, figure: float, goal: float | None) -> None:
    """The figures of docs/federated.md, whatever is sent; 0.025 is for the draw of these few thousand values."""
    found = worst(sites, hostile, str(Rule()))
    assert hostile == 0 or found < worst(sites, hostile, "mean")
    assert found == pytest.approx(figure, abs=0.025)
    assert goal is None or found <= goal


@pytest.mark.parametrize(
    ("sites", "hostile", "figure", "goal"),
    [
        (5, 0, 0.15, None), (10, 0, 0.11, None), (20, 0, 0.08, None),
        (5, 1, 0.30, 0.35), (10, 1, 0.17, 0.20), (10, 2, 0.31, 0.35), (20, 3, 0.23, None),
    ],
)  # fmt: skip
def test_trimming_against_hostile_sites(sites: int, hostile: int, figure: float, goal: float | None) -> None:
    found = worst(sites, hostile, "trimmed")
    assert found == pytest.approx(figure, abs=0.025)
    assert goal is None or found <= goal


@pytest.mark.parametrize(("rule", "figure"), [("median", 0.23), ("krum:1", 0.15), ("mean", 0.23)])
def test_other_rules_against_one_hostile_site_of_ten(rule: str, figure: float) -> None:
    assert worst(10, 1, rule) <= figure + 0.025


def test_statistics_show_who_is_far_from_the_others() -> None:
    rng = np.random.default_rng(3)
    signal = rng.standard_normal(20_000, np.float32)
    sent: list[Tensors] = [{"w": signal + rng.standard_normal(20_000, np.float32)} for _ in range(9)]
    sent.insert(4, {"w": -3 * signal})
    for rule, honest in (("trimmed", 0.5), ("krum", 0.5), ("nnm", 0.9)):
        aggregation = Aggregation(contributions(sent), {"w": (20_000,)}, parse_rule(rule))
        collected(aggregation, sent[0])
        by_distance = sorted(aggregation.statistics(), key=lambda site: site.distance)
        assert by_distance[-1].site == "site-04"
        assert by_distance[-1].scale < 1
        hostile = by_distance[-1].trimmed
        assert hostile > 0.6
        assert all(site.trimmed < honest for site in by_distance[:-2])
