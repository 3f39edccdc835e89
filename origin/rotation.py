"""Changing keys: new ones for old ones, and those that are lost or stolen out. No client fails meanwhile.

Who checks goes from one root to the next, and finds all else signed as that root says. So what a new key is to sign is
signed by both keys first and put in force; then comes the root, or the targets, that names the new one alone. Where the
old key is not at hand, the root comes first, and clients fail for as long as the rest takes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import Root, Targets

from origin import signing
from origin.config import ONLINE_FILE
from origin.keyring import Keyring, make_named, named
from origin.signing import State, key_id, key_of
from origin.trust_store import TrustStore
from shared.errors import ConfigError, DiskError, NotFound
from shared.keys import NodeKey
from shared.trust_names import ACCESS, ROOT, SNAPSHOT, TARGETS, TIMESTAMP, private_role, public_role

ONLINE = "online"
"""What people call the roles that the online key signs."""


def affected(state: State, key: str) -> list[str]:
    """What a key signs: ``root``, ``targets``, ``online``, organisations. Raises NotFound where that is nothing."""
    names = [(ROOT, ROOT), (TARGETS, TARGETS), (ONLINE, TIMESTAMP), *((org, public_role(org)) for org in state.orgs())]
    found = [name for name, role in names if key in state.role(role).keyids]
    if not found:
        raise NotFound("no role is signed by such a key", code="unknown_role")
    return found


class Rotation:
    """Changes of keys in one store. ``ring`` has the keys at hand; new ones are put there and in ``folder``."""

    def __init__(self, trust: TrustStore, ring: Keyring, folder: Path, now: datetime) -> None:
        self._trust, self._ring, self._folder, self._now = trust, ring, folder, now

    async def rotate(self, name: str) -> dict[str, list[str]]:
        """New keys for a role: as many as it has; of an organisation, for those at hand. Gives ids, added and removed.

        Raises ConfigError where keys are missing that must sign this, NotFound for a role that nobody knows.
        """
        state = await self._trust.state()
        role = state.role(_role(name))
        old = [key for key in role.keyids if key in self._ring] if name not in _TOP else list(role.keyids)
        if not old:
            raise ConfigError(f"no key of {name} is at hand; see who has one: nearshard trust show")
        return await self._change(name, old, len(old))

    async def revoke(self, key: str, *, replace: bool) -> dict[str, list[str]]:
        """Let a key sign nothing any more; what it signed is signed by others, or with ``replace`` by a new one.

        Raises NotFound for a key that signs nothing, ConfigError where nobody is left to sign.
        """
        done: dict[str, list[str]] = {"added": [], "removed": [key]}
        for name in affected(await self._trust.state(), key):
            done["added"] += (await self._change(name, [key], int(replace)))["added"]
        return done

    async def _change(self, name: str, remove: Sequence[str], count: int) -> dict[str, list[str]]:
        state = await self._trust.state()
        role = state.role(_role(name))
        if len(set(role.keyids) - set(remove)) + count < role.threshold:
            raise ConfigError(f"nobody would be left to sign for {name}; --replace makes a new key")
        self._check_at_hand(state, name, remove, count)
        add = [make_named(self._folder, name) for _ in range(count)]
        self._ring |= {key_id(key): key for key in add}
        if name == ROOT:
            await self._new_root((ROOT,), remove, add)
        elif name == TARGETS:
            await self._change_targets_key(remove, add)
        elif name == ONLINE:
            await self._change_online(remove, add)
        else:
            await self._change_org(name, remove, add)
        return {"added": [key_id(key) for key in add], "removed": list(remove)}

    def _check_at_hand(self, state: State, name: str, remove: Collection[str], count: int) -> None:
        """Raises ConfigError before anything is made or changed where keys are missing that must sign."""
        needed = {ROOT: [ROOT], TARGETS: [ROOT], ONLINE: [ROOT, TARGETS]}.get(name, [TARGETS])
        for role in needed:
            signing.holders(state.role(role), self._ring, role)
        if name != ONLINE:
            self._online(state)
        if not count and not any(key in self._ring for key in set(state.role(_role(name)).keyids) - set(remove)):
            raise ConfigError(f"no other key of {name} is at hand to sign instead; --replace makes a new one")

    def _online(self, state: State) -> list[NodeKey]:
        return signing.holders(state.root.get_delegated_role(TIMESTAMP), self._ring, "the timestamp")

    async def _new_root(self, roles: Sequence[str], remove: Collection[str], add: Sequence[NodeKey]) -> None:
        """The next root, signed as this one says and as itself says; then all that is signed online, anew."""
        root = (await self._trust.state()).root
        made = signing.next_of(root, self._now, ROOT)
        for role in roles:
            _swap(made, role, remove, add)
        signers = {
            key_id(key): key
            for said in (root, made)
            for key in signing.holders(said.get_delegated_role(ROOT), self._ring, ROOT)
        }
        data = signing.sign(made, signers.values())
        signing.check_next_root(data, root)
        await self._trust.create([(ROOT, made.version, data)])
        online = signing.holders(made.get_delegated_role(TIMESTAMP), self._ring, "the timestamp")
        await self._trust.roll_forward(online, self._now, force=True)

    async def _change_targets_key(self, remove: Collection[str], add: Sequence[NodeKey]) -> None:
        state = await self._trust.state()
        keys = [self._ring[key] for key in state.role(TARGETS).keyids if key in self._ring]
        await self._put_targets(state, state.targets, [*keys, *add])
        await self._new_root((TARGETS,), remove, add)

    async def _change_online(self, remove: Collection[str], add: Sequence[NodeKey]) -> None:
        state = await self._trust.state()
        old = [self._ring[key] for key in state.role(TIMESTAMP).keyids if key in self._ring]
        online = [*old, *add]
        await self._trust.sign_access(state, state.roles[ACCESS].unrecognized_fields[signing.CUSTOM], online, self._now)
        targets = signing.next_of(state.targets, self._now, TARGETS)
        _swap(targets, ACCESS, remove, add)
        top = signing.holders(state.role(TARGETS), self._ring, TARGETS)
        await self._trust.create([(TARGETS, targets.version, signing.sign(targets, top))])
        if old:
            await self._trust.roll_forward(online, self._now, force=True)
        await self._new_root((SNAPSHOT, TIMESTAMP), remove, add)
        self._put_online(add)

    def _put_online(self, add: Sequence[NodeKey]) -> None:
        """Put the new online key where the origin looks for it, in the place of the old one."""
        there = self._folder / ONLINE_FILE
        if add and there.exists():
            try:
                (self._folder / named(ONLINE, add[0])).replace(there)
            except OSError as error:
                raise DiskError(f"{there}: {error.strerror}") from error

    async def _change_org(self, org: str, remove: Collection[str], add: Sequence[NodeKey]) -> None:
        """First the new key may sign too, then it does, then the old one no longer may."""
        roles = (public_role(org), private_role(org))
        state = await self._trust.state()
        if add:
            targets = signing.next_of(state.targets, self._now, TARGETS)
            for key in add:
                signing.add_publisher(targets, org, key_of(key.public))
            await self._put_targets(state, targets)
        state = await self._trust.state()
        held = [self._ring[key] for key in state.role(roles[0]).keyids if key in self._ring and key not in remove]
        await self._resign(state, [role for role in roles if role in state.roles], held)
        state = await self._trust.state()
        targets = signing.next_of(state.targets, self._now, TARGETS)
        for role in roles:
            _swap(targets, role, remove, ())
        await self._put_targets(state, targets)
        await self._resign_spoilt(roles, held)

    async def _resign(self, state: State, roles: Sequence[str], keys: Sequence[NodeKey]) -> None:
        files = []
        for role in roles:
            old = state.roles[role]
            version = await self._trust.next_version(role, old.version)
            files.append((role, version, signing.sign(signing.next_of(old, self._now, role, version=version), keys)))
        await self._trust.create(files)
        await self._trust.roll_forward(self._online(state), self._now, roles)

    async def _resign_spoilt(self, roles: Sequence[str], keys: Sequence[NodeKey]) -> None:
        """Sign again what somebody signed with a removed key just before it was removed."""
        state = await self._trust.state()
        spoilt = [role for role in roles if role in state.roles and not await self._trust.holds(state, role)]
        if spoilt:
            await self._resign(state, spoilt, keys)

    async def _put_targets(self, state: State, changed: Targets, keys: Sequence[NodeKey] = ()) -> None:
        """Put a next version of targets in force."""
        version = await self._trust.next_version(TARGETS, state.targets.version)
        targets = signing.next_of(changed, self._now, TARGETS, version=version)
        signers = keys or signing.holders(state.role(TARGETS), self._ring, TARGETS)
        await self._trust.create([(TARGETS, version, signing.sign(targets, signers))])
        await self._trust.roll_forward(self._online(state), self._now)


_TOP = (ROOT, TARGETS, ONLINE)


def _role(name: str) -> str:
    """The role whose keys people mean by a name."""
    if name in (ROOT, TARGETS):
        return name
    return TIMESTAMP if name == ONLINE else public_role(name)


def _swap(delegator: Root | Targets, role: str, remove: Collection[str], add: Sequence[NodeKey]) -> None:
    for key in add:
        delegator.add_key(key_of(key.public), role)
    for old in remove:
        if old in delegator.get_delegated_role(role).keyids:
            delegator.revoke_key(old, role)
