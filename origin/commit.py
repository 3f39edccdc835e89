"""Signing what a ref means, on top of what others sign: the last step of a publish, and the store at hand."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from datetime import datetime
from typing import Protocol

from tuf.api.metadata import Targets

from origin import signing
from origin.keeping import claim
from origin.keyring import Keyring
from origin.signing import Ref, Source, State
from origin.storage import Storage
from origin.trust_store import ATTEMPTS, TrustStore
from shared.digest import Digest
from shared.errors import Conflict, NotFound, RequestError
from shared.ids import as_revision, is_revision
from shared.keys import NodeKey
from shared.manifest import Manifest
from shared.trust_names import org_of, private_role, public_role


class Signed(Protocol):
    """Where signed metadata is read and sent."""

    async def state(self, role: str) -> State:
        """What is in force, after whatever somebody signed for ``role`` and did not put in force."""
        ...

    async def next_version(self, role: str, after: int) -> int:
        """The version to sign on top of ``after``. Raises Conflict where somebody else has."""
        ...

    async def put_role(self, role: str, version: int, data: bytes) -> None:
        """Put a role's next version in force. Raises Conflict (``stale_metadata``) where somebody else has."""
        ...


def role_of(model: str, *, private: bool) -> str:
    """The role that says what a model's refs mean."""
    return private_role(org_of(model)) if private else public_role(org_of(model))


def meaning(state: State, model: str, ref: str, *, private: bool) -> Ref | None:
    """What a ref means to those whom the publish is for."""
    try:
        found = state.ref(model, ref)
    except NotFound:
        return None
    return found if found.private == private else None


def revision_meant(state: State, model: str, ref: str, *, private: bool) -> Digest | None:
    """The revision that a ref means, or that is named itself, to those whom the publish is for."""
    if is_revision(ref):
        return as_revision(ref)
    found = meaning(state, model, ref, private=private)
    return found.revision if found else None


def check_visibility(state: State, model: str, *, private: bool) -> None:
    """A model is for all, or it is not: one forgotten word must not show what was private until now.

    Raises Conflict (``other_visibility``).
    """
    other = state.roles.get(role_of(model, private=not private))
    if other and any(path.rpartition("/")[0] == model for path in other.targets):
        now, way = ("public", "without --private") if private else ("private", "with --private")
        raise Conflict(f"{model} is {now}: publish it {way}, or under another name", code="other_visibility")


def publisher_keyids(state: State, model: str, *, private: bool) -> Collection[str]:
    """The keys that sign for a model; none where nobody does."""
    try:
        return state.role(role_of(model, private=private)).keyids
    except NotFound:
        return ()


def publisher_keys(state: State, model: str, ring: Keyring, *, private: bool) -> list[NodeKey]:
    """The keys at hand that sign for a model. Raises RequestError (``not_publisher``)."""
    org = org_of(model)
    try:
        role = state.role(role_of(model, private=private))
    except NotFound:
        raise RequestError(
            f"nobody may publish for {org}; the operator can say who: nearshard trust add-publisher {org}",
            code="not_publisher",
        ) from None
    held = [ring[key] for key in role.keyids if key in ring]
    if len(held) < role.threshold:
        raise RequestError(f"none of the keys at hand may publish for {org}", code="not_publisher")
    return held


Edit = Callable[[Targets, datetime], None]
"""Changes a role's next version, that is signed at this time."""


async def sign_role(
    signed: Signed,
    ring: Keyring,
    now: Callable[[], datetime],
    model: str,
    prepare: Callable[[State], Edit | None],
    *,
    private: bool,
) -> bool:
    """Sign a change of what the refs of a model's organisation mean; again on top of others where they are faster.

    ``prepare`` says what is to be changed in a state, if anything. Gives whether anything was. Raises what it raises,
    Conflict, RequestError (``not_publisher``).
    """
    role = role_of(model, private=private)
    for _ in range(ATTEMPTS):
        state = await signed.state(role)
        check_visibility(state, model, private=private)
        edit = prepare(state)
        if edit is None:
            return False
        keys, at = publisher_keys(state, model, ring, private=private), now()
        try:
            if empty := missing_roles(state, org_of(model), keys, at):  # the organisation's first publish
                for name, data in empty.items():
                    await signed.put_role(name, 1, data)
                continue
            old = state.roles[role]
            made = signing.next_of(old, at, role, version=await signed.next_version(role, old.version))
            edit(made, at)
            await signed.put_role(role, made.version, signing.sign(made, keys))
        except Conflict as error:
            if error.error_code != Conflict.code:
                raise
        else:
            return True
    raise Conflict("others publish all the time")


