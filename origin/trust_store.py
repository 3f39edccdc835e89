"""The signed metadata in the origin's store: what is in force, and how it changes.

Every file but ``timestamp.json`` is created once and never changes. A change is three steps::

    <N+1>.<role>.json     created only where it is not there: of two who sign the same version, one wins
    <M+1>.snapshot.json   created likewise: all roles, each at its newest version that is signed as it must be
    timestamp.json        replaced, where nobody else did so meanwhile: from here on the change is seen, whole

What a role signs for was stored before, so a change that was cut off after its first step is whole: whoever holds
the online key comes next (a publisher, or the origin by itself) and takes the other two (``roll_forward``). Two
who do this at once are of no harm: each looks again after it lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta

from tuf.api.metadata import MetaFile, Root, Snapshot, Targets, Timestamp

from origin import signing
from origin.objects import Version
from origin.signing import Ref, State
from origin.storage import Storage
from origin.trust_reader import TrustReader, org_of_role
from shared.digest import Digest
from shared.errors import ConfigError, Conflict, MetadataInvalid, NotFound
from shared.ids import as_revision, is_revision
from shared.keys import NodeKey
from shared.rollout import NOBODY, Subject, meant_for
from shared.trust_names import (
    ACCESS,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    file_name,
    parse_file_name,
)

FOLDER = "trust"
"""Where the files are in the store."""
ATTEMPTS = 100
"""Times that a change is tried on top of others' changes: each of them got on meanwhile."""
RENEW: Mapping[str, timedelta] = {
    TIMESTAMP: timedelta(hours=1),
    SNAPSHOT: timedelta(days=1),
    ACCESS: timedelta(days=1),
}
"""The age at which what is signed online is signed anew."""


