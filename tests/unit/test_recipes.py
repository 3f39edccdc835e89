"""Which deltas a node knows of a shard, and which of them it would use."""

from __future__ import annotations

from collections.abc import Mapping

from edge_node.recipes import MAX_BASES, MAX_MADE, Recipes
from edge_node.shard_key import ShardKey, shard_key
from shared.digest import Digest, digest_of
from shared.layout import Slice
from shared.manifest import MAX_SHARD, Delta, Manifest


def named(name: str) -> Digest:
    """The digest of some shard."""
    return digest_of(name.encode())


def manifest(sizes: Mapping[str, int], *deltas: tuple[str, str, str], model: str = "acme/tiny") -> Manifest:
    """Of shards by name; deltas as target, parcel and base (empty: none)."""
    table = {named(name): size for name, size in sizes.items()}
    made = tuple(
        Delta(named(target), named(parcel), (Slice(named(base), 0, sizes[base]),) if base else ())
        for target, parcel, base in deltas
    )
    shards = {digest: size for digest, size in table.items() if digest == named("new")}
    others = {digest: size for digest, size in table.items() if digest not in shards}
    return Manifest(model, shards, {}, {}, deltas=made, others=others)


NEW, OLD, OLDER, DELTA, OLD_DELTA, PACKED = (
    shard_key(named(name)) for name in ("new", "old", "older", "delta", "old-delta", "packed")
)
KNOWN = manifest(
    {"new": 100, "old": 90, "older": 80, "delta": 10, "old-delta": 20, "packed": 85},
    ("new", "delta", "old"),
    ("new", "packed", ""),
    ("old", "old-delta", "older"),
)


def best(recipes: Recipes, *held: ShardKey) -> tuple[list[ShardKey], int] | None:
    """Parts of the best way, and what it costs."""
    recipe = recipes.best(NEW, lambda key: key in held)
    return (list(recipe.parts), recipe.cost) if recipe else None


def test_the_fewest_bytes_are_chosen_by_what_is_held() -> None:
    recipes = Recipes()
    assert best(recipes, OLD) is None
    recipes.learn(KNOWN, "")
    assert best(recipes, OLD) == ([DELTA, OLD], 10)
    assert best(recipes, OLDER) == ([OLD_DELTA, DELTA, OLDER], 30)
    assert best(recipes) == ([PACKED], 85)
    assert best(recipes, PACKED) == ([PACKED], 0)
    assert best(recipes, DELTA, OLDER) == ([OLD_DELTA, DELTA, OLDER], 20)
    assert list(recipes.bases(NEW)) == [OLD, OLDER]


def test_of_several_manifests_the_one_that_moves_least_counts() -> None:
    recipes = Recipes()
    recipes.learn(KNOWN, "")
    recipes.learn(manifest({"new": 100, "other": 70, "small": 3}, ("new", "small", "other")), "")
    assert best(recipes, OLD) == ([DELTA, OLD], 10)
    assert best(recipes, OLD, shard_key(named("other"))) == ([shard_key(named("small")), shard_key(named("other"))], 3)


def test_a_private_model_s_deltas_are_for_its_own_shards_only() -> None:
    recipes = Recipes()
    recipes.learn(KNOWN, "acme/tiny")
    assert best(recipes, OLD) is None
    recipe = recipes.best(shard_key(named("new"), "acme/tiny"), lambda key: key == shard_key(named("old"), "acme/tiny"))
    assert recipe is not None and list(recipe.parts) == [
        shard_key(named("delta"), "acme/tiny"), shard_key(named("old"), "acme/tiny"),
    ]  # fmt: skip
    foreign = recipes.best(shard_key(named("new"), "acme/tiny"), lambda key: key == OLD)
    assert foreign is not None and foreign.compressed, "a public shard of the same bytes is no base"
    assert recipes.named(NEW) == "" and recipes.named(shard_key(named("new"), "acme/tiny")).startswith("acme/tiny@")


def test_the_manifests_read_last_are_kept_within_bounds() -> None:
    others = [manifest({"new": 100, f"p{n}": 10}, ("new", f"p{n}", "")) for n in range(9)]
    recipes = Recipes(keep=4)
    for other in others:
        recipes.learn(other, "")
        recipes.learn(others[0], "")
    assert len(recipes) == 4 and recipes.knows("", others[0].revision) and not recipes.knows("", others[1].revision)
    tight = Recipes(keep_bytes=len(others[0].encoded) + 1)
    for other in others:
        tight.learn(other, "")
    assert len(tight) == 1 and tight.knows("", others[-1].revision)
    tight.learn(manifest({"new": 1}), "")
    assert len(tight) == 1, "one without deltas is of no use here"


def test_a_manifest_cannot_make_a_node_hold_or_ask_without_bounds() -> None:
    """Many large shards, all made on the way to a small one; more bases than anybody would ask peers for."""
    count = MAX_MADE // MAX_SHARD + 1
    sizes = {"new": 100, **{f"old{n}": MAX_SHARD for n in range(count)}, "delta": 1, "packed": 1}
    table = {named(name): size for name, size in sizes.items()}
    base = tuple(Slice(named(f"old{n}"), 0, 1) for n in range(count))
    deltas = (
        Delta(named("new"), named("delta"), base),
        *(Delta(named(f"old{n}"), named("packed")) for n in range(count)),
    )
    recipes = Recipes()
    recipes.learn(Manifest("acme/tiny", {named("new"): 100}, {}, {}, deltas=deltas, others=table), "")
    assert best(recipes) is None
    many = {f"old{n}": 10 for n in range(2 * MAX_BASES)}
    wide = Delta(named("new"), named("delta"), tuple(Slice(named(name), 0, 1) for name in many))
    shards = {named(name): size for name, size in {"delta": 1, **many}.items()}
    recipes.learn(Manifest("acme/tiny", {named("new"): 100}, {}, {}, deltas=(wide,), others=shards), "")
    assert len(recipes.bases(NEW)) == MAX_BASES
