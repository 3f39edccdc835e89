"""What the origin writes down of rounds and sites: documents in the store, each replaced as a whole, and sealed.

Paths::

    federated/index                                   the models that have rounds, and how many
    federated/sites                                   the sites: keys, strikes, quarantine
    federated/<org>/<name>/<number>/round             one round
    federated/<org>/<name>/<number>/updates/<64 hex>~<site>   a body that is counted, until it is aggregated

A document is changed by compare-and-swap, so that any number of processes can (an origin, another one, an operator's
command): each edit is made on what is there. Who may write to the store is not who decides whose updates count, and
which command is run as a gate. So each document has the online key's signature in front, over its path too; it is
believed where that is a key that a root of the signed metadata has named for the timestamp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from pydantic import ValidationError

from origin.federated.documents import Index, Known, Record, Round, Site, SiteBook
from origin.federated.transitions import FINAL
from origin.objects import Version
from origin.signing import key_id, public_of
from origin.storage import Storage
from origin.trust_store import TrustStore
from shared.digest import Digest, hex_of
from shared.errors import ConfigError, Conflict, IntegrityError, NotFound
from shared.keys import SIGNATURE, NodeKey, verify
from shared.trust_names import TIMESTAMP

FOLDER = "federated"
INDEX, SITES = f"{FOLDER}/index", f"{FOLDER}/sites"
RECORD = b"nearshard federated record 1\0"
"""What a record's signature is for."""
ATTEMPTS = 64
"""Times that a change is made anew, since somebody else was faster."""


R = TypeVar("R", bound=Record)


class Seal:
    """Signs documents, and says whether one is to be believed."""

    def __init__(self, trust: TrustStore, keys: Callable[[], Sequence[NodeKey]]) -> None:
        """``keys``: the online key among others; raises ConfigError where it is not at hand."""
        self._trust, self._keys = trust, keys
        self._known: tuple[int, Mapping[str, bytes]] = (0, {})

    async def sign(self, path: str, document: bytes) -> bytes:
        """A document as it is stored at a path. Raises ConfigError."""
        held = {key_id(key): key for key in self._keys()}
        role = (await self._trust.state()).root.get_delegated_role(TIMESTAMP)
        key = next((held[name] for name in role.keyids if name in held), None)
        if key is None:
            raise ConfigError("the online key is needed to write down what happens in a round", code="no_online_key")
        return bytes.fromhex(key_id(key)) + key.sign(_message(path, document)) + document

    async def check(self, path: str, data: bytes) -> bytes:
        """The document in what is stored at a path. Raises IntegrityError."""
        name, signature, document = data[:32].hex(), data[32 : 32 + SIGNATURE], data[32 + SIGNATURE :]
        key = (await self._online_keys()).get(name)
        if key is None or not verify(key, signature, _message(path, document)):
            raise IntegrityError(f"{path} in the store was not written by an origin of this network")
        return document

    async def _online_keys(self) -> Mapping[str, bytes]:
        """The keys of all roots, since a record may be older than the last rotation."""
        version = (await self._trust.state()).root.version
        if self._known[0] != version:
            roots = await self._trust.roots()
            self._known = (
                version,
                {
                    name: public_of(root.keys[name])
                    for root in roots
                    for name in root.get_delegated_role(TIMESTAMP).keyids
                    if name in root.keys
                },
            )
        return self._known[1]


def _message(path: str, document: bytes) -> bytes:
    return RECORD + path.encode() + b"\0" + document


class _Kept(Generic[R]):
    """One document."""

    def __init__(self, storage: Storage, seal: Seal, path: str, kind: type[R]) -> None:
        self._storage, self._seal, self.path, self._kind = storage, seal, path, kind

    async def load(self) -> tuple[R, Version]:
        """What is there, and its version. Raises NotFound; IntegrityError."""
        data, version = await self._storage.get(self.path)
        document = await self._seal.check(self.path, data)
        try:
            return self._kind.model_validate_json(document), version
        except ValidationError as error:
            raise IntegrityError(f"{self.path} in the store is of another version of nearshard: {error}") from error

    async def create(self, value: R) -> bool:
        """Write the first. Gives whether there was none."""
        return await self._storage.create(self.path, await self._sealed(value))

    async def change(self, edit: Callable[[R], R], first: R | None = None) -> R:
        """Change what is there (``first`` where nothing is). ``edit`` may be called several times; what it raises is
        raised. Gives what is there then. Raises NotFound, Conflict where others do all the time."""
        wrote = b""
        for _ in range(ATTEMPTS):
            try:
                data, version = await self._storage.get(self.path)
            except NotFound:
                if first is None:
                    raise
                await self.create(first)
                continue
            if data == wrote:  # the store did it, and its answer was lost
                return self._kind.model_validate_json(await self._seal.check(self.path, data))
            before = self._kind.model_validate_json(await self._seal.check(self.path, data))
            changed = edit(before)
            if changed == before:
                return before
            wrote = await self._sealed(changed)
            if await self._storage.replace(self.path, wrote, version):
                return changed
        raise Conflict(f"{self.path} is changed all the time", code="try_again")

    async def _sealed(self, value: R) -> bytes:
        return await self._seal.sign(self.path, value.model_dump_json().encode())


