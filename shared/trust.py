"""What is believed of the signed metadata, and how it moves on (The Update Framework 1.0, client workflow §5.3-5.6).

No I/O: ``refresh`` is a generator that says which file it wants next and is sent its bytes, so that everything which
fetches and everything which tests goes through the same steps. The rules of each step are python-tuf's
(``TrustedMetadataSet``); what it leaves open is decided here:

* Only Ed25519 keys, each once in a document: one key under two ids would count twice for a threshold.
* The same version with other content is named for what it is (python-tuf keeps what it had, and says nothing).
* What was verified once expires while it is kept: ``check`` says so whenever it is used.
* A timestamp that was signed later than now means that this machine's clock is behind.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from tuf.api.exceptions import (
    BadVersionNumberError,
    EqualVersionNumberError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    UnsignedMetadataError,
)
from tuf.api.metadata import DelegatedRole, Metadata, MetaFile, Root, Signed, TargetFile, Targets
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from shared import codec
from shared.digest import Digest, parse_digest
from shared.errors import (
    BadId,
    ClockSkew,
    DecodeError,
    EquivocationDetected,
    KeyRevoked,
    MetadataExpired,
    MetadataTooLarge,
    MixedMetadata,
    RequestError,
    RollbackDetected,
    SignatureInvalid,
    ThresholdNotMet,
    TrustError,
    UnknownKey,
)
from shared.ids import is_commit, parse_model, parse_ref
from shared.keys import parse_public
from shared.manifest import MAX_MANIFEST
from shared.rollout import Rollout, Subject, meant_for
from shared.trust_names import (
    ACCESS,
    LIFETIMES,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    file_name,
    org_of,
    private_org,
    private_role,
    public_role,
    target_path,
)

LIMITS: Mapping[str, int] = {ROOT: 512 << 10, TIMESTAMP: 16 << 10, SNAPSHOT: 2 << 20, TARGETS: 5 << 20}
"""Bytes of a file; every delegated role has that of targets."""
MAX_ROTATIONS = 32
"""New roots that one refresh goes through."""
MAX_SIGNATURES = 64
SKEW = 300.0
"""Seconds that clocks may differ."""
MAX_ROLES = 64 << 20
"""Bytes of delegated roles that are kept; those loaded first are let go, and loaded again when they are needed."""
MAX_RETIRED = 1024
"""Ids of keys that were good once that are kept, to call a revoked key by its name."""
NEVER = 0.0
"""As the moment that expiry is judged at: nothing had expired then. Signatures, versions and hashes are judged as ever;
for what an operator accepts by name (``shared.acceptance``), and for nothing else."""
_MAX_KEPT = 256 << 20
_FIELD = "nearshard"
"""Our own field in the signed part of role ``access``."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file that ``refresh`` needs: its name, and the most bytes that it may have. ``optional``: it may not exist."""

    name: str
    limit: int
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What a ref means: a manifest of ``length`` bytes."""

    revision: Digest
    length: int
    published: str
    """When, as ISO 8601 in UTC; empty where the publisher did not say."""
    private: bool
    commit: str = ""
    """What the hub that it was taken from calls it, where the publisher says so: 40 hex digits."""
    rollout: Rollout | None = None
    """By which it means another revision to some."""

    def meant_for(self, model: str, ref: str, who: Subject) -> Target:
        """What the ref means to ``who``."""
        rule = self.rollout
        if rule is None or not meant_for(rule, model, ref, who):
            return self
        return replace(self, revision=rule.revision, length=rule.size, commit="")


@dataclass(frozen=True, slots=True)
class Kept:
    """Metadata as it came, for the next process: verified once, and verified again before it is used."""

    roots: tuple[bytes, ...]
    """Each with a version one higher than the one before."""
    timestamp: bytes = b""
    snapshot: bytes = b""
    targets: bytes = b""
    roles: Mapping[str, bytes] = field(default_factory=dict)
    retired: frozenset[str] = frozenset()
    """Ids of keys that were good once."""
    order: tuple[int, int, int] = (0, 0, 0)
    """Versions of root and timestamp, and how many roles there are: whoever has more of it knows better."""

    def encode(self) -> bytes:
        """For a file."""
        return codec.encode(
            {
                "order": list(self.order),
                "roots": list(self.roots),
                "timestamp": self.timestamp,
                "snapshot": self.snapshot,
                "targets": self.targets,
                "roles": [[name, data] for name, data in self.roles.items()],
                "retired": sorted(self.retired)[:MAX_RETIRED],
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> Kept:
        """What ``encode`` gave. Raises DecodeError."""
        document = codec.decode(data, _MAX_KEPT)
        try:
            root, timestamp, roles = document["order"]
            kept = cls(
                tuple(document["roots"]),
                document["timestamp"],
                document["snapshot"],
                document["targets"],
                dict(document["roles"]),
                frozenset(document["retired"]),
                (root, timestamp, roles),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DecodeError("no kept metadata") from error
        files = (*kept.roots, kept.timestamp, kept.snapshot, kept.targets, *kept.roles.values())
        names = (*kept.roles, *kept.retired)
        if not all(type(item) is bytes for item in files) or not all(type(name) is str for name in names):
            raise DecodeError("no kept metadata")
        if not all(type(number) is int for number in kept.order):
            raise DecodeError("no kept metadata")
        return kept


@dataclass(frozen=True, slots=True)
class Verified:
    """A delegated role, verified: its file and what it says."""

    data: bytes
    version: int
    expires: float
    targets: Mapping[tuple[str, str], Target]
    """By model and ref."""
    models: frozenset[str]
    ours: Mapping[str, Any]
    rollouts: Mapping[str, Mapping[str, Target]]
    """Of the targets those with a rollout, by model and ref."""


class Trust:
    """What is believed. Only roles are added to it, as they are asked for; ``refresh`` makes a new one."""

    def __init__(self, metadata: TrustedMetadataSet, kept: Kept) -> None:
        """``kept``: what ``metadata`` was made of; of what did not verify (any more) it has the files all the same,
        against which newer ones are held."""
        self._metadata, self._before = metadata, kept
        self._roles: dict[str, Verified] = {}
        self.complete = TARGETS in metadata
        """Whether there is all that refs are looked up by."""
        self._expiries: list[tuple[float, str]] = []
        self.expires = float("-inf")
        """When the first of root, timestamp, snapshot and targets expires, in seconds since 1970."""
        if self.complete:
            whole = (metadata.root, metadata.timestamp, metadata.snapshot, metadata.targets)
            self._expiries = sorted((signed.expires.timestamp(), signed.type) for signed in whole)
            self.expires = self._expiries[0][0]

    def __repr__(self) -> str:
        root, timestamp, roles = self.kept().order
        return f"<Trust root {root}, timestamp {timestamp}, {roles} roles>"

    @property
    def timestamp(self) -> bytes:
        """The timestamp as it came; empty before the first one."""
        return self._before.timestamp

    @property
    def roles(self) -> Sequence[str]:
        """The delegated roles that are loaded."""
        return list(self._roles)

    def expiries(self) -> dict[str, float]:
        """When each role that is here expires, in seconds since 1970."""
        return {name: expires for expires, name in self._expiries} | {
            name: role.expires for name, role in self._roles.items()
        }

    def check(self, now: float) -> None:
        """Raises MetadataExpired or ClockSkew where this can't be used ``now`` (seconds since 1970)."""
        if not self.complete:
            raise MetadataExpired("there is no signed metadata yet")
        if now >= self.expires:
            raise _expired(self._expiries[0][1], self.expires)
        _check_not_ahead(self._metadata, now)

    def check_clock(self, now: float) -> None:
        """Raises ClockSkew where the clock here must be behind, whether this has expired or not; MetadataExpired where
        there is nothing."""
        if not self.complete:
            raise MetadataExpired("there is no signed metadata yet")
        _check_not_ahead(self._metadata, now)

    @property
    def signed_at(self) -> float | None:
        """When the timestamp was signed, as its expiry has it, in seconds since 1970; None before the first one."""
        if TIMESTAMP not in self._metadata:
            return None
        return self._metadata.timestamp.expires.timestamp() - LIFETIMES[TIMESTAMP].total_seconds()

    def kept(self) -> Kept:
        """All of it, for a file."""
        roles = {name: role.data for name, role in self._roles.items()} if self.complete else self._before.roles
        timestamp = self._metadata.timestamp.version if TIMESTAMP in self._metadata else 0
        return replace(self._before, roles=roles, order=(self._metadata.root.version, timestamp, len(roles)))

    def versions(self) -> dict[str, int]:
        """Versions by role, for people."""
        found = {name: role.version for name, role in self._roles.items()}
        top = {name: self._metadata[name].version for name in LIMITS if name in self._metadata}
        return {**top, **found}

    def file(self, name: str) -> bytes | None:
        """A file of the metadata as it came, where it is one of these: what is here was verified."""
        if not self.complete:
            return None
        return self.files().get(name)

    def files(self) -> dict[str, bytes]:
        """All files by name, as they came."""
        newest = self._metadata.root.version
        first = newest - len(self._before.roots) + 1
        found = {file_name(ROOT, first + place): data for place, data in enumerate(self._before.roots)}
        for role in (TIMESTAMP, SNAPSHOT, TARGETS):
            if role in self._metadata:
                found[file_name(role, self._metadata[role].version)] = getattr(self._before, role)
        return found | {file_name(name, role.version): role.data for name, role in self._roles.items()}

    def key_ids(self) -> frozenset[str]:
        """Ids of the keys that are good for something."""
        delegations = self._metadata.targets.delegations if self.complete else None
        return frozenset(self._metadata.root.keys) | frozenset(delegations.keys if delegations else ())

    # Delegated roles

    def delegated(self) -> Sequence[str]:
        """The names of all roles that there are, loaded or not."""
        return list(self._delegations()) if self.complete else []

    def loaded(self, role: str) -> bool:
        """Whether nothing needs to be fetched to know what a role says. One that the snapshot has not is a publisher's
        who has published nothing yet: once there, it cannot vanish (§5.5.5)."""
        return (
            role in self._roles
            or role not in self._delegations()
            or (SNAPSHOT in self._metadata and f"{role}.json" not in self._metadata.snapshot.meta)
        )

    def revoked(self, role: str) -> bool:
        """Whether what was believed of a role before is signed by nobody who may sign it now."""
        before = self._before.roles.get(role)
        return before is not None and not _verifies(self._metadata.targets, role, before)

    def wanted(self, role: str) -> Wanted:
        """The file of a delegated role. Raises TrustError."""
        return _wanted(role, self._meta(role))

    def verify(self, role: str, data: bytes, now: float) -> Verified:
        """A delegated role, to be added. Raises TrustError."""
        self._metadata.reference_time = _datetime(now)
        before = self._before.roles.get(role, b"")
        with _explained(self._metadata, TARGETS, role, data, self._before.retired):
            signed = self._metadata.update_delegated_targets(data, role, TARGETS)
        _check_same(self._metadata.targets, role, before, data)
        return _read_role(role, signed, self._delegations()[role], data)

    def add(self, role: str, verified: Verified) -> None:
        """Believe it."""
        self._roles[role] = verified
        self._make_room(role)

    def take(self, role: str, data: bytes, now: float) -> None:
        """Both. Raises TrustError."""
        self.add(role, self.verify(role, data, now))

    def carry_over(self, now: float) -> None:
        """Add the roles from before that still hold."""
        for role, data in self._before.roles.items():
            if role in self._delegations():
                with suppress(TrustError, RepositoryError):
                    self._meta(role).verify_length_and_hashes(data)
                    self.take(role, data, now)

    def _delegations(self) -> Mapping[str, DelegatedRole]:
        delegations = self._metadata.targets.delegations if self.complete else None
        return (delegations.roles or {}) if delegations else {}

    def _meta(self, role: str) -> MetaFile:
        meta = self._metadata.snapshot.meta.get(f"{role}.json")
        if meta is None:
            raise MixedMetadata(f"role {role} is delegated to, and the snapshot has no metadata of it")
        return meta

    def _make_room(self, newest: str) -> None:
        total = sum(len(role.data) for role in self._roles.values())
        for name in list(self._roles):
            if total <= MAX_ROLES:
                return
            if name not in (newest, ACCESS):
                total -= len(self._roles.pop(name).data)

    # Answers, from the roles that are loaded

    def target(self, model: str, ref: str, now: float) -> Target | None:
        """What a ref means; None where no loaded role says. Raises MetadataExpired."""
        name, role = self._speaks_for(model)
        found = role.targets.get((model, ref)) if role else None
        if role is not None and found is not None and now >= role.expires:
            raise _expired(name, role.expires)
        return found

    def refs(self, model: str) -> Mapping[str, Target]:
        """A model's refs by name."""
        _, role = self._speaks_for(model)
        return {ref: target for (of, ref), target in role.targets.items() if of == model} if role else {}

    def evidence(self, model: str) -> bytes:
        """The signed file that says what a model's refs mean, as it came; empty where none is loaded."""
        _, role = self._speaks_for(model)
        return role.data if role else b""

    def _speaks_for(self, model: str) -> tuple[str, Verified | None]:
        """The role that says what a model's refs mean: the public one where that has any. What the private one may say
        of the same model is then not listened to, since all that is of a public model is for all."""
        for name in roles_of(model):
            role = self._roles.get(name)
            if role is not None and model in role.models:
                return name, role
        return "", None

    def models(self) -> Sequence[str]:
        """The names of all models, private ones too."""
        return sorted({model for role in self._roles.values() for model in role.models})

    def is_public(self, model: str) -> bool:
        """Whether the organisation's public role has a ref of the model."""
        role = self._roles.get(public_role(org_of(model)))
        return role is not None and model in role.models

    def public(self) -> Mapping[str, frozenset[str]]:
        """The models that are for everybody, by the role that says so."""
        return {name: role.models for name, role in self._roles.items() if name != ACCESS and not private_org(name)}

    def rollouts(self) -> Mapping[str, Mapping[str, Target]]:
        """By public model and ref what is being rolled out, as far as roles are loaded."""
        roles = [role for name, role in self._roles.items() if name != ACCESS and not private_org(name)]
        return {model: refs for role in roles for model, refs in role.rollouts.items()}

    def on_trial(self, model: str) -> frozenset[Digest]:
        """The revisions of a public model that are in a rollout, new and old."""
        role = self._roles.get(public_role(org_of(model)))
        refs = role.rollouts.get(model, {}) if role else {}
        return frozenset(
            revision
            for found in refs.values()
            if found.rollout
            for revision in (found.revision, found.rollout.revision)
        )

    def access(self, now: float) -> Mapping[str, Any] | None:
        """What role ``access`` says in our own field; None where there is none that is good now."""
        role = self._roles.get(ACCESS)
        return role.ours if role is not None and now < role.expires else None


