"""The short path: redirects, answered before aiohttp sees the request (``shared.web.plain`` says what is plain).

1. known?     ``/blobs/<digest>``, or a task or a file of a ref that the catalog has fresh; else the long path asks.
              What is of no public model goes the long way, where it is seen who may have it
2. where?     ``region`` of the query, ``Nearshard-Region``, else by the address of the connection
3. 304?       with the entity tag, as everywhere
4. choose     by the same ``Selection`` as on the long path, anew for each request: loads and health change all the time
5. send       with the same bytes as the long path: those that depend on the target alone are kept

What comes through proxies (X-Forwarded-For), escapes in a path, other queries, all that is wrong, and all there is
while there are no nodes goes the long way.
Requests are counted here as there, but not timed: nothing here waits.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from aiohttp import web

from router.location import Regions
from router.redirect import fields_of, links_to
from router.selection import Selection
from shared import representation
from shared.catalog import Catalog
from shared.clock import Clock
from shared.conditional import Conditions, NotModified, evaluate
from shared.digest import Digest, hex_of
from shared.errors import BadId, NotFound, RequestError
from shared.metrics import Metrics
from shared.paths import BlobPath, FilePath, ReadPath, TaskPath, blob_path, parse_path
from shared.rollout import at_address
from shared.web.plain import DatedEnd, PlainConnection, PlainFields, PlainRequests
from shared.web.reads import KINDS

KNOWN = 10_000
"""Targets kept with all of their answers that does not depend on the choice: some 2 kB each."""
URLS = 20_000
"""Base URLs of nodes that are kept."""
_TARGET = re.compile(rb"(/(?:blobs|shards|models)/[A-Za-z0-9._:@/-]+)(?:\?region=([a-z0-9._-]+))?")
_HARMLESS = (b"nearshard-region", b"range", b"if-range")
"""Fields, besides those that are harmless to all: a redirect is the same for each range."""


class Known:
    """A target that can be answered here."""

    __slots__ = (
        "etag", "key", "kind", "model", "not_modified", "path", "quoted", "redirect", "ref", "revision", "room", "said",
        "shard", "target",
    )  # fmt: skip

    def __init__(self, path: BlobPath | TaskPath | FilePath, said: str) -> None:
        self.path, self.kind = path, KINDS[type(path)]
        self.said = said
        """The region in the query; may be empty."""
        self.revision: Digest | None = None
        """That the rest was made for; None for a shard."""
        self.shard = isinstance(path, BlobPath)
        self.key = self.model = self.ref = ""
        if isinstance(path, BlobPath):
            self.key = path.digest
            self.show(blob_path(path.digest), hex_of(path.digest))
        else:
            self.key, self.model, self.ref = path.ring_key, path.model, path.ref

    def show(self, target: str, etag: str) -> None:
        """Answer from now on with this path at a node, and this entity tag."""
        self.target, self.etag, self.quoted = target, etag, f'"{etag}"'.encode()
        self.not_modified = f"HTTP/1.1 304 Not Modified\r\n{_lines(fields_of(etag).items())}Date: ".encode()
        self.room = -1
        """Nodes that there is room for in ``redirect``."""
        self.redirect: list[bytes] = []
        """The pieces of a 307; every second one is the base URL of a node, the last one the date and what follows."""

    def make_room(self, count: int, origins: list[str]) -> list[bytes]:
        """Let ``redirect`` name so many nodes, at least one, and then these."""
        links = links_to([base + self.target for base in (*["\0"] * count, *origins)])
        fields = _lines((*fields_of(self.etag).items(), *links))
        text = f"HTTP/1.1 307 Temporary Redirect\r\n{fields}Content-Length: 0\r\nDate: "
        self.room, self.redirect = count, []
        for piece in text.encode().split(b"\0"):
            self.redirect += [piece, b""]
        return self.redirect


def _lines(fields: Iterable[tuple[str, str]]) -> str:
    return "".join(f"{name}: {value}\r\n" for name, value in fields)


class ShortPath:
    """What a router can answer without aiohttp: shared by its connections."""

    def __init__(
        self,
        catalog: Catalog,
        known_public: Callable[[str], bool],
        regions: Regions,
        selection: Selection,
        clock: Clock,
        metrics: Metrics,
        *,
        origins: list[str],
        count: int,
        server: str,
        epoch: Callable[[], int],
        traced: bool = False,
    ) -> None:
        """``traced``: requests of a trace are left to aiohttp, which is where they are recorded."""
        self.requests = PlainRequests(_HARMLESS, traced=traced)
        self._catalog, self._known_public = catalog, known_public
        self._regions, self._selection = regions, selection
        self._origins, self._count = origins, count
        self._end = DatedEnd(server, clock, epoch)
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._urls: dict[str, bytes] = {}
        """Base URLs of nodes as they are sent."""
        self._answered: Counter[tuple[str, str]] = Counter()
        """Requests by kind and status that the metrics have not been told of."""
        self._metrics = metrics
        metrics.before_render.append(self._tell_metrics)

    def region(self, address: str) -> str:
        """The region of a client that says nothing of it."""
        return self._regions.find(None, address).region

    def answer(self, target: bytes, fields: PlainFields, here: str, address: str) -> bytes | None:
        """The whole answer to a plain request from ``address`` in region ``here``; None where the long path is to give
        it."""
        known = self._known.get(target) or self._learn(target)
        if known is None:
            return None
        region = known.said or here
        if fields.region and not known.said:
            try:
                region = self._regions.find(fields.region.decode(), None).region
            except RequestError:
                return None
        if not known.shard and not self._up_to_date(known, fields, address, region):
            return None
        if fields.if_none_match and self._matches(known, fields.if_none_match):
            self._answered[known.kind, "304"] += 1
            return known.not_modified + self._end.now()
        choices = self._selection.send(region, known.key, self._count)
        if not choices:
            return None
        self._answered[known.kind, "307"] += 1
        pieces = known.redirect if known.room == len(choices) else known.make_room(len(choices), self._origins)
        place = 1
        for choice in choices:
            url = choice.node.url
            pieces[place] = self._urls.get(url) or self._encoded(url)
            place += 2
        pieces[-1] = self._end.now()
        return b"".join(pieces)

    def _encoded(self, url: str) -> bytes:
        if len(self._urls) >= URLS:
            self._urls.clear()
        return self._urls.setdefault(url, url.encode())

    def _learn(self, target: bytes) -> Known | None:
        """What a target is, where it is one for here in its canonical spelling."""
        match = _TARGET.fullmatch(target)
        if match is None:
            return None
        try:
            path: ReadPath = parse_path(match[1].decode())
            said = self._regions.find(match[2].decode(), None).region if match[2] else ""
        except (BadId, NotFound, RequestError):
            return None
        if not isinstance(path, BlobPath | TaskPath | FilePath) or (isinstance(path, BlobPath) and path.model):
            return None
        known = self._known[target] = Known(path, said)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return known

    def _up_to_date(self, known: Known, fields: PlainFields, address: str, region: str) -> bool:
        """Whether all that is to be said of a task or a file is known now. (A shard has one form and never changes.)"""
        if fields.accept != b"*/*" or not self._known_public(known.model):
            return False
        manifest = self._catalog.at_hand(known.model, known.ref, lambda: at_address(address, region))
        if manifest is None:
            return False
        if manifest.revision != known.revision:
            path = known.path
            assert not isinstance(path, BlobPath)
            try:
                etag = representation.of_path(path, manifest).etag
            except NotFound:
                return False
            known.show(path.at(manifest.revision), etag)
            known.revision = manifest.revision
        return True

    def _matches(self, known: Known, tags: bytes) -> bool:
        if tags == known.quoted:
            return True
        asked = Conditions("GET", if_none_match=(tags.decode(),))
        return isinstance(evaluate(asked, known.etag, None), NotModified)

    def _tell_metrics(self) -> None:
        for (kind, status), count in self._answered.items():
            self._metrics.requests.labels(kind, status).inc(count)
        self._answered.clear()


class ShortConnection(PlainConnection):
    """A client connection whose plain requests for bytes are answered here."""

    __slots__ = ("_here", "_path")

    def __init__(self, path: ShortPath, manager: web.Server, **options: Any) -> None:
        super().__init__(path.requests, manager, **options)
        self._path = path
        self._here = ""
        """The region of the client's address, once it was looked up."""

    def answer(self, transport: asyncio.Transport, target: bytes, fields: PlainFields) -> bool:
        """All five steps."""
        self._here = self._here or self._path.region(self._address)
        answer = self._path.answer(target, fields, self._here, self._address)
        if answer is None:
            return False
        transport.write(answer)
        return True