class TrustStore(TrustReader):
    """What refs mean, from the signed metadata. Safe to use from several processes."""

    strict = False

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self._timestamp = b""
        self._state: State | None = None

    def __repr__(self) -> str:
        return f"<TrustStore of {self.storage!r}>"

    # What is in force

    async def state(self) -> State:
        """What ``timestamp.json`` leads to now. Raises ConfigError where there is none, MetadataInvalid."""
        data, _ = await self._seen_timestamp()
        if self._state is None or data != self._timestamp:
            self._state, self._timestamp = await self.load(data, self._state), data
        return self._state

    async def exists(self) -> bool:
        """Whether there is any metadata here."""
        return await self.probe(ROOT, 1) is not None

    async def file(self, role: str, version: int) -> bytes:
        """A file of the metadata. Raises NotFound."""
        try:
            return (await self.storage.get(_path(role, version)))[0]
        except NotFound as error:
            raise NotFound(str(error), code="unknown_metadata") from None

    async def ref(self, model: str, ref: str) -> Ref:
        """What a ref means. Raises NotFound: ``unknown_model`` or ``unknown_revision``."""
        return (await self.state()).ref(model, ref)

    async def refs(self, model: str) -> dict[str, Ref]:
        """The refs of a model. Raises NotFound for a model that has none."""
        return (await self.state()).refs(model)

    async def resolve(self, model: str, ref: str, who: Subject = NOBODY) -> Digest:
        """The revision that a ref (to ``who``) or revision means. Raises NotFound for a ref."""
        if is_revision(ref):
            return as_revision(ref)
        found = await self.ref(model, ref)
        rule = found.rollout
        return rule.revision if rule and meant_for(rule, model, ref, who) else found.revision

    async def models(self) -> list[str]:
        """The models that have a ref, sorted."""
        return (await self.state()).models()

    async def meant(self) -> dict[str, set[Digest]]:
        """By model all revisions that a ref means, private models too: what garbage collection keeps. Also those of a
        publish that was cut off after it signed, since whoever comes next puts that in force.

        Raises ConfigError, MetadataInvalid.
        """
        state = await self.state()
        signed = dict(state.roles)
        for role in signing.delegated(state.targets):
            if newest := (await self._newest(role, state.snapshot, state.targets))[0]:
                signed[role] = newest
        found: dict[str, set[Digest]] = {}
        for model, _, ref in (*state.all_refs(), *replace(state, roles=signed).all_refs()):
            found.setdefault(model, set()).update([ref.revision, *([ref.rollout.revision] if ref.rollout else [])])
        return found

    async def in_force(self) -> dict[str, int]:
        """By role the version that clients are to have now, as timestamp and snapshot name them. Raises ConfigError,
        MetadataInvalid."""
        snapshot = (await self.state()).snapshot
        roles = {name.removesuffix(".json"): meta.version for name, meta in snapshot.meta.items()}
        return {SNAPSHOT: snapshot.version, **roles}

    # Changes

    async def create(self, files: Sequence[tuple[str, int, bytes]]) -> None:
        """Store new versions of roles (role, version, metadata), in this order. The first that is there already
        stops it, unless it has the same bytes. Raises Conflict (``stale_metadata``)."""
        for role, version, data in files:
            created = await self.storage.create(_path(role, version), data)
            if not created and await self.file(role, version) != data:
                raise Conflict(f"version {version} of {role} is there already", public={"role": role})

    async def next_version(self, role: str, after: int) -> int:
        """The version to sign on top of ``after``. Raises Conflict where somebody else has."""
        return await self.version_on(await self.state(), role, after)

    async def roll_forward(
        self,
        online: Sequence[NodeKey],
        now: datetime,
        roles: Collection[str] = (),
        *,
        renew: bool = False,
        force: bool = False,
    ) -> bool:
        """Put the newest versions of ``roles`` (of all, by default) in force, signed by ``online``: the online key,
        and while it is being replaced the new one too.

        ``renew``: also sign anew what grows old; ``force``: sign a new snapshot and timestamp in any case. Gives
        whether anything changed. Raises ConfigError (not the online key), Conflict, MetadataInvalid.
        """
        for attempt in range(ATTEMPTS):
            seen, version = await self._seen_timestamp()
            state = await self.load(seen, self._state)
            self._require_online(state, online)
            if renew and not attempt:
                await self._renew_access(state, online, now)
            snapshot, data = await self._snapshot(state, online, now, roles, renew=renew, force=force and not attempt)
            old = state.timestamp
            moved = snapshot.version != state.snapshot.version
            if not moved and not force and not (renew and due(old.expires, TIMESTAMP, now)):
                return attempt > 0
            made = signing.next_of(old, now, TIMESTAMP)
            made.snapshot_meta = signing.listed(data, snapshot.version)
            if await self.storage.replace(_path(TIMESTAMP, 0), signing.sign(made, online), version):
                return True
        raise Conflict("others change the metadata all the time", code="stale_metadata")

    async def change_access(
        self, change: Callable[[object], Mapping[str, object]], online: Sequence[NodeKey], now: datetime
    ) -> None:
        """Say whose tokens are good: a new version of ``access``, put in force, with what ``change`` makes of its
        ``nearshard`` fields; made again on top of others' changes where they are faster, so none is lost."""
        for _ in range(ATTEMPTS):
            state = await self.state()
            with suppress(Conflict):
                fields = change(state.roles[ACCESS].unrecognized_fields[signing.CUSTOM])
                await self.sign_access(state, fields, online, now)
                await self.roll_forward(online, now)
                return
            await self.roll_forward(online, now)
        raise Conflict("others change the metadata all the time")

    async def begin(self, root: bytes, roles: Mapping[str, bytes], online: NodeKey, now: datetime) -> None:
        """Store the first metadata: root, and ``targets``, ``access`` and organisations' roles, each at version 1.

        Raises ConfigError where there is some: a second root would be another network's.
        """
        names = {TARGETS: roles[TARGETS], **roles}
        if not await self.storage.create(_path(ROOT, 1), root):
            raise ConfigError(f"{self.storage.location}: there is signed metadata already")
        await self.create([(role, 1, data) for role, data in reversed(names.items())])
        snapshot = Snapshot(expires=signing.until(now, SNAPSHOT))
        snapshot.meta = {f"{role}.json": signing.listed(data, 1) for role, data in names.items()}
        data = signing.sign(snapshot, [online])
        timestamp = Timestamp(expires=signing.until(now, TIMESTAMP), snapshot_meta=signing.listed(data, 1))
        await self.create([(SNAPSHOT, 1, data), (TIMESTAMP, 1, signing.sign(timestamp, [online]))])

    # Reading

    async def first_root(self) -> bytes:
        """The oldest root that is kept. Raises MetadataInvalid where there is none."""
        files = [path.rpartition("/")[2] async for path in self.storage.paths(FOLDER)]
        versions = [found[1] for name in files if (found := parse_file_name(name)) and found[0] == ROOT]
        if not versions:
            raise MetadataInvalid(f"{self.storage.location}: there is no root")
        return await self.file(ROOT, min(versions))

    async def _seen_timestamp(self) -> tuple[bytes, Version]:
        try:
            return await self.storage.get(_path(TIMESTAMP, 0))
        except NotFound:
            raise ConfigError(
                f"{self.storage.location}: there is no signed metadata here; make it with:"
                f" nearshard trust init --store {self.storage.location} --keys DIR --org ORG",
                code="no_metadata",
            ) from None

    # Signing online

    def _require_online(self, state: State, online: Sequence[NodeKey]) -> None:
        ring = {signing.key_id(key): key for key in online}
        for role in (SNAPSHOT, TIMESTAMP):
            signing.holders(state.root.get_delegated_role(role), ring, role)

    async def _snapshot(
        self,
        state: State,
        online: Sequence[NodeKey],
        now: datetime,
        roles: Collection[str],
        *,
        renew: bool,
        force: bool,
    ) -> tuple[Snapshot, bytes]:
        """The snapshot to put in force: what is, one that was stored and not put in force, or a new one."""
        signers = [state.root]
        base, data = state.snapshot, await self.file(SNAPSHOT, state.snapshot.version)
        version = base.version
        while (found := await self.probe(SNAPSHOT, version + 1)) is not None:
            version += 1
            with suppress(MetadataInvalid):
                base, data = signing.check(found, Snapshot, SNAPSHOT, version, signers), found
        meta = await self._newest_roles(state, base, roles)
        old = force or (renew and due(base.expires, SNAPSHOT, now))
        if not old and all(base.meta.get(name) == listed for name, listed in meta.items()):
            return base, data
        made = signing.next_of(base, now, SNAPSHOT, version=version + 1)
        made.meta = {**base.meta, **meta}  # what was once listed stays: clients take a missing one for a rollback
        data = signing.sign(made, online)
        if not await self.storage.create(_path(SNAPSHOT, made.version), data):
            return await self._snapshot(state, online, now, roles, renew=renew, force=force)
        return made, data

    async def _newest_roles(self, state: State, base: Snapshot, roles: Collection[str]) -> dict[str, MetaFile]:
        """Roles (all, where none is named) at their newest versions that are signed as they must be.

        What is not is passed over: its number is lost, and the next one is free.
        """
        targets, found = await self._newest(TARGETS, base, state.root)
        if targets is None:
            meta = base.meta[f"{TARGETS}.json"]
            targets, _ = signing.parse(await self.file(TARGETS, meta.version), Targets)
        for name in roles or signing.delegated(targets):
            found |= (await self._newest(name, base, targets))[1]
        return found

    async def _newest(
        self, role: str, base: Snapshot, delegator: Root | Targets
    ) -> tuple[Targets | None, dict[str, MetaFile]]:
        """A role that is newer than a snapshot has it, and what to list for it; None and nothing where none is."""
        listed = base.meta.get(f"{role}.json")
        version = listed.version if listed else 0
        newest: Targets | None = None
        found: dict[str, MetaFile] = {}
        while (data := await self.probe(role, version + 1)) is not None:
            version += 1
            with suppress(MetadataInvalid):
                newest = signing.check(data, Targets, role, version, [delegator])
                if role not in (TARGETS, ACCESS):
                    signing.check_refs(newest, org_of_role(role))
                found = {f"{role}.json": signing.listed(data, version)}
        return (newest if found else None), found

    async def _renew_access(self, state: State, online: Sequence[NodeKey], now: datetime) -> None:
        access = state.roles[ACCESS]
        if due(access.expires, ACCESS, now):
            with suppress(Conflict):  # somebody else did
                await self.sign_access(state, access.unrecognized_fields[signing.CUSTOM], online, now)

    async def sign_access(self, state: State, fields: object, online: Sequence[NodeKey], now: datetime) -> None:
        """Store a new version of ``access``, not in force yet. Raises Conflict."""
        old = state.roles[ACCESS]
        made = signing.next_of(old, now, ACCESS, version=await self.next_version(ACCESS, old.version))
        made.unrecognized_fields[signing.CUSTOM] = fields
        await self.create([(ACCESS, made.version, signing.sign(made, online))])


def due(expires: datetime, role: str, now: datetime) -> bool:
    """Whether metadata that is signed online is to be signed anew."""
    return now >= expires - signing.lifetime(role) + RENEW[role]


def _path(role: str, version: int) -> str:
    return f"{FOLDER}/{file_name(role, version)}"
