"""The account of a node: what it served and what its link carried, per model and day. Pure; days come from outside.

Who counts does not look anything up: it adds to a few numbers of a path or of a shard. Which model a shard is of is
found when these are folded into the day, every few seconds:

* a private shard has its model in its key;
* a shard is of the model whose manifest has it, of those that were read here lately;
* where none was, it is of the model that was named with the request for it (our clients and nodes do), if that is known
  to be public;
* else of no model.

A day that is over is kept encoded, so that 400 of them take little.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from edge_node.shard_key import ShardKey, digest_in, model_in
from shared import codec
from shared.digest import Digest
from shared.errors import BadId, DecodeError, RequestError
from shared.ids import parse_task_id
from shared.manifest import Manifest
from shared.outcome import Outcome
from shared.usage import KEEP_DAYS, MAX_MODELS, NO_MODEL, OTHER, PRIVATE, Day, Usage, from_numbers, parse_day

MODEL = "Nearshard-Model"
"""The field with which a node names the model of a public shard that it asks another one for."""
MANIFESTS, NAMES, CLAIMS = 64, 10_000, 20_000
"""Manifests, names of public models, and shards with the model that was named for them, that are remembered."""
MAX_SAID = 300
"""Characters of what is said of a shard's model: more is nothing."""
PENDING = 10_000
"""Paths and shards that are counted before they are folded."""
MAX_FILE = 128 << 20
_MAX_DAY = 1 << 20
_HEAD = b"nearshard usage 1\n"


class About(NamedTuple):
    """What a request or a fetch was about: a model, or a shard and what was said that it is of."""

    model: str = NO_MODEL
    private: bool = False
    key: str = ""
    """Of a shard; the model is not known then."""
    said: str = ""
    """As it came: ``org/name``, or ``org/name@revision``."""

    @classmethod
    def shard(cls, key: str, said: str = "") -> About:
        """A shard."""
        return cls(key=key, said=said if len(said) <= MAX_SAID else "")


class Name(NamedTuple):
    """What a day's numbers are kept by."""

    model: str
    private: bool