def roles_of(model: str) -> tuple[str, str]:
    """The roles that can say something of a model, in the order in which they count."""
    org = org_of(model)
    return public_role(org), private_role(org)


def begin(root: bytes, kept: Kept | None, now: float) -> Trust:
    """Start from a trusted root, and what an earlier process kept where it goes with it.

    Raises TrustError where the root itself is not usable. What was kept under another root is left out.
    """
    metadata = _start(root, now)
    roots = [root]
    if kept is None or not _same_network(Kept((root,)), kept):
        return Trust(metadata, Kept((root,)))
    for data in kept.roots:
        if _version(data) == metadata.root.version + 1:
            with suppress(TrustError):
                _update_root(metadata, data, kept.retired)
                roots.append(data)
    before = replace(kept, roots=tuple(roots))
    try:
        metadata.update_timestamp(kept.timestamp)
        metadata.update_snapshot(kept.snapshot)
        metadata.update_targets(kept.targets)
    except (RepositoryError, ValueError):
        return Trust(metadata, before)  # expired, most likely: not to be used, and still nothing older is taken
    trust = Trust(metadata, before)
    trust.carry_over(now)
    return trust


def root_version(root: bytes) -> int:
    """Of a root that was verified."""
    version: int = Metadata[Any].from_bytes(root).signed.version
    return version


