"""Making a network's keys and its first signed metadata, and saying who may publish for an organisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from origin import signing
from origin.config import ONLINE_FILE
from origin.keyring import PUBLISHER_FILE, Keyring, make_key, make_named
from origin.signing import key_id, key_of
from origin.token_keys import TokenKeys
from origin.trust_store import TrustStore
from shared.errors import ConfigError
from shared.keys import NodeKey
from shared.tokens import NOBODY
from shared.trust_names import ACCESS, ROOT, TARGETS, TIMESTAMP, public_role


@dataclass(frozen=True)
class Made:
    """What ``initialise`` made. ``root``: the bytes by which whoever checks knows the network."""

    root: bytes
    keys: tuple[str, ...]
    """Key ids."""


async def initialise(
    trust: TrustStore, folder: Path, orgs: Sequence[str], now: datetime, *, root_keys: int, threshold: int
) -> Made:
    """Make keys in ``folder`` and the first metadata. With no ``orgs``, one key that publishes for any.

    Raises ConfigError where there are keys or metadata already, DiskError.
    """
    if not 1 <= threshold <= root_keys <= 16:
        raise ConfigError(f"--root-threshold is 1 to --root-keys, which is at most 16, not {threshold} of {root_keys}")
    if any(folder.glob("*.pem")):
        raise ConfigError(f"{folder}: there are keys already")
    if await trust.exists():
        raise ConfigError(f"{trust.storage.location}: there is signed metadata already")
    roots = [make_named(folder, ROOT) for _ in range(root_keys)]
    top = make_named(folder, TARGETS)
    online = make_key(folder, ONLINE_FILE)
    targets = signing.first_targets(now, online)
    made = [*roots, top, online]
    access = NOBODY.with_key(TokenKeys(folder).make().public, now.timestamp(), now.timestamp())
    roles = {ACCESS: signing.sign(signing.first_access(now, access.document()), [online])}
    if not orgs:
        made.append(make_key(folder, PUBLISHER_FILE))
    for org in orgs:
        publisher = make_named(folder, org)
        made.append(publisher)
        signing.add_publisher(targets, org, key_of(publisher.public))
        roles |= signing.empty_roles(org, [publisher], now)
    root = signing.sign(signing.root_of(now, roots, threshold, top, online), roots)
    await trust.begin(root, {TARGETS: signing.sign(targets, [top]), **roles}, online, now)
    return Made(root, tuple(key_id(key) for key in made))


async def add_publisher(trust: TrustStore, ring: Keyring, org: str, public: bytes, now: datetime) -> bool:
    """Let a public key publish for an organisation, and put that in force. Gives whether it is news.

    A new organisation's roles are empty, and signed with its key: now where that is at hand, else by its first
    publish. Raises ConfigError where the targets key or the online key is not at hand.
    """
    key = key_of(public)
    online = await roll_forward(trust, ring, now)
    state = await trust.state()
    known = org in state.orgs()
    if known and key.keyid in state.role(public_role(org)).keyids:
        return False
    signers = signing.holders(state.root.get_delegated_role(TARGETS), ring, TARGETS)
    version = await trust.next_version(TARGETS, state.targets.version)
    targets = signing.next_of(state.targets, now, TARGETS, version=version)
    signing.add_publisher(targets, org, key)
    own = ring.get(key.keyid)
    empty = signing.empty_roles(org, [own], now) if own and not known else {}
    files = [(role, 1, data) for role, data in empty.items()]
    await trust.create([*files, (TARGETS, version, signing.sign(targets, signers))])
    await trust.roll_forward(online, now)
    return True


async def roll_forward(trust: TrustStore, ring: Keyring, now: datetime) -> list[NodeKey]:
    """Put in force what was left behind; the online keys at hand. Raises ConfigError where there is none."""
    state = await trust.state()
    online = signing.holders(state.root.get_delegated_role(TIMESTAMP), ring, "the timestamp")
    await trust.roll_forward(online, now)
    return online


async def delegate_any(trust: TrustStore, ring: Keyring, org: str, now: datetime) -> None:
    """Let the key that publishes for any organisation publish for this one, where it and the targets key are at hand.

    So a network of one machine needs nobody to say who may publish there.
    """
    if ring.anybody is None:
        return
    state = await trust.state()
    if org not in state.orgs() and all(key in ring for key in state.root.get_delegated_role(TARGETS).keyids):
        await add_publisher(trust, ring, org, ring.anybody.public, now)
