"""Who serves a shard, by what a client knows of the network: the router's own choice, made here. No I/O."""

from __future__ import annotations

import math
from collections.abc import Set

from shared.health import Health
from shared.loads import Loads
from shared.node import State
from shared.routing import Routing, Snapshot
from shared.view import View

CANDIDATES = 4
"""Nodes to try for a key before the origins."""


class Owners:
    """The choice of nodes by one view.

    How busy nodes are it does not know: it goes to a shard's owner, and to the next one where that refuses. A client's
    own few requests are no load to spread.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self._routing = Routing(view.nearness(), Loads(), Health())
        passed = dict.fromkeys(view.draining | view.ejected, State(draining=True))
        self._routing.update(Snapshot(view.nodes, view.epoch), passed, lambda _: -math.inf, 0.0)
        self._ids = {node.url: node.id for node in view.nodes}

    def __repr__(self) -> str:
        return f"<Owners by {self.view}>"

    def node_at(self, base: str) -> str | None:
        """The name of the node that has this base URL."""
        return self._ids.get(base)

    def nodes(self, key: str, failed: Set[str]) -> list[str]:
        """Base URLs of the nodes to ask for a key, best first, each once; those in ``failed`` after the others."""
        choices = self._routing.choose(self.view.region, key, CANDIDATES + len(failed), 0.0)
        urls = list(dict.fromkeys(choice.node.url for choice in choices))
        well = [url for url in urls if url not in failed]
        return well[:CANDIDATES] + [url for url in urls if url in failed][:CANDIDATES]

    def sources(self, key: str, failed: Set[str]) -> list[str]:
        """The same, and the origins; whoever failed is the last resort."""
        return in_order([*self.nodes(key, failed), *self.view.origins], failed)


def in_order(bases: list[str], failed: Set[str]) -> list[str]:
    """Each base URL once; those in ``failed`` after the others."""
    return sorted(dict.fromkeys(bases), key=lambda base: base in failed)