def leads_to(older: bytes, root: bytes) -> bool:
    """Whether who trusts ``older`` trusts ``root``, which has the next version."""
    try:
        _update_root(_start(older, NEVER), root, frozenset())
    except TrustError:
        return False
    return True


def supersedes(ours: Kept, theirs: Kept) -> bool:
    """Whether ``ours`` is to replace ``theirs`` in a file: nothing that is kept goes back to a lower version."""
    return ours.order > theirs.order or not _same_network(ours, theirs)


def _same_network(ours: Kept, theirs: Kept) -> bool:
    """Whether no version of the root is known of both and different."""
    mine = {_version(data): data for data in ours.roots}
    return bool(theirs.roots) and all(mine.get(_version(data), data) == data for data in theirs.roots)


def refresh(
    trust: Trust, timestamp: bytes, now: float, *, expired: bool = False
) -> Generator[Wanted, bytes | None, Trust]:
    """Move on to a timestamp that a source sent. Yields files to fetch, is sent their bytes (None: it is not there).

    Gives what is believed then; ``trust`` stays as it is. Delegated roles that have changed are not in it yet.
    ``expired``: also to what has expired, which ``check`` then says of it. Raises TrustError.
    """
    before, judged = trust.kept(), NEVER if expired else now
    metadata = _start(before.roots[-1], judged)
    roots = list(before.roots)
    while data := (yield Wanted(file_name(ROOT, metadata.root.version + 1), LIMITS[ROOT], optional=True)):
        if len(roots) - len(before.roots) == MAX_ROTATIONS:
            raise MetadataTooLarge(f"more than {MAX_ROTATIONS} new versions of the root at once")
        _update_root(metadata, data, before.retired)
        roots.append(data)
    retired = before.retired | trust.key_ids()
    timestamp, same_keys = _update_timestamp(metadata, before.timestamp, timestamp, retired)
    # §5.3.11: after a rotation of its key an old timestamp does not count, nor does the snapshot that it named
    old_snapshot = before.snapshot if same_keys else b""
    snapshot = yield from _update_snapshot(metadata, old_snapshot, retired)
    targets = yield from _update_targets(metadata, before.targets, retired)
    found = replace(before, roots=tuple(roots), timestamp=timestamp, snapshot=snapshot, targets=targets)
    made = Trust(metadata, replace(found, retired=retired - Trust(metadata, found).key_ids()))
    _check_not_ahead(metadata, now)
    made.carry_over(judged)
    return made


