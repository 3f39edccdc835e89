"""The nodes of this node's region, and which of them own a shard.

A shard lives on the disk of its owners (``replicas`` of them). Another node asks an owner, with a hop field, and
keeps what it gets in memory only: hot shards spread, cold ones take room once a region. A request with the hop
field is answered from this node or from above, never from a peer, so nodes that see different rings cannot wait on
each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared.digest import Digest
from shared.ring import Ring

HOP = "Nearshard-Hop"
"""The field of a request from a peer: its node's name."""
AS_IS = "Nearshard-As-Is"
"""The field, beside it, of a request for what a rebuild takes: that is not rebuilt itself."""
ONLY_IF_CACHED = "only-if-cached"
"""Of ``Cache-Control`` (RFC 9111 §5.2.1.7): what is not held here is not fetched, and answered 504."""


class Peers:
    """The ring of a region as a router told it last."""

    def __init__(self, node: str, replicas: int) -> None:
        self._node, self._replicas = node, replicas
        self._urls: Mapping[str, str] = {}
        self._ring = Ring({})
        self.epoch = 0
        """Of the membership, as a router told it last; clients hear of it from here too."""

    def __repr__(self) -> str:
        return f"<Peers of {self._node}: {self._ring}>"

    def __len__(self) -> int:
        """Members of the ring."""
        return len(self._urls)

    def update(self, members: Mapping[str, tuple[str, int]]) -> None:
        """The members by name: URL and weight."""
        self._urls = {name: url for name, (url, _) in members.items()}
        self._ring = Ring({name: weight for name, (_, weight) in members.items()})

    def heard(self, epoch: object) -> None:
        """A router said at which epoch the membership is. Raises TypeError."""
        if type(epoch) is not int or epoch < 0:
            raise TypeError("an epoch is a count")
        self.epoch = epoch

    def owners(self, digest: Digest) -> list[str]:
        """URLs of the owners to ask for a shard; none where this node owns it itself, or is alone."""
        owners = self._ring.owners(digest, self._replicas)
        return [] if self._node in owners else [self._urls[owner] for owner in owners]
