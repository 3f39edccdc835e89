"""A repository of signed metadata in memory, to check against: right by default, and wrong in every way on order."""

from __future__ import annotations

import asyncio
import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, Key
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from shared import trust_chain
from shared.digest import digest_of, hex_of
from shared.trust_names import (
    ACCESS,
    LIFETIMES,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    file_name,
    private_role,
    public_role,
    target_path,
)
from tests.scripted import Act, Asked, Script, serve_whole

NOW = 1_800_000_000.0
"""Seconds since 1970 when the metadata is signed, unless a test says something else."""


def make_key(seed: int) -> CryptoSigner:
    """A key, the same for the same seed."""
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"%d" % seed).digest()))


def sign(signed: Signed, keys: Sequence[CryptoSigner]) -> bytes:
    """A file with a signature of each of ``keys``."""
    document: Metadata[Any] = Metadata(copy.deepcopy(signed))
    for key in keys:
        document.sign(key, append=True)
    return document.to_bytes(JSONSerializer(compact=True))


@dataclass
class Repository:
    """What a source serves under ``/trust/``: ``files``. ``publish`` makes the next state of it."""

    now: float = NOW
    orgs: Sequence[str] = ("acme",)
    root_keys: list[CryptoSigner] = field(default_factory=lambda: [make_key(1), make_key(2), make_key(3)])
    threshold: int = 2
    targets_key: CryptoSigner = field(default_factory=lambda: make_key(4))
    online_key: CryptoSigner = field(default_factory=lambda: make_key(5))
    timestamp_key: CryptoSigner | None = None
    """One of its own for the timestamp; the online key by default."""
    publisher_key: CryptoSigner = field(default_factory=lambda: make_key(6))
    files: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    refs: dict[str, dict[str, TargetFile]] = field(default_factory=dict)
    """Targets by role and path."""
    access: Mapping[str, Any] = field(default_factory=lambda: {"token_keys": [], "revoked": []})
    lifetimes: dict[str, timedelta] = field(default_factory=lambda: dict(LIFETIMES))
    hashes: bool = True
    """Whether the timestamp and the snapshot name lengths and hashes too."""

    def __post_init__(self) -> None:
        self.sign_root()
        self.sign_targets()
        for org in self.orgs:
            for role in (public_role(org), private_role(org)):
                self.refs[role] = {}
                self.sign_role(role)
        self.sign_access()
        self.sign_snapshot()

    @property
    def root(self) -> bytes:
        """The first root: what is trusted."""
        return self.files["1.root.json"]

    @property
    def timestamp(self) -> bytes:
        """The latest one."""
        return self.files["timestamp.json"]

    def expiry(self, role: str) -> datetime:
        """Of what is signed now."""
        return datetime.fromtimestamp(self.now, UTC).replace(microsecond=0) + self.lifetimes[role]

    def next(self, role: str) -> int:
        """The version that comes next."""
        self.versions[role] = self.versions.get(role, 0) + 1
        return self.versions[role]

    def put(self, role: str, data: bytes) -> None:
        """Serve this as the latest version."""
        self.files[file_name(role, self.versions[role])] = data

    # The roles

    def make_root(self, version: int) -> Root:
        """The signed part of a root."""
        signed = Root(version=version, expires=self.expiry(ROOT), consistent_snapshot=True)
        timestamp = self.timestamp_key or self.online_key
        for role, key in ((TARGETS, self.targets_key), (SNAPSHOT, self.online_key), (TIMESTAMP, timestamp)):
            signed.add_key(key.public_key, role)
        for key in self.root_keys:
            signed.add_key(key.public_key, ROOT)
        signed.roles[ROOT].threshold = self.threshold
        return signed

    def sign_root(self, *more: CryptoSigner) -> None:
        """A new root; ``more``: keys of the root before."""
        version = self.next(ROOT)
        self.put(ROOT, sign(self.make_root(version), [*self.root_keys, *more]))

    def make_targets(self, version: int) -> Targets:
        """The signed part of targets, with all delegations."""
        publisher, online = self.publisher_key.public_key, self.online_key.public_key
        roles = {
            name: DelegatedRole(name, [publisher.keyid], 1, False, [f"{org}/*/*"])
            for org in self.orgs
            for name in (public_role(org), private_role(org))
        }
        roles[ACCESS] = DelegatedRole(ACCESS, [online.keyid], 1, False, ["~access/*"])
        keys: dict[str, Key] = {key.keyid: key for key in (publisher, online)}
        return Targets(version=version, expires=self.expiry(TARGETS), delegations=Delegations(keys, roles))

    def sign_targets(self) -> None:
        """New targets."""
        self.put(TARGETS, sign(self.make_targets(self.next(TARGETS)), [self.targets_key]))

    def sign_role(self, role: str, *keys: CryptoSigner) -> None:
        """A new version of an organisation's role."""
        signed = Targets(version=self.next(role), expires=self.expiry("publisher"), targets=dict(self.refs[role]))
        self.put(role, sign(signed, keys or [self.publisher_key]))

    def sign_access(self) -> None:
        """A new version of ``access``."""
        signed = Targets(version=self.next(ACCESS), expires=self.expiry(ACCESS))
        signed.unrecognized_fields["nearshard"] = dict(self.access)
        self.put(ACCESS, sign(signed, [self.online_key]))

    def meta(self, role: str) -> MetaFile:
        """What is said of the latest file of a role."""
        data = self.files[file_name(role, self.versions[role])]
        if not self.hashes:
            return MetaFile(self.versions[role])
        return MetaFile.from_data(self.versions[role], data, ["sha256"])

    def make_snapshot(self, version: int) -> Snapshot:
        """The signed part of a snapshot of the latest of all."""
        roles = [role for role in self.versions if role not in (ROOT, SNAPSHOT, TIMESTAMP)]
        return Snapshot(
            version, expires=self.expiry(SNAPSHOT), meta={f"{role}.json": self.meta(role) for role in roles}
        )

    def sign_snapshot(self) -> None:
        """A new snapshot, and a new timestamp of it."""
        self.put(SNAPSHOT, sign(self.make_snapshot(self.next(SNAPSHOT)), [self.online_key]))
        self.sign_timestamp()

    def make_timestamp(self, version: int) -> Timestamp:
        """The signed part of a timestamp of the latest snapshot."""
        return Timestamp(version, expires=self.expiry(TIMESTAMP), snapshot_meta=self.meta(SNAPSHOT))

    def sign_timestamp(self) -> None:
        """A new timestamp."""
        self.put(TIMESTAMP, sign(self.make_timestamp(self.next(TIMESTAMP)), [self.timestamp_key or self.online_key]))

    # What happens to a repository

    def set_ref(self, model: str, ref: str, manifest: bytes, *, private: bool = False) -> None:
        """Let a ref mean this manifest, from the next ``sign_role`` on."""
        role = (private_role if private else public_role)(model.partition("/")[0])
        hashes = {"sha256": hex_of(digest_of(manifest))}
        custom = {"custom": {"published": "2027-01-15T08:00:00Z"}}
        path = target_path(model, ref)
        self.refs[role][path] = TargetFile(len(manifest), hashes, path, custom)

    def publish(self, model: str, ref: str, manifest: bytes, *, private: bool = False) -> None:
        """The same, signed and visible."""
        self.set_ref(model, ref, manifest, private=private)
        self.sign_role((private_role if private else public_role)(model.partition("/")[0]))
        self.sign_snapshot()

    def rotate(self, *, root: Sequence[CryptoSigner] = (), targets: CryptoSigner | None = None,
               online: CryptoSigner | None = None, publisher: CryptoSigner | None = None) -> None:  # fmt: skip
        """Put other keys in place of those that are used, and sign everything anew that needs it."""
        before = self.root_keys
        self.root_keys = list(root) or self.root_keys
        self.targets_key, self.online_key = targets or self.targets_key, online or self.online_key
        self.publisher_key = publisher or self.publisher_key
        if root or targets or online:
            self.sign_root(*(key for key in before if key not in self.root_keys))
        self.sign_targets()
        if publisher:
            for role in self.refs:
                self.sign_role(role)
        if online:
            self.sign_access()
        self.sign_snapshot()


def serving(files: Mapping[str, bytes]) -> Act:
    """A source of metadata as an honest origin is one: the timestamp with its ETag and 304; all else from its blobs."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        data = files.get(asked.path.removeprefix("/trust/"))
        if data is None:
            await serve_whole(script, asked, writer)
            return
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if asked.headers.get("if-none-match") == etag:
            writer.write(f"HTTP/1.1 304 Not Modified\r\nETag: {etag}\r\n\r\n".encode())
        else:
            writer.write(f"HTTP/1.1 200 OK\r\nETag: {etag}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)

    return act


def chained(files: Mapping[str, bytes | None], also: Mapping[str, bytes]) -> Act:
    """A source that sends ``files`` in one answer to who takes that, and ``also`` by their names."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if trust_chain.MEDIA_TYPE not in asked.headers.get("accept", ""):
            await serving(also)(script, asked, writer)
            return
        body = trust_chain.encode(files)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {trust_chain.MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)

    return act