def skewed(error: TrustError, date: str | None, now: float) -> TrustError:
    """``error``, or ClockSkew where by the source's clock (its HTTP ``Date``) that would not have expired."""
    if not isinstance(error, MetadataExpired) or not date:
        return error
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return error
    if abs(theirs - now) <= SKEW or theirs >= error.expires:
        return error
    return ClockSkew(
        f"{error}; but the clock here is {abs(now - theirs):.0f} seconds {_side(now - theirs)} the source's"
    )


def _side(difference: float) -> str:
    return "ahead of" if difference > 0 else "behind"


# The steps


def _start(root: bytes, now: float) -> TrustedMetadataSet:
    """Raises TrustError."""
    _inspect(ROOT, root)
    try:
        metadata = TrustedMetadataSet(root, EnvelopeType.METADATA)
    except UnsignedMetadataError as error:
        raise SignatureInvalid(f"the root is not signed by itself: {error}") from error
    except (RepositoryError, ValueError) as error:
        raise TrustError(f"the root is not valid: {error}") from error
    metadata.reference_time = _datetime(now)
    return metadata


def _update_root(metadata: TrustedMetadataSet, data: bytes, retired: frozenset[str]) -> None:
    with _explained(metadata, ROOT, ROOT, data, retired):
        metadata.update_root(data)