async def move_ref(
    signed: Signed,
    ring: Keyring,
    now: Callable[[], datetime],
    model: str,
    ref: str,
    manifest: Manifest,
    before: Ref | None,
    source: Source | None = None,
    *,
    private: bool,
) -> bool:
    """Sign that ``ref`` means ``manifest``, taken from ``source``, which it did not ``before``, to everybody: a rollout
    of it ends.

    Raises Conflict (``ref_conflict``) where the ref was moved meanwhile, RequestError (``not_publisher``).
    """
    revision = manifest.revision

    def prepare(state: State) -> Edit | None:
        current = meaning(state, model, ref, private=private)
        if current and (current.revision, current.source) == (revision, source):
            return None
        if _revision(current) != _revision(before):
            raise Conflict(f"{model}@{ref} was moved by somebody else meanwhile", code="ref_conflict")
        size = len(manifest.encoded)
        return lambda made, at: signing.set_ref(made, model, ref, revision, size, at, source)

    return await sign_role(signed, ring, now, model, prepare, private=private)


def missing_roles(state: State, org: str, keys: list[NodeKey], now: datetime) -> dict[str, bytes]:
    """Empty metadata for the roles of an organisation that have none yet."""
    return {name: data for name, data in signing.empty_roles(org, keys, now).items() if name not in state.roles}


def _revision(ref: Ref | None) -> Digest | None:
    return ref.revision if ref else None


async def store_manifest(storage: Storage, manifest: Manifest, space: str) -> bool:
    """Claim a manifest's shards, then store it; durable on return. ``space``: the model of private shards, or empty.

    Gives False where shards are missing, and stores nothing.
    """
    await storage.sync()
    if await claim(storage, manifest, space):
        return False
    if not await storage.has_manifest(manifest.model, manifest.revision):
        await storage.put_manifest(manifest)
        await storage.sync()
    return True


class LocalSink:
    """A store at hand. The publisher holds its own key and the online key."""

    def __init__(self, trust: TrustStore, ring: Keyring, now: Callable[[], datetime]) -> None:
        """``ring``: the publisher's keys and the online key."""
        self._trust, self._storage, self._ring, self._now = trust, trust.storage, ring, now
        self._space = ""
        """The model whose private shards are stored; empty for public ones."""

    async def begin(self, model: str, ref: str, *, private: bool) -> Ref | None:
        """Take up what was left, and see that it can be signed in the end. Raises RequestError, ConfigError."""
        self._space = model if private else ""
        await self._trust.roll_forward(self._online(await self._trust.state()), self._now())
        state = await self._trust.state()
        publisher_keys(state, model, self._ring, private=private)
        check_visibility(state, model, private=private)
        await self._storage.sweep(self._now())
        return meaning(state, model, ref, private=private)

    async def ensure_blob(self, digest: Digest, data: memoryview) -> bool:
        """Store a shard unless it is there."""
        return await self._storage.ensure_blob(digest, data, self._space)

    async def manifest(self, model: str, ref: str, *, private: bool) -> Manifest | None:
        """The manifest that a ref or revision means; None where there is none."""
        revision = revision_meant(await self._trust.state(), model, ref, private=private)
        with suppress(NotFound):
            return await self._storage.manifest(model, revision) if revision else None
        return None

    async def read_blob(self, digest: Digest) -> bytes:
        """A shard from the store, checked. Raises NotFound, IntegrityError."""
        return await self._storage.read_blob(digest, self._space)

    async def put_manifest(self, manifest: Manifest) -> bool:
        """Store a manifest, after all of its shards."""
        return await store_manifest(self._storage, manifest, self._space)

    async def move_ref(
        self,
        model: str,
        ref: str,
        manifest: Manifest,
        before: Ref | None,
        source: Source | None = None,
        *,
        private: bool,
    ) -> bool:
        """Sign what the ref means, and put it in force."""
        return await move_ref(self, self._ring, self._now, model, ref, manifest, before, source, private=private)

    async def state(self, role: str) -> State:
        """What is in force, a publish that was cut off included."""
        await self._trust.roll_forward(self._online(await self._trust.state()), self._now(), [role])
        return await self._trust.state()

    async def next_version(self, role: str, after: int) -> int:
        """The version to sign on top of ``after``. Raises Conflict."""
        return await self._trust.next_version(role, after)

    async def put_role(self, role: str, version: int, data: bytes) -> None:
        """Store a role's next version and put it in force. Raises Conflict."""
        online = self._online(await self._trust.state())
        await self._trust.create([(role, version, data)])
        await self._trust.roll_forward(online, self._now(), [role])

    def _online(self, state: State) -> list[NodeKey]:
        return signing.holders(state.root.get_delegated_role("timestamp"), self._ring, "the timestamp")
