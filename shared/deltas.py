"""Which deltas to use: the way to each shard that moves the fewest bytes, from what is held. Pure.

Clients and edges ask it with what they hold; the answer is advice like a plan: what is made of a delta counts when its
digest is right, and where it is not, the shard is fetched whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from shared.digest import Digest
from shared.manifest import Delta, Manifest

MAX_CHAIN = 4
"""Deltas that are decoded one upon the other, at most: beyond, a shard is fetched whole."""


def ways(
    manifest: Manifest, wanted: Iterable[Digest], held: Callable[[Digest], bool]
) -> dict[Digest, tuple[Delta, ...]]:
    """For each shard of ``wanted``, the deltas to decode, in order, so that it is made last; none: fetch it whole.

    ``held``: whether all bytes of a shard are at hand, so that nothing has to be moved for it. What two ways have in
    common is counted for each: a little more than is moved, never less. What a delta is upon is held or made on the
    way, never fetched whole: nobody need have it any more.
    """
    deltas: dict[Digest, list[Delta]] = {}
    for delta in manifest.deltas:
        deltas.setdefault(delta.target, []).append(delta)
    known: dict[tuple[Digest, int], tuple[float, tuple[Delta, ...]]] = {}

    def cheapest(digest: Digest, depth: int) -> tuple[float, tuple[Delta, ...]]:
        if held(digest):
            return 0, ()
        if (digest, depth) in known:
            return known[digest, depth]
        best: tuple[float, tuple[Delta, ...]] = (manifest.size_of(digest) if depth == MAX_CHAIN else math.inf), ()
        for delta in deltas.get(digest, ()) if depth else ():
            cost, steps = float(manifest.size_of(delta.parcel)), dict[Delta, None]()
            for base in dict.fromkeys(part.digest for part in delta.base):
                more, before = cheapest(base, depth - 1)
                cost += more
                steps |= dict.fromkeys(before)
            if cost < best[0]:
                best = cost, (*steps, delta)
        known[digest, depth] = best
        return best

    return {digest: cheapest(digest, MAX_CHAIN)[1] for digest in wanted}


def bytes_moved(manifest: Manifest, chosen: Mapping[Digest, tuple[Delta, ...]]) -> int:
    """Bytes to fetch for the ``ways`` that were chosen: each parcel once, and shards whole where there is no way."""
    parcels = {delta.parcel for steps in chosen.values() for delta in steps}
    whole = {digest for digest, steps in chosen.items() if not steps}
    return sum(manifest.size_of(digest) for digest in parcels | whole)