def _update_timestamp(
    metadata: TrustedMetadataSet, old: bytes, new: bytes, retired: frozenset[str]
) -> tuple[bytes, bool]:
    """The timestamp that counts now, and whether the old one still verifies. An expired one counts against rollback."""
    if old:
        with suppress(RepositoryError, ValueError):
            metadata.update_timestamp(old)
    held = TIMESTAMP in metadata
    with _explained(metadata, ROOT, TIMESTAMP, new, retired):
        try:
            metadata.update_timestamp(new)
        except EqualVersionNumberError:
            if _signed_bytes(new) != _signed_bytes(old):
                raise EquivocationDetected(f"timestamp {metadata.timestamp.version} was signed twice") from None
            if metadata.timestamp.is_expired(metadata.reference_time):
                raise ExpiredMetadataError from None
            new = old
    return new, held


def _update_snapshot(
    metadata: TrustedMetadataSet, old: bytes, retired: frozenset[str]
) -> Generator[Wanted, bytes | None, bytes]:
    if old:
        with suppress(RepositoryError, ValueError):
            metadata.update_snapshot(old, trusted=True)
    held = SNAPSHOT in metadata
    meta = metadata.timestamp.snapshot_meta
    new = old if held and _fits(old, meta) else (yield _wanted(SNAPSHOT, meta)) or b""
    with _explained(metadata, ROOT, SNAPSHOT, new, retired):
        metadata.update_snapshot(new)
    _check_same(metadata.root, SNAPSHOT, old, new)
    return new


