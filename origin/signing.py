"""The signed metadata (The Update Framework 1.0): made, signed, and checked by who signs. Pure.

Metadata is bytes once it is signed: whoever lists it in a snapshot names these bytes. ``State`` is what one
``timestamp.json`` leads to, checked along the delegations; publishers and the origin sign on top of one.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import Key, Signature, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from shared.digest import Digest, hex_of, parse_digest
from shared.errors import BadId, ConfigError, MetadataInvalid, NotFound, RequestError
from shared.ids import parse_model, parse_ref
from shared.keys import NodeKey, check_public
from shared.rollout import Rollout
from shared.trust_names import (
    ACCESS,
    LIFETIMES,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    org_of,
    private_role,
    public_role,
    target_path,
)

S = TypeVar("S", Root, Timestamp, Snapshot, Targets)

CUSTOM = "nearshard"
"""The field of ``access`` that has what is ours."""
NO_TOKENS: Mapping[str, Any] = {"token_keys": [], "revoked": []}
MAX_REFS = 100_000
"""Targets of one role."""
MAX_METADATA = 5 << 20
"""Bytes of one file: what who checks takes."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a revision was taken from, by the word of whoever signed it: the hub's base URL, its name there, and what
    that hub calls this state of it. ``followed``: whether an origin follows the ref there by itself; else somebody took
    it from there once."""

    hub: str
    model: str
    commit: str
    followed: bool = False


@dataclass(frozen=True, slots=True)
class Ref:
    """What a ref means: a revision, its manifest's size in bytes, since when (ISO 8601, UTC), to whom, and where it was
    taken from if it was not published here first; ``rollout``: to whom it means another one."""

    revision: Digest
    published: str
    size: int
    private: bool = False
    source: Source | None = None
    rollout: Rollout | None = None


@dataclass(frozen=True)
class State:
    """What one ``timestamp.json`` leads to. ``roles``: ``targets`` and all that it delegates to, by name."""

    root: Root
    timestamp: Timestamp
    snapshot: Snapshot
    roles: Mapping[str, Targets]

    @property
    def targets(self) -> Targets:
        """The top-level targets: who may sign for which organisation."""
        return self.roles[TARGETS]

    def expiries(self) -> dict[str, float]:
        """When each role expires, in seconds since 1970."""
        signed = {ROOT: self.root, TIMESTAMP: self.timestamp, SNAPSHOT: self.snapshot, **self.roles}
        return {name: made.expires.timestamp() for name, made in signed.items()}

    def orgs(self) -> list[str]:
        """The organisations that are delegated, sorted."""
        suffix = public_role("")
        return sorted(name.removesuffix(suffix) for name in delegated(self.targets) if name.endswith(suffix))

    def role(self, name: str) -> Role:
        """Who must sign for a role. Raises NotFound for one that nobody delegates."""
        if name in (ROOT, TARGETS, SNAPSHOT, TIMESTAMP):
            return self.root.get_delegated_role(name)
        found = delegated(self.targets).get(name)
        if found is None:
            raise NotFound(f"nobody signs for {name}", code="unknown_role")
        return found

    def key(self, key_id: str) -> Key | None:
        """A key that any role names."""
        delegations = self.targets.delegations
        return self.root.keys.get(key_id) or (delegations.keys.get(key_id) if delegations else None)

    def ref(self, model: str, ref: str) -> Ref:
        """What a ref means. Raises NotFound: ``unknown_model`` or ``unknown_revision``."""
        path, org = target_path(model, ref), org_of(model)
        public, private = self.roles.get(public_role(org)), self.roles.get(private_role(org))
        if public and (target := public.targets.get(path)):
            return ref_of(target)
        if private and (target := private.targets.get(path)) and ref in self.refs(model):
            return ref_of(target, private=True)
        self.refs(model)
        raise NotFound(f"{model} has no ref {ref!r}", code="unknown_revision")

    def refs(self, model: str) -> dict[str, Ref]:
        """The refs of a model, by name, sorted. Raises NotFound for a model that has none.

        A model that has public refs is public: should it have private ones too, they are no refs of it.
        """
        found = {ref: meaning for name, ref, meaning in self.all_refs(org_of(model)) if name == model}
        if public := {ref: meaning for ref, meaning in found.items() if not meaning.private}:
            found = public
        if not found:
            raise NotFound(f"there is no model {model}", code="unknown_model")
        return dict(sorted(found.items()))

    def models(self) -> list[str]:
        """The models that have a ref, sorted."""
        return sorted({model for model, _, _ in self.all_refs()})

    def all_refs(self, org: str = "") -> Iterator[tuple[str, str, Ref]]:
        """Model, name and meaning of every ref, of all organisations or of one."""
        for one in [org] if org else self.orgs():
            for role, private in ((public_role(one), False), (private_role(one), True)):
                for path, target in (self.roles[role].targets if role in self.roles else {}).items():
                    model, _, ref = path.rpartition("/")
                    yield model, ref, ref_of(target, private=private)


def ref_of(target: TargetFile, *, private: bool = False) -> Ref:
    """What a target says of its ref. Raises MetadataInvalid."""
    try:
        published = str(target.custom["published"])
        revision = parse_digest("sha256:" + target.hashes["sha256"])
        rule = target.custom.get("rollout")
        rollout = None if rule is None else Rollout.parse(rule)
        return Ref(revision, published, target.length, private, _source_of(target.custom.get("source")), rollout)
    except (BadId, KeyError, TypeError, ValueError) as error:
        raise MetadataInvalid(f"the target {target.path!r} is not a ref") from error


def _source_of(field: object) -> Source | None:
    """What a target says of where it is from. Raises KeyError, TypeError."""
    if field is None:
        return None
    if not isinstance(field, dict) or not all(isinstance(field[name], str) for name in ("hub", "model", "commit")):
        raise TypeError("not a source")
    return Source(field["hub"], field["model"], field["commit"], field.get("followed") is True)


# Keys


def key_of(public: bytes) -> Key:
    """A public key as metadata names it. Raises RequestError (``bad_key``)."""
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(check_public(public)))


def key_id(key: NodeKey) -> str:
    """What metadata calls a key: 64 hex digits."""
    return str(key_of(key.public).keyid)


def public_of(key: Key) -> bytes:
    """The checked bytes of a key in metadata. Raises MetadataInvalid: only Ed25519, and never of small order."""
    try:
        if (key.keytype, key.scheme) != ("ed25519", "ed25519") or key.keyval.keys() != {"public"}:
            raise MetadataInvalid("a key that is not Ed25519")
        return check_public(bytes.fromhex(key.keyval["public"]))
    except (RequestError, ValueError, TypeError) as error:
        raise MetadataInvalid(f"a key that is not acceptable: {error}") from error


def keys_named(state: State, role: str) -> dict[str, Key]:
    """The keys of a role, by id. Raises NotFound."""
    return {name: key for name in state.role(role).keyids if (key := state.key(name))}


def holders(role: Role, ring: Mapping[str, NodeKey], name: str) -> list[NodeKey]:
    """The keys at hand that may sign for a role. Raises ConfigError where they are fewer than must."""
    held = [ring[key] for key in role.keyids if key in ring]
    if len(held) < role.threshold:
        missing = ", ".join(key[:16] for key in role.keyids if key not in ring)
        raise ConfigError(
            f"{name} is signed by {role.threshold} of its keys, and {len(held)} are at hand; not found: {missing}"
        )
    return held


# Signing


def sign(signed: Signed, keys: Iterable[NodeKey]) -> bytes:
    """Metadata with the signatures of these keys, as it is stored."""
    metadata: Metadata[Any] = Metadata(signed)
    message = metadata.signed_bytes
    for key in keys:
        name = key_id(key)
        metadata.signatures[name] = Signature(name, key.sign(message).hex())
    return metadata.to_bytes()


def until(now: datetime, role: str) -> datetime:
    """When metadata that is made now expires."""
    return now.astimezone(UTC).replace(microsecond=0) + lifetime(role)


def lifetime(role: str) -> timedelta:
    """How long metadata of a role is good for."""
    return LIFETIMES.get(role, LIFETIMES["publisher"])


def next_of(signed: S, now: datetime, role: str, *, version: int = 0) -> S:
    """A copy to change: the next version (or ``version``), good from now on."""
    made = copy.deepcopy(signed)
    made.version = version or signed.version + 1
    made.expires = until(now, role)
    return made


def root_of(now: datetime, root_keys: Sequence[NodeKey], threshold: int, targets: NodeKey, online: NodeKey) -> Root:
    """The first root. Raises ConfigError for a threshold that its keys cannot meet."""
    if not 1 <= threshold <= len(root_keys):
        raise ConfigError(f"of {len(root_keys)} root keys, {threshold} cannot be needed")
    root = Root(expires=until(now, ROOT), consistent_snapshot=True)
    for name, keys in ((ROOT, root_keys), (TARGETS, [targets]), (SNAPSHOT, [online]), (TIMESTAMP, [online])):
        for key in keys:
            root.add_key(key_of(key.public), name)
    root.roles[ROOT].threshold = threshold
    return root


def first_targets(now: datetime, online: NodeKey) -> Targets:
    """Top-level targets that delegate ``access`` to the online key, and nothing to any organisation yet."""
    targets = Targets(expires=until(now, TARGETS), delegations=Delegations({}, {}))
    _delegate(targets, ACCESS, ["~access/*"])
    targets.add_key(key_of(online.public), ACCESS)
    return targets


def first_access(now: datetime, fields: Mapping[str, Any] = NO_TOKENS) -> Targets:
    """``access`` at version 1."""
    return Targets(expires=until(now, ACCESS), unrecognized_fields={CUSTOM: dict(fields)})


def empty_roles(org: str, keys: Sequence[NodeKey], now: datetime) -> dict[str, bytes]:
    """The roles of an organisation that has published nothing, at version 1."""
    return {role: sign(Targets(expires=until(now, role)), keys) for role in (public_role(org), private_role(org))}


def add_publisher(targets: Targets, org: str, key: Key) -> None:
    """Let a key sign for an organisation."""
    for role in (public_role(org), private_role(org)):
        if role not in delegated(targets):
            _delegate(targets, role, [f"{org}/*/*"])
        targets.add_key(key, role)


def delegated(targets: Targets) -> Mapping[str, DelegatedRole]:
    """The roles that targets delegate to, by name."""
    return (targets.delegations.roles if targets.delegations else None) or {}


def _delegate(targets: Targets, role: str, paths: list[str]) -> None:
    assert targets.delegations is not None and targets.delegations.roles is not None
    targets.delegations.roles[role] = DelegatedRole(role, [], 1, False, paths=paths)


def set_ref(
    role: Targets,
    model: str,
    ref: str,
    revision: Digest,
    size: int,
    now: datetime,
    source: Source | None = None,
) -> None:
    """Make a ref mean a revision, whose manifest has ``size`` bytes."""
    custom: dict[str, Any] = {"published": now.astimezone(UTC).isoformat(timespec="seconds")}
    if source:
        custom["source"] = asdict(source)
    path = target_path(model, ref)
    role.targets[path] = TargetFile(size, {"sha256": hex_of(revision)}, path, {"custom": custom})


def set_rollout(role: Targets, model: str, ref: str, rule: Rollout | None) -> None:
    """Have a ref mean another revision to some, beside the one that it means; None: to nobody any more."""
    path = target_path(model, ref)
    before = role.targets[path]
    custom = {name: value for name, value in (before.custom or {}).items() if name != "rollout"}
    if rule:
        custom["rollout"] = rule.record()
    role.targets[path] = TargetFile(before.length, before.hashes, path, {"custom": custom})


def listed(data: bytes, version: int) -> MetaFile:
    """How a snapshot or timestamp names a file: version, length and SHA-256, so that states cannot be mixed."""
    return MetaFile.from_data(version, data, ["sha256"])


# Checking


def parse(data: bytes, kind: type[S]) -> tuple[S, Metadata[Any]]:
    """Metadata of one kind, with its signatures; nothing of it is proven yet. Raises MetadataInvalid."""
    if len(data) > MAX_METADATA:
        raise MetadataInvalid(f"more than {MAX_METADATA} bytes of metadata")
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(data)
    except (RepositoryError, ValueError) as error:
        raise MetadataInvalid("not metadata of The Update Framework") from error
    signed = metadata.signed
    if not isinstance(signed, kind):
        raise MetadataInvalid("metadata of another type")
    for key in _keys(signed):
        if key_of(public_of(key)).keyid != key.keyid:  # one key under two names would count as two
            raise MetadataInvalid("a key that is not named as its bytes say")
    return signed, metadata


def check(data: bytes, kind: type[S], role: str, version: int, delegators: Collection[Root | Targets]) -> S:
    """Metadata of a role at a version, signed as one of its delegators asks. Raises MetadataInvalid."""
    signed, metadata = parse(data, kind)
    if signed.version != version:
        raise MetadataInvalid(f"{role}: version {signed.version} in the file of version {version}")
    trouble: Exception | None = None
    for delegator in delegators:
        try:
            delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except (RepositoryError, ValueError) as error:
            trouble = error
        else:
            return signed
    raise MetadataInvalid(f"{role}: not signed by whom it is delegated to") from trouble


def check_root(data: bytes) -> Root:
    """A root that is trusted for where it was found, and signed by itself. Raises MetadataInvalid."""
    made, _ = parse(data, Root)
    return check(data, Root, ROOT, made.version, [made])


def check_next_root(data: bytes, root: Root) -> Root:
    """The root after ``root``: signed by both. Raises MetadataInvalid."""
    version = root.version + 1
    made = check(data, Root, ROOT, version, [root])
    return check(data, Root, ROOT, version, [made])


def check_refs(signed: Targets, org: str) -> None:
    """Whether an organisation's role says nothing but what its own refs mean. Raises MetadataInvalid."""
    if signed.delegations is not None or len(signed.targets) > MAX_REFS:
        raise MetadataInvalid("an organisation's role has refs, not too many, and delegates to nobody")
    for path, target in signed.targets.items():
        model, _, ref = path.rpartition("/")
        try:
            parse_model(model), parse_ref(ref)
        except BadId as error:
            raise MetadataInvalid("a target that is not a ref's") from error
        if org_of(model) != org or target.hashes.keys() != {"sha256"}:
            raise MetadataInvalid("a target of another organisation, or with other hashes than SHA-256")
        ref_of(target)


def roles_of_org(model: str) -> tuple[str, str]:
    """The roles that say what the refs of a model's organisation mean."""
    return public_role(org_of(model)), private_role(org_of(model))


def changed_targets(before: Mapping[str, TargetFile], after: Mapping[str, TargetFile]) -> list[str]:
    """The paths that mean something else, are new, or are gone."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def _keys(signed: Signed) -> list[Key]:
    if isinstance(signed, Root):
        return list(signed.keys.values())
    if isinstance(signed, Targets) and signed.delegations:
        return list(signed.delegations.keys.values())
    return []