class Records:
    """The documents of a store."""

    def __init__(self, storage: Storage, seal: Seal) -> None:
        self.storage, self._seal = storage, seal
        self._index = _Kept(storage, seal, INDEX, Index)
        self._sites = _Kept(storage, seal, SITES, SiteBook)

    # Rounds

    async def round(self, model: str, number: int) -> Round:
        """A round. Raises NotFound (``no_round``)."""
        try:
            return (await self._round(model, number).load())[0]
        except NotFound:
            raise NotFound(f"{model} has no round {number}", code="no_round") from None

    async def newest(self, model: str) -> Round:
        """A model's last round. Raises NotFound (``no_round``)."""
        known = (await self._known()).get(model)
        if known is None:
            raise NotFound(f"no round of {model} was ever opened", code="no_round")
        with suppress(NotFound):
            return await self.round(model, known.number)
        return await self.round(model, known.number - 1)  # an opening was cut off

    async def change(self, model: str, number: int, edit: Callable[[Round], Round]) -> Round:
        """Change a round. Raises NotFound, Conflict, and what ``edit`` raises."""
        return await self._round(model, number).change(edit)

    async def open(self, model: str, make: Callable[[int, Round | None], Round]) -> Round:
        """A new round: ``make`` is given its number and the one before. Raises Conflict (``round_open``)."""
        try:
            last: Round | None = await self.newest(model)
        except NotFound:
            last = None
        if last and last.state not in FINAL:
            raise Conflict(f"round {last.number} of {model} is {last.state}", code="round_open")
        opened = make(last.number + 1 if last else 1, last)

        def note(index: Index) -> Index:
            known = Known(number=opened.number, active=True)
            return index.model_copy(update={"models": {**index.models, model: known}})

        await self._index.change(note, Index())
        if not await self._round(model, opened.number).create(opened):
            raise Conflict(f"somebody else has just opened round {opened.number} of {model}", code="round_open")
        return opened

    async def active(self) -> list[tuple[str, int]]:
        """The rounds with which something is still to be done."""
        return [(model, known.number) for model, known in (await self._known()).items() if known.active]

    async def in_use(self) -> Mapping[str, set[Digest]]:
        """By model the revisions that a round which has not ended needs: its base and its candidates."""
        found = {}
        for model, _ in await self.active():
            known = await self.newest(model)
            revisions = (known.base, *(candidate.revision for candidate in known.candidates.values()))
            found[model] = {Digest(revision) for revision in revisions}
        return found

    async def models(self) -> list[str]:
        """The models that have had rounds, sorted."""
        return sorted(await self._known())

    async def done(self, model: str, number: int) -> None:
        """Note that nothing is to be done with a round any more."""

        def note(index: Index) -> Index:
            if index.models.get(model) != Known(number=number, active=True):
                return index
            known = Known(number=number, active=False)
            return index.model_copy(update={"models": {**index.models, model: known}})

        await self._index.change(note, Index())

    async def _known(self) -> Mapping[str, Known]:
        try:
            return (await self._index.load())[0].models
        except NotFound:
            return {}

    def _round(self, model: str, number: int) -> _Kept[Round]:
        return _Kept(self.storage, self._seal, f"{folder(model, number)}/round", Round)

    # Sites

    async def sites(self) -> Mapping[str, Site]:
        """All sites, by name."""
        try:
            return (await self._sites.load())[0].sites
        except NotFound:
            return {}

    async def change_sites(self, edit: Callable[[dict[str, Site]], dict[str, Site]]) -> Mapping[str, Site]:
        """Change what is known of sites. Raises what ``edit`` raises."""
        return (await self._sites.change(lambda book: SiteBook(sites=edit(dict(book.sites))), SiteBook())).sites


def folder(model: str, number: int) -> str:
    """Where a round's objects are."""
    return f"{FOLDER}/{model}/{number:08}"


def update_path(model: str, number: int, site: str, digest: Digest) -> str:
    """Where a counted body is."""
    return f"{folder(model, number)}/updates/{hex_of(digest)}~{site}"