def _update_targets(
    metadata: TrustedMetadataSet, old: bytes, retired: frozenset[str]
) -> Generator[Wanted, bytes | None, bytes]:
    meta = metadata.snapshot.meta.get(f"{TARGETS}.json")
    if meta is None:
        raise MixedMetadata("the snapshot has no targets")
    new = old if _fits(old, meta) and _verifies(metadata.root, TARGETS, old) else (yield _wanted(TARGETS, meta)) or b""
    with _explained(metadata, ROOT, TARGETS, new, retired):
        metadata.update_targets(new)
    _check_same(metadata.root, TARGETS, old, new)
    return new


def _wanted(role: str, meta: MetaFile) -> Wanted:
    limit = LIMITS.get(role, LIMITS[TARGETS])
    if meta.length is not None and meta.length > limit:
        raise MetadataTooLarge(f"{role} is said to have {meta.length} bytes, and {limit} are allowed")
    return Wanted(file_name(role, meta.version), limit if meta.length is None else meta.length)


def _fits(data: bytes, meta: MetaFile) -> bool:
    """Whether a file is the one that is meant, as far as is said of it."""
    try:
        meta.verify_length_and_hashes(data)
    except LengthOrHashMismatchError:
        return False
    return _version(data) == meta.version


# What is wrong


@contextmanager
def _explained(
    metadata: TrustedMetadataSet, delegator: str, role: str, data: bytes, retired: frozenset[str]
) -> Iterator[None]:
    """A step with one file of ``role``; what python-tuf says is wrong with it becomes the error that has a name."""
    _inspect(role, data)
    try:
        yield
    except ExpiredMetadataError:
        raise _expired_of(metadata, role, data) from None
    except BadVersionNumberError as error:
        if role == ROOT and (_version(data) or 0) > metadata.root.version:
            raise MixedMetadata(f"{role}: {error}") from error
        older = role in (ROOT, TIMESTAMP) or "version must be" in str(error) or _older_listed(metadata, role, data)
        raise (RollbackDetected if older else MixedMetadata)(f"{role}: {error}") from error
    except LengthOrHashMismatchError as error:
        raise MixedMetadata(f"{role} is not the file that was signed to belong here: {error}") from error
    except UnsignedMetadataError as error:
        raise _why_unsigned(metadata[delegator], role, data, retired, str(error)) from error
    except RepositoryError as error:
        if role == SNAPSHOT:  # its form was looked at before, so it is that a role is missing
            raise RollbackDetected(f"{role}: {error}") from error
        raise TrustError(f"{role}: {error}") from error
    except ValueError as error:
        raise TrustError(f"{role}: {error}") from error


