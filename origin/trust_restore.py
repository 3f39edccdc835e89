"""Bringing an origin's signed metadata up to what the network knows: after its store was restored from a backup.

What nodes, routers and clients believe never goes back. So an origin that shows an older state than they know is
refused, and one that signs on top of it signs versions a second time. But each of them serves what it verified: it
is read from there, checked from the root on, and stored as it was signed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import aiohttp

from origin.objects import Version
from origin.signing import State
from origin.trust_reader import TrustReader
from origin.trust_store import FOLDER, TrustStore
from shared.digest import Digest
from shared.errors import ConfigError, Conflict, NotFound, RequestError, UpstreamError
from shared.manifest import Manifest
from shared.token_file import bearer
from shared.trust_names import ROOT, SNAPSHOT, TIMESTAMP, TIMESTAMP_FILE, file_name
from shared.web.session import fetch

MAX_FILE = 5 << 20


class Elsewhere(TrustReader):
    """The metadata that a service of the network serves, read by its names."""

    def __init__(self, session: aiohttp.ClientSession, url: str, root: bytes, token: str = "") -> None:
        super().__init__()
        self._session, self._url, self._root, self._fields = session, url, root, bearer(token)

    async def file(self, role: str, version: int) -> bytes:
        """A file of it. Raises NotFound, UpstreamError."""
        name = file_name(role, version)
        return (await fetch(self._session, f"{self._url}/trust/{name}", limit=MAX_FILE, headers=self._fields)).body

    async def first_root(self) -> bytes:
        """The one that the operator trusts."""
        return self._root


@dataclass(frozen=True)
class Restored:
    """What was brought back, and what is not there for it."""

    source: str
    timestamp: int
    """The version that is in force now."""
    files: int
    """Files of metadata that were stored."""
    missing: Sequence[tuple[str, Digest]]
    """Models and revisions that a ref means, whose manifest or shards the store lacks: to be published again."""


async def restore(trust: TrustStore, sources: Sequence[tuple[str, TrustReader]]) -> Restored:
    """Store the newest state that a source has, if it is newer than the store's, and say what is not here for it.

    What was signed on top of the older state meanwhile gives way, as nobody who knows the newer one believes it. Raises
    ConfigError where no source has any that is signed as it must be, Conflict.
    """
    url, reader, timestamp, state = await _newest(sources)
    here, version = await _here(trust)
    files = 0
    if here < state.timestamp.version or await _gone_on(trust, reader, state):
        files = await _store(trust, reader, state)
        if await trust.storage.replace(f"{FOLDER}/{TIMESTAMP_FILE}", timestamp, version) is None:
            raise Conflict("somebody else changes the metadata: end the origin, and repeat this", code="stale_metadata")
        files += 1
    fresh = TrustStore(trust.storage)
    return Restored(url, (await fresh.state()).timestamp.version, files, await _missing(fresh))


async def _newest(sources: Sequence[tuple[str, TrustReader]]) -> tuple[str, TrustReader, bytes, State]:
    found: list[tuple[str, TrustReader, bytes, State]] = []
    trouble = []
    for url, reader in sources:
        try:
            data = await reader.file(TIMESTAMP, 0)
            found.append((url, reader, data, await reader.load(data)))
        except (NotFound, UpstreamError, RequestError) as error:
            trouble.append(f"{url}: {error}")
    if not found:
        raise ConfigError(f"nobody has metadata that is signed as it must be; {'; '.join(trouble)}")
    return max(found, key=lambda item: item[3].timestamp.version)


async def _here(trust: TrustStore) -> tuple[int, Version | None]:
    """The version of the timestamp in the store, and that of its object; 0 where there is none."""
    with suppress(NotFound):
        data, version = await trust.storage.get(f"{FOLDER}/{TIMESTAMP_FILE}")
        return (await trust.load(data)).timestamp.version, version
    return 0, None


async def _gone_on(trust: TrustStore, reader: TrustReader, state: State) -> bool:
    """Whether the store has signed something of its own where the network has something else."""
    for role, version in _named(state):
        if await trust.probe(role, version) != await reader.file(role, version):
            return True
    return False


def _named(state: State) -> list[tuple[str, int]]:
    """All that a timestamp leads to, roots first."""
    roots = [(ROOT, version) for version in range(1, state.root.version + 1)]
    roles = [(name.removesuffix(".json"), meta.version) for name, meta in state.snapshot.meta.items()]
    return [*roots, *roles, (SNAPSHOT, state.snapshot.version)]


async def _store(trust: TrustStore, reader: TrustReader, state: State) -> int:
    """Store all that the timestamp leads to. Gives how many files were not there, or others."""
    made = 0
    for role, version in _named(state):
        data = await reader.file(role, version)
        if await trust.probe(role, version) != data:
            await trust.storage.replace(f"{FOLDER}/{file_name(role, version)}", data, None)
            made += 1
    return made


async def _missing(trust: TrustStore) -> list[tuple[str, Digest]]:
    found = []
    for model, revisions in sorted((await trust.meant()).items()):
        private = any(ref.private for ref in (await trust.refs(model)).values())
        for revision in sorted(revisions):
            manifest = await _manifest(trust, model, revision)
            if manifest is None or await trust.storage.lacks(manifest.stored, model if private else ""):
                found.append((model, revision))
    return found


async def _manifest(trust: TrustStore, model: str, revision: Digest) -> Manifest | None:
    with suppress(NotFound):
        return await trust.storage.manifest(model, revision)
    return None
