"""Which deltas to use, and how: the way to each shard that moves the fewest bytes, from what is held. Pure.

Clients and edges ask it with what they hold; the answer is advice like a plan: what is made of a delta counts when its
digest is right, and where it is not, the shard is fetched whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from shared import parcel
from shared.digest import Digest, digest_of
from shared.errors import IntegrityError
from shared.layout import Slice
from shared.manifest import Delta, Manifest

WANTED_FOR = "Nearshard-Revision"
"""The field of a request for a shard: a revision that it is of, as ``model@revision``. A node that has not read that
manifest may find a delta in it."""
REBUILDING = "Nearshard-Rebuilding"
"""The field of a node's answer with a shard that it makes from a delta: no byte comes before all are there."""
MAX_CHAIN = 4
"""Deltas that are decoded one upon the other, at most: beyond, a shard is fetched whole."""


def ways(
    manifest: Manifest, wanted: Iterable[Digest], held: Callable[[Digest], bool], *, compressed: bool = True
) -> dict[Digest, tuple[Delta, ...]]:
    """For each shard of ``wanted``, the deltas to decode, in order, so that it is made last; none: fetch it whole.

    ``held``: whether all bytes of a shard are at hand, so that nothing has to be moved for it. What two ways have in
    common is counted for each: a little more than is moved, never less. What a delta is upon is held or made on the
    way, never fetched whole: nobody need have it any more. ``compressed``: whether deltas upon nothing count too.
    """
    deltas = manifest.deltas_to
    known: dict[tuple[Digest, int], tuple[float, tuple[Delta, ...]]] = {}

    def cheapest(digest: Digest, depth: int) -> tuple[float, tuple[Delta, ...]]:
        if held(digest):
            return 0, ()
        if (digest, depth) in known:
            return known[digest, depth]
        best: tuple[float, tuple[Delta, ...]] = (manifest.size_of(digest) if depth == MAX_CHAIN else math.inf), ()
        usable = (delta for delta in deltas.get(digest, ()) if compressed or delta.base)
        for delta in usable if depth else ():
            cost, steps = float(0 if held(delta.parcel) else manifest.size_of(delta.parcel)), dict[Delta, None]()
            for base in dict.fromkeys(part.digest for part in delta.base):
                more, before = cheapest(base, depth - 1)
                cost += more
                steps |= dict.fromkeys(before)
            if cost < best[0]:
                best = cost, (*steps, delta)
        known[digest, depth] = best
        return best

    return {digest: cheapest(digest, MAX_CHAIN)[1] for digest in wanted}


def bytes_of(manifest: Manifest, steps: Sequence[Delta], held: Callable[[Digest], bool]) -> int:
    """Bytes to move for one of ``ways``: its parcels, but for those that are held too."""
    return sum(manifest.size_of(digest) for digest in {delta.parcel for delta in steps} if not held(digest))


Read = Callable[[Slice, memoryview], None]
"""Fills the memory with a slice of a shard that is held. It may raise."""


def rebuild(manifest: Manifest, way: Iterable[Delta], parcels: Mapping[Digest, memoryview], read: Read) -> memoryview:
    """The shard that these deltas, decoded in order, make last: its digest is right. Takes processor time.

    ``parcels``: of these deltas. Raises DecodeError, IntegrityError, and what ``read`` does.
    """
    made, target = dict[Digest, memoryview](), None
    for delta in way:
        base = memoryview(bytearray(sum(part.length for part in delta.base)))
        position = 0
        for part in delta.base:
            into = base[position : position + part.length]
            position += part.length
            if (shard := made.get(part.digest)) is not None:
                into[:] = shard[part.offset : part.offset + part.length]
            else:
                read(part, into)
        target = delta.target
        data = parcel.decode(parcels[delta.parcel], base.toreadonly(), manifest.size_of(target))
        made[target] = memoryview(data)
    if target is None or digest_of(made[target]) != target:
        raise IntegrityError(f"what deltas make is not {target}")  # a wrong parcel, or a base that is damaged
    return made[target]


def bytes_moved(manifest: Manifest, chosen: Mapping[Digest, tuple[Delta, ...]]) -> int:
    """Bytes to fetch for the ``ways`` that were chosen: each parcel once, and shards whole where there is no way."""
    parcels = {delta.parcel for steps in chosen.values() for delta in steps}
    whole = {digest for digest, steps in chosen.items() if not steps}
    return sum(manifest.size_of(digest) for digest in parcels | whole)