def _older_listed(metadata: TrustedMetadataSet, role: str, data: bytes) -> bool:
    """Whether a snapshot names an older version of a role than was known."""
    if role != SNAPSHOT or SNAPSHOT not in metadata:
        return False
    new = Metadata[Any].from_bytes(data).signed.meta
    return any(new[name].version < meta.version for name, meta in metadata.snapshot.meta.items() if name in new)


def _why_unsigned(delegator: Signed, role: str, data: bytes, retired: frozenset[str], said: str) -> TrustError:
    """Who may sign is what ``delegator`` says, and, of a new root, also what itself says."""
    document = Metadata[Any].from_bytes(data)
    for judge in (delegator, document.signed):
        if not isinstance(judge, Root | Targets):
            break
        result = judge.get_verification_result(role, document.signed_bytes, document.signatures)
        if result:
            continue
        allowed = set(result.signed) | set(result.unsigned)
        if revoked := (document.signatures.keys() - allowed) & retired:
            return KeyRevoked(f"{role} is signed by key {min(revoked)[:16]}, which was revoked: {said}")
        if result.signed:
            return ThresholdNotMet(f"{said}")
        if document.signatures and not document.signatures.keys() & allowed:
            return UnknownKey(f"{role} is signed by keys that may not sign it: {said}")
        break
    return SignatureInvalid(f"{said}")


def _inspect(role: str, data: bytes) -> None:
    """What a file must be like before anything is made of it. Raises TrustError."""
    limit = LIMITS.get(role, LIMITS[TARGETS])
    if len(data) > limit:
        raise MetadataTooLarge(f"{role} has more than {limit} bytes")
    try:
        document = codec.decode_json(data, limit)
        signed, signatures = document["signed"], document["signatures"]
        kind, version = signed["_type"], signed["version"]
        ids = [signature["keyid"] for signature in signatures]
        holders = signed if kind == ROOT else signed.get("delegations") or {}
        keys = list((holders.get("keys") or {}).values())
        spelled = [(key["keytype"], key["scheme"], key["keyval"]["public"]) for key in keys]
    except (DecodeError, LookupError, TypeError, AttributeError) as error:
        raise TrustError(f"{role} is no signed metadata") from error
    if kind != (role if role in LIMITS else TARGETS):
        raise SignatureInvalid(f"{role} is signed to be something else")
    if type(version) is not int:
        raise TrustError(f"{role} has a version that is no number")
    if len(ids) > MAX_SIGNATURES:
        raise TrustError(f"{role} has more than {MAX_SIGNATURES} signatures")
    if len({str(key_id) for key_id in ids}) != len(ids):
        raise ThresholdNotMet(f"{role} has two signatures of one key")
    _check_keys(role, spelled)


def _check_keys(role: str, keys: Sequence[tuple[Any, Any, Any]]) -> None:
    for kind, scheme, public in keys:
        if (kind, scheme) != ("ed25519", "ed25519") or not isinstance(public, str):
            raise TrustError(f"{role} has a key that is not Ed25519")
        try:
            parse_public(public)
        except RequestError as error:
            raise TrustError(f"{role} has a key that is not acceptable: {error}") from error
    if len({public for _, _, public in keys}) != len(keys):
        raise ThresholdNotMet(f"{role} has one key under two ids")


def _check_same(delegator: Root | Targets, role: str, old: bytes, new: bytes) -> None:
    """Raises EquivocationDetected where both were signed as one version by who may, and differ."""
    if not old or old == new or _version(old) != _version(new) or _signed_bytes(old) == _signed_bytes(new):
        return
    if _verifies(delegator, role, old):  # after a change of keys the old one may be somebody else's
        raise EquivocationDetected(f"{role} {_version(new)} was signed twice")


