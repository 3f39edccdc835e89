"""Which nodes serve a key for a client: pure, from one immutable snapshot of the members."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from shared.node import Node
from shared.ring import Ring


class Snapshot:
    """The members at one epoch, with a ring for each region."""

    def __init__(self, nodes: Iterable[Node], epoch: int, former: Snapshot | None = None) -> None:
        """``former``: a snapshot whose rings are taken over where a region has not changed."""
        self.epoch = epoch
        self.nodes: Mapping[str, Node] = {node.id: node for node in sorted(nodes, key=lambda n: n.id)}
        weights: dict[str, dict[str, int]] = defaultdict(dict)
        for node in self.nodes.values():
            weights[node.region][node.id] = node.weight
        known = former.rings if former else {}
        self.rings: Mapping[str, Ring] = {
            region: known[region] if region in known and known[region].members == members else Ring(members)
            for region, members in sorted(weights.items())
        }

    def __repr__(self) -> str:
        return f"<Snapshot {self.epoch}: {len(self.nodes)} nodes in {len(self.rings)} regions>"

    def candidates(self, region: str, key: str, count: int) -> list[Node]:
        """Up to ``count`` nodes for ``key``, best first, each once: the region's owners, then other regions'."""
        found: list[Node] = []
        for name in sorted(self.rings, key=lambda name: (name != region, name)):
            found += [self.nodes[node] for node in self.rings[name].owners(key, count - len(found))]
            if len(found) >= count:
                break
        return found
