"""Reading signed metadata from the timestamp on: from the origin's store, or from an origin afar."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import suppress

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import MetaFile, Root, Snapshot, Targets, Timestamp

from origin import signing
from origin.signing import State
from shared.errors import Conflict, MetadataInvalid, NotFound
from shared.trust_names import ROOT, SNAPSHOT, TARGETS, TIMESTAMP


class TrustReader(ABC):
    """Metadata by role and version. What is read is checked along the delegations."""

    strict = True
    """Whether a state counts only where all of it is signed as the newest root says. In the origin's own store it may
    be in the middle of a change of keys that is to be completed."""

    def __init__(self) -> None:
        self._chain: list[Root] = []

    @abstractmethod
    async def file(self, role: str, version: int) -> bytes:
        """A file of the metadata. Raises NotFound."""

    @abstractmethod
    async def first_root(self) -> bytes:
        """The root that is trusted for where it is from."""

    async def probe(self, role: str, version: int) -> bytes | None:
        """A file of the metadata, or None where it is not there."""
        with suppress(NotFound):
            return await self.file(role, version)
        return None

    async def load(
        self, timestamp_file: bytes, known: State | None = None, orgs: Collection[str] | None = None
    ) -> State:
        """What a timestamp leads to: with all roles, or with those of some organisations. Raises MetadataInvalid.

        ``known``: what was in force before; what of it still is, is not read again.
        """
        roots = await self.roots()
        signers = list(reversed(roots[-1:] if self.strict else roots[-2:]))
        timestamp, _ = signing.parse(timestamp_file, Timestamp)
        timestamp = signing.check(timestamp_file, Timestamp, TIMESTAMP, timestamp.version, signers)
        meta = timestamp.snapshot_meta
        data = await self.file(SNAPSHOT, meta.version)
        _fits(data, meta)
        snapshot = signing.check(data, Snapshot, SNAPSHOT, meta.version, signers)
        roles: dict[str, Targets] = {}
        for name in sorted(
            (listed.removesuffix(".json") for listed in snapshot.meta), key=lambda name: name != TARGETS
        ):
            if orgs is not None and "~" in name and org_of_role(name) not in orgs:
                continue
            meta = snapshot.meta[f"{name}.json"]
            if known and name in known.roles and known.root is roots[-1] and _listed(known, name) == meta:
                roles[name] = known.roles[name]
                continue
            data = await self.file(name, meta.version)
            _fits(data, meta)
            roles[name], _ = signing.parse(data, Targets)
            if name == TARGETS:
                signing.check(data, Targets, name, meta.version, signers)
            elif self.strict and name in signing.delegated(roles[TARGETS]):
                signing.check(data, Targets, name, meta.version, [roles[TARGETS]])
        return State(roots[-1], timestamp, snapshot, roles)

    async def holds(self, state: State, role: str) -> bool:
        """Whether what is in force of a delegated role is signed as targets say now."""
        version = state.roles[role].version
        try:
            signing.check(await self.file(role, version), Targets, role, version, [state.targets])
        except MetadataInvalid:
            return False
        return True

    async def version_on(self, state: State, role: str, after: int) -> int:
        """The version to sign on top of ``after``: the first number that nobody has spoilt by what is not valid.

        Raises Conflict where there is a valid one after ``after``: that comes first.
        """
        version = after + 1
        while (data := await self.probe(role, version)) is not None:
            with suppress(MetadataInvalid):
                signing.check(data, Targets, role, version, [state.root if role == TARGETS else state.targets])
                raise Conflict(f"version {version} of {role} is there already")
            version += 1
        return version

    async def roots(self) -> list[Root]:
        """The chain of roots, each signed by the one before; looked up once, then probed for new ones."""
        if not self._chain:
            self._chain.append(signing.check_root(await self.first_root()))
        while (data := await self.probe(ROOT, self._chain[-1].version + 1)) is not None:
            self._chain.append(signing.check_next_root(data, self._chain[-1]))
        return self._chain


def org_of_role(role: str) -> str:
    """The organisation whose role this is."""
    return role.partition("~")[0]


def _listed(state: State, role: str) -> MetaFile | None:
    return state.snapshot.meta.get(f"{role}.json")


def _fits(data: bytes, meta: MetaFile) -> None:
    try:
        meta.verify_length_and_hashes(data)
    except LengthOrHashMismatchError as error:
        raise MetadataInvalid("a file of the metadata is not the one that was signed for") from error