def _check_not_ahead(metadata: TrustedMetadataSet, now: float) -> None:
    """Raises ClockSkew for a timestamp that expires later than one that is signed now would."""
    ahead = metadata.timestamp.expires.timestamp() - LIFETIMES[TIMESTAMP].total_seconds() - now
    if ahead > SKEW:
        raise ClockSkew(f"the timestamp was signed {ahead:.0f} seconds from now: the clock here is behind")


def _verifies(delegator: Root | Targets, role: str, data: bytes) -> bool:
    try:
        document = Metadata[Any].from_bytes(data)
        delegator.verify_delegate(role, document.signed_bytes, document.signatures)
    except (RepositoryError, ValueError):
        return False
    return True


def _expired_of(metadata: TrustedMetadataSet, role: str, data: bytes) -> MetadataExpired:
    """python-tuf says that something has expired at the step after it, so it may be an earlier file."""
    for name in (ROOT, TIMESTAMP, SNAPSHOT):
        if name in metadata and metadata[name].is_expired(metadata.reference_time):
            return _expired(name, metadata[name].expires.timestamp())
    return _expired(role, Metadata[Any].from_bytes(data).signed.expires.timestamp())


def _expired(role: str, expires: float) -> MetadataExpired:
    return MetadataExpired(f"{role} expired at {_datetime(expires):%Y-%m-%d %H:%M:%SZ}", expires=expires)


def _version(data: bytes) -> int | None:
    """Of a file's signed part; None where it is no metadata."""
    try:
        version: int = Metadata[Any].from_bytes(data).signed.version
    except RepositoryError:
        return None
    return version


def _signed_bytes(data: bytes) -> bytes:
    return Metadata[Any].from_bytes(data).signed_bytes


def _datetime(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


# What a role says


def _read_role(name: str, signed: Targets, delegation: DelegatedRole, data: bytes) -> Verified:
    """Targets outside what is delegated do not count (§5.6.7.2). Raises TrustError."""
    found: dict[tuple[str, str], Target] = {}
    for path, target in signed.targets.items():
        place = _place(name, path)
        if place and delegation.is_delegated_path(path):
            found[place] = _read_target(name, target)
    ours = signed.unrecognized_fields.get(_FIELD)
    models = frozenset(model for model, _ in found)
    expires = signed.expires.timestamp()
    rollouts: dict[str, dict[str, Target]] = {}
    for (model, ref), meant in found.items():
        if meant.rollout:
            rollouts.setdefault(model, {})[ref] = meant
    return Verified(data, signed.version, expires, found, models, ours if isinstance(ours, dict) else {}, rollouts)


def _place(role: str, path: str) -> tuple[str, str] | None:
    """Model and ref of a target's path; None where that is not one of the role's organisation."""
    model, _, ref = path.rpartition("/")
    try:
        parse_model(model)
        parse_ref(ref)
    except BadId:
        return None
    return (model, ref) if path == target_path(model, ref) and role in roles_of(model) else None


def _read_target(role: str, target: TargetFile) -> Target:
    custom = target.custom
    published = custom.get("published", "") if isinstance(custom, dict) else ""
    try:
        revision = parse_digest(f"sha256:{target.hashes['sha256']}")
    except (KeyError, BadId) as error:
        raise TrustError(f"{role} has a target without a SHA-256") from error
    if type(target.length) is not int or not 0 < target.length <= MAX_MANIFEST:
        raise TrustError(f"{role} has a target whose length is not a manifest's")
    if not isinstance(published, str) or len(published) > 64 or not published.isascii():
        raise TrustError(f"{role} has a target with a wrong time")
    source = custom.get("source") if isinstance(custom, dict) else None
    commit = source.get("commit") if isinstance(source, dict) else None
    known = commit if isinstance(commit, str) and is_commit(commit) else ""
    rule = custom.get("rollout") if isinstance(custom, dict) else None
    try:
        rollout = None if rule is None else Rollout.parse(rule)
    except (BadId, ValueError, KeyError, TypeError) as error:
        raise TrustError(f"{role} has a target with a wrong rollout") from error
    return Target(revision, target.length, published, role == private_role(role.partition("~")[0]), known, rollout)