class Account:
    """Of one node."""

    def __init__(self, today: Callable[[], str] = lambda: "1970-01-01") -> None:
        self._today = today
        self._pending: dict[About, Usage] = {}
        self._day, self._now = today(), dict[Name, Usage]()
        self._past: dict[str, bytes] = {}
        self._manifests: OrderedDict[Digest, tuple[Manifest, Name]] = OrderedDict()
        self._public: OrderedDict[str, None] = OrderedDict()
        self._claims: OrderedDict[ShardKey, str] = OrderedDict()
        self.changes = 0
        """How often something was folded: whether there is something new to be kept."""

    def __repr__(self) -> str:
        return f"<Account of {self._day} and {len(self._past)} days before>"

    # Counting

    def pending(self, about: About) -> Usage:
        """The numbers to count in, until the next fold."""
        usage = self._pending.get(about)
        if usage is None:
            if len(self._pending) >= PENDING:
                self.fold()
            usage = self._pending[about] = Usage()
        return usage

    def received(self, key: ShardKey, outcome: Outcome, size: int) -> None:
        """Bytes of a shard came from a source of this kind."""
        usage = self.pending(About.shard(key))
        if outcome is Outcome.FILL_PEER:
            usage.peers += size
        else:
            usage.link += size

    def saved(self, key: ShardKey, size: int) -> None:
        """So many bytes less crossed the link, since a shard was made from deltas."""
        self.pending(About.shard(key)).saved += size

    # Whose shard it is

    def learn(self, manifest: Manifest, private: str) -> None:
        """A manifest was read; ``private``: its model where that is private, else empty."""
        _remember(self._manifests, manifest.revision, (manifest, Name(manifest.model, bool(private))), MANIFESTS)
        if not private:
            self.learn_public(manifest.model)

    def learn_public(self, model: str) -> None:
        """A model is public."""
        _remember(self._public, model, None, NAMES)

    def claim(self, key: ShardKey, said: str) -> None:
        """A public shard is asked for, and was said to be of a model: what comes for it is counted there."""
        if 0 < len(said) <= MAX_SAID and not model_in(key):
            _remember(self._claims, key, said, CLAIMS)

    def unknown(self) -> set[str]:
        """Models that were named and that are not known to be public, for who can find out."""
        said = (about.said or self._claims.get(ShardKey(about.key), "") for about in self._pending)
        return {model for model in map(_model_of, set(said)) if model and model not in self._public}

    def model_of(self, key: ShardKey, said: str = "") -> Name:
        """The model that a shard is counted to."""
        if private := model_in(key):
            return Name(private, private=True)
        digest, said = digest_in(key), said or self._claims.get(key, "")
        model, _, revision = said.partition("@")
        manifest, name = self._manifests.get(Digest(revision), (None, Name(model, private=False)))
        if manifest and not name.private and _has(manifest, digest):
            return name
        if (model := _model_of(said)) in self._public:
            return Name(model, private=False)
        for manifest, name in reversed(self._manifests.values()):
            if not name.private and _has(manifest, digest):
                return name
        return Name(NO_MODEL, private=False)

    def about(self, key: ShardKey) -> dict[str, str]:
        """The field that names a public shard's model to another node, where it is known."""
        model = self.model_of(key).model
        return {MODEL: model} if model else {}

    # Days

    def fold(self) -> None:
        """Add what was counted to today."""
        self._turn(self._today())
        for about, usage in self._pending.items():
            known = Name(about.model, about.private)
            self._of(self.model_of(ShardKey(about.key), about.said) if about.key else known).add(usage)
        self.changes += bool(self._pending)
        self._pending.clear()

    def today(self, *, everything: bool = False) -> tuple[str, Day]:
        """The day, and its numbers by model as they are now; private models' names only with ``everything``."""
        self.fold()
        return self._day, _shown(self._now, everything=everything)

    def since(self, day: str, *, everything: bool = False) -> dict[str, Day]:
        """The days from this one on."""
        self.fold()
        days = {name: _decode_day(data) for name, data in sorted(self._past.items()) if name >= day}
        days |= {self._day: self._now} if self._day >= day else {}
        return {name: _shown(numbers, everything=everything) for name, numbers in days.items()}

    def _of(self, name: Name) -> Usage:
        usage = self._now.get(name)
        if usage is None:
            if len(self._now) >= MAX_MODELS:
                name = Name(OTHER, private=False)
            usage = self._now.setdefault(name, Usage())
        return usage

    def _turn(self, day: str) -> None:
        """Begin a day; one that was begun goes on (a clock that was set)."""
        if day == self._day:
            return
        if self._now:
            self._past[self._day] = _encode_day(self._now)
        self._day, self._now = day, _decode_day(self._past.pop(day)) if day in self._past else {}
        for old in sorted(self._past)[: -(KEEP_DAYS - 1)]:
            del self._past[old]

    # The file

    def encode(self) -> bytes:
        """All days, with a digest of them."""
        self._turn(self._today())
        days = self._past | {self._day: _encode_day(self._now)}
        body = codec.encode([[day, data] for day, data in sorted(days.items())])
        return _HEAD + hashlib.sha256(body).digest() + body

    def take_up(self, data: bytes) -> None:
        """Go on from what was kept. Raises DecodeError, and nothing has changed then."""
        start = len(_HEAD) + hashlib.sha256().digest_size
        body = data[start:]
        if data[:start] != _HEAD + hashlib.sha256(body).digest():
            raise DecodeError("not an account, or not all of one")
        rows = codec.decode(body, MAX_FILE)
        if not isinstance(rows, list) or len(rows) > KEEP_DAYS or not all(_is_day(row) for row in rows):
            raise DecodeError("an account whose days are not as they should be")
        days = dict(rows)
        for encoded in days.values():
            _decode_day(encoded)
        self._past, self._now = days, {}
        self._now = _decode_day(self._past.pop(self._day)) if self._day in self._past else {}


def _model_of(said: str) -> str:
    with suppress(BadId):
        return parse_task_id(said).model if said else ""
    return ""


def _has(manifest: Manifest, digest: Digest) -> bool:
    return digest in manifest.shards or digest in manifest.others


def _shown(day: dict[Name, Usage], *, everything: bool) -> Day:
    """By names that whoever asks may see."""
    shown: Day = {}
    for name, usage in sorted(day.items()):
        model = name.model if everything or not name.private else PRIVATE
        shown.setdefault(model, Usage()).add(usage)
    return shown


def _encode_day(day: dict[Name, Usage]) -> bytes:
    return codec.encode([[name.model, name.private, *usage.numbers()] for name, usage in day.items()])


def _decode_day(data: bytes) -> dict[Name, Usage]:
    """Raises DecodeError."""
    rows = codec.decode(data, _MAX_DAY)
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) > 2 for row in rows):
        raise DecodeError("a day that is no list of models")
    return {Name(str(model), bool(private)): from_numbers(numbers) for model, private, *numbers in rows}


def _is_day(row: Any) -> bool:
    with suppress(RequestError, ValueError, TypeError):
        day, data = row
        return isinstance(data, bytes) and parse_day(day) == day
    return False


def _remember(table: OrderedDict[Any, Any], key: Any, value: Any, keep: int) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > keep:
        table.popitem(last=False)
