"""The ways to shards that a node has read of lately: which deltas of which manifest make one. Pure.

Only what a manifest says is known here, and a manifest is named by its digest; that the bytes which come out are right,
their own digest says.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edge_node.shard_key import ShardKey, digest_in, model_in, shard_key
from shared.deltas import MAX_CHAIN, bytes_of, ways
from shared.digest import Digest
from shared.manifest import MAX_SHARD, Delta, Manifest

KEEP, KEEP_BYTES = 64, 16 << 20
"""Manifests with deltas that are remembered, and encoded bytes of them; the last one always is."""
MAX_MADE = 4 * MAX_SHARD
"""Bytes that all deltas of one way make together: they are in memory at once."""
MAX_BASES = 64
"""Bases that are named for one shard: each may be asked for at a peer."""

Held = Callable[[ShardKey], bool]


@dataclass(frozen=True)
class Recipe:
    """How to make a shard: the deltas to decode, in order; the last one makes it."""

    manifest: Manifest
    private: str
    """The private model that it is of; empty for a public one."""
    steps: tuple[Delta, ...]
    size: int
    """Bytes of the shard."""
    cost: int
    """Bytes to move for it."""

    @property
    def compressed(self) -> bool:
        """Whether it is but the shard compressed, from nothing that was there before."""
        return not any(step.base for step in self.steps)

    def key(self, digest: Digest) -> ShardKey:
        """What the cache calls a shard, a parcel or a base of it."""
        return shard_key(digest, self.private)

    @property
    def parts(self) -> dict[ShardKey, int]:
        """The shards that it takes, parcels and bases, and their sizes: all but those that are made on the way."""
        made = {step.target for step in self.steps}
        named = [step.parcel for step in self.steps]
        named += [part.digest for step in self.steps for part in step.base if part.digest not in made]
        return {self.key(digest): self.manifest.size_of(digest) for digest in named}


class Recipes:
    """Manifests with deltas, those that were read last."""

    def __init__(
        self, keep: int = KEEP, keep_bytes: int = KEEP_BYTES, *, told: Callable[[Manifest, str], None] | None = None
    ) -> None:
        """``told``: of every manifest that is read, with deltas or without."""
        self._told = told
        self._keep, self._keep_bytes = keep, keep_bytes
        self._manifests: OrderedDict[tuple[str, Digest], Manifest] = OrderedDict()
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<Recipes of {len(self._manifests)} manifests>"

    def __len__(self) -> int:
        """Manifests that are remembered."""
        return len(self._manifests)

    def learn(self, manifest: Manifest, private: str) -> None:
        """A manifest was read; ``private``: its model where that is private, else empty."""
        if self._told:
            self._told(manifest, private)
        if not manifest.deltas:
            return
        name = private, manifest.revision
        if name not in self._manifests:
            self._manifests[name] = manifest
            self._bytes += len(manifest.encoded)
        self._manifests.move_to_end(name)
        while len(self._manifests) > 1 and (len(self._manifests) > self._keep or self._bytes > self._keep_bytes):
            _, forgotten = self._manifests.popitem(last=False)
            self._bytes -= len(forgotten.encoded)

    def knows(self, private: str, revision: Digest) -> bool:
        """Whether a manifest is remembered."""
        return (private, revision) in self._manifests

    def named(self, key: ShardKey) -> str:
        """A revision with a delta to a shard, as ``model@revision``; empty where none is known."""
        for manifest in self._of(key):
            return f"{manifest.model}@{manifest.revision}"
        return ""

    def bases(self, key: ShardKey) -> dict[ShardKey, int]:
        """Shards that deltas to this one are from, the nearest first, and their sizes; MAX_BASES at most."""
        found: dict[ShardKey, int] = {}
        for manifest in self._of(key):
            ring = [digest_in(key)]
            for _ in range(MAX_CHAIN):
                deltas = [delta for target in ring for delta in manifest.deltas_to.get(target, ())]
                ring = list(dict.fromkeys(part.digest for delta in deltas for part in delta.base))
                for digest in ring:
                    found.setdefault(shard_key(digest, model_in(key)), manifest.size_of(digest))
                    if len(found) == MAX_BASES:
                        return found
        return found

    def best(self, key: ShardKey, held: Held) -> Recipe | None:
        """The way to a shard that moves the fewest bytes, with what is ``held``; None: fetch it whole."""
        recipes = (self._of_manifest(manifest, key, held) for manifest in self._of(key))
        return min((recipe for recipe in recipes if recipe), key=lambda recipe: recipe.cost, default=None)

    def _of_manifest(self, manifest: Manifest, key: ShardKey, held: Held) -> Recipe | None:
        target, private = digest_in(key), model_in(key)

        def at_hand(digest: Digest) -> bool:
            return digest != target and held(shard_key(digest, private))

        steps = ways(manifest, [target], at_hand)[target]
        size, made = manifest.size_of(target), sum(manifest.size_of(step.target) for step in steps)
        if not steps or made > MAX_MADE:
            return None
        return Recipe(manifest, private, steps, size, bytes_of(manifest, steps, at_hand))

    def _of(self, key: ShardKey) -> Iterator[Manifest]:
        """Manifests with a delta to a shard, the last one that was read first."""
        digest, model = digest_in(key), model_in(key)
        for (private, _), manifest in reversed(self._manifests.items()):
            if private == model and digest in manifest.deltas_to:
                yield manifest
