"""How far a fill goes for its bytes. Pure."""

from __future__ import annotations

from enum import IntEnum


class Reach(IntEnum):
    """What a fill may do to have its shard.

    Whoever waits for a fill, here or at a peer, waits for one that reaches less far than its own, or joins one that
    reaches no farther. So no two wait on each other, whatever rings and manifests they see:
    ``ANYWHERE`` > a peer's ``ABOVE`` > a ``PART`` here > a peer's ``AS_IS``.
    """

    AS_IS = 0
    """A peer asked for a part: it comes from above, as it is."""
    PART = 1
    """For a rebuild on this node, a parcel or a base: from its owner or from above, as it is."""
    ABOVE = 2
    """A peer asked: it comes from above, or is rebuilt."""
    ANYWHERE = 3
    """From its owner or from above, or rebuilt."""

    @property
    def asks_peers(self) -> bool:
        """Whether the shard's owners are asked for it."""
        return self in (Reach.PART, Reach.ANYWHERE)

    @property
    def alone(self) -> Reach:
        """How far it goes where there is no peer to ask, as at the shard's owner: less far, and others may join."""
        return {Reach.PART: Reach.AS_IS, Reach.ANYWHERE: Reach.ABOVE}.get(self, self)

    @property
    def rebuilds(self) -> bool:
        """Whether it may be made from deltas."""
        return self >= Reach.ABOVE
