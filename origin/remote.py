"""The publisher's side of publishing from afar (``shared.publishing`` says what is asked and answered)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

import aiohttp

from origin import signing
from origin.commit import meaning, move_ref, publisher_keys, revision_meant, role_of
from origin.keyring import Keyring
from origin.seen import Seen
from origin.signing import Ref, Source, State, roles_of_org
from origin.trust_reader import TrustReader
from shared import codec
from shared.digest import Digest, digest_of
from shared.enrolment import SIGNATURE_FIELD
from shared.errors import (
    CODES,
    Conflict,
    DecodeError,
    IntegrityError,
    MetadataInvalid,
    NotFound,
    RequestError,
    UpstreamError,
)
from shared.manifest import MAX_MANIFEST, MAX_SHARD, Manifest, decode
from shared.paths import blob_path, manifest_path
from shared.publishing import (
    BATCH,
    LEAST_RATE,
    SCHEME,
    UPLOAD_GRACE,
    Opening,
    make_opening,
    path_of,
)
from shared.token_file import bearer
from shared.trust_names import TIMESTAMP, file_name, org_of
from shared.web.session import CONNECT, translated

T = TypeVar("T")

UPLOADS = 4
"""Shards that are sent at a time."""
TRIES = 5
"""Times that a request is made before its failure is the publish's."""
PAUSE = 0.2
"""Seconds before the second try; twice that before each further one."""
LIMIT = signing.MAX_METADATA
_AGAIN = {"upstream_error", "upstream_timeout", "busy", "not_ready", "timed_out", "no_room"}


class RemoteSink(TrustReader):
    """An origin afar. What it says is believed as far as it is signed; what it lacks is uploaded."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        origin: str,
        root: bytes,
        ring: Keyring,
        now: Callable[[], datetime],
        sleep: Callable[[float], Awaitable[None]],
        seen: Seen,
        token: str = "",
    ) -> None:
        """``root``: a root of the network that is trusted. ``ring``: the publisher's keys. ``token``: for an origin
        that asks for one besides."""
        super().__init__()
        self._begins = bearer(token)
        self._seen = seen
        self._http, self._origin, self._root, self._ring = session, origin, root, ring
        self._now, self._sleep = now, sleep
        self._model, self._private, self._token = "", False, ""
        self._state: State | None = None
        self._asking: dict[Digest, tuple[int, asyncio.Future[bool]]] = {}
        self._asker: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(UPLOADS)

    # Sink

    async def begin(self, model: str, ref: str, *, private: bool) -> Ref | None:
        """Prove to be a publisher, and see what the ref means. Raises RequestError, UpstreamError."""
        self._model, self._private = model, private
        await self._open()
        state = await self.state(role_of(model, private=private))
        publisher_keys(state, model, self._ring, private=private)
        return meaning(state, model, ref, private=private)

    async def ensure_blob(self, digest: Digest, data: memoryview) -> bool:
        """Upload a shard unless the origin has it."""
        if not await self._lacks(digest, len(data)):
            return False
        async with self._room:
            await self._request("PUT", f"blobs/{digest}", data)
        return True

    async def manifest(self, model: str, ref: str, *, private: bool) -> Manifest | None:
        """The manifest that a ref or revision means; None where there is none, or the token lets nobody read it."""
        revision = revision_meant(await self.state(role_of(model, private=private)), model, ref, private=private)
        if revision is None:
            return None
        try:
            data = await self._read(manifest_path(model, revision), MAX_MANIFEST)
        except RequestError:
            return None
        found = await asyncio.to_thread(decode, data)
        return found if found.revision == revision and found.model == model else None

    async def read_blob(self, digest: Digest) -> bytes:
        """A shard from the origin, checked. Raises NotFound, IntegrityError."""
        data = await self._read(blob_path(digest, self._model if self._private else ""), MAX_SHARD)
        if await asyncio.to_thread(digest_of, data) != digest:
            raise IntegrityError(f"{self._origin} sent other bytes for {digest}")
        return data

    async def put_manifest(self, manifest: Manifest) -> bool:
        """Upload a manifest."""
        try:
            await self._request("PUT", f"manifests/{manifest.revision}", manifest.encoded)
        except RequestError as error:
            if error.error_code != "incomplete":
                raise
            return False
        return True

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
        """Sign what the ref means, here, and send that."""
        return await move_ref(self, self._ring, self._now, model, ref, manifest, before, source, private=private)

    # Signed

    async def state(self, role: str) -> State:
        """What is in force. Raises MetadataInvalid where it is not signed as it must be, or has expired."""
        seen = await asyncio.to_thread(self._seen.read)
        data = await self.file(TIMESTAMP, 0)
        state = self._state = await self.load(data, self._state, [org_of(self._model)])
        for signed in (state.root, state.timestamp, state.snapshot, state.targets):
            if signed.is_expired(self._now()):
                raise MetadataInvalid(f"{self._origin}: the {signed.type} metadata has expired")
        own = roles_of_org(self._model)
        versions = {name: state.roles[name].version if name in state.roles else 0 for name in own}
        await asyncio.to_thread(self._seen.check, versions, seen)
        return state

    async def next_version(self, role: str, after: int) -> int:
        """The version to sign on top of ``after``. Raises Conflict."""
        assert self._state is not None
        return await self.version_on(self._state, role, after)

    async def put_role(self, role: str, version: int, data: bytes) -> None:
        """Send a role's next version. Raises Conflict."""
        await self._request("PUT", f"trust/{file_name(role, version)}", data)
        await asyncio.to_thread(self._seen.check, {role: version}, {})

    # TrustReader

    async def file(self, role: str, version: int) -> bytes:
        """A file of the origin's metadata. Raises NotFound."""
        return await self._request("GET", f"trust/{file_name(role, version)}")

    async def first_root(self) -> bytes:
        """The root that this publisher was given."""
        return self._root

    # Requests

    async def _lacks(self, digest: Digest, size: int) -> bool:
        """Ask whether a shard is missing, together with all that others want to know until the last answer came."""
        _, answer = self._asking.setdefault(digest, (size, asyncio.get_running_loop().create_future()))
        if self._asker is None:
            self._asker = asyncio.create_task(self._ask())
        return await answer

    async def _ask(self) -> None:
        try:
            while self._asking:
                batch = dict(list(self._asking.items())[:BATCH])
                for digest in batch:
                    del self._asking[digest]
                try:
                    shards = {digest: size for digest, (size, _) in batch.items()}
                    body = codec.encode_json({"shards": shards})
                    missing = _list(await self._request("POST", "missing", body), "missing")
                except (RequestError, UpstreamError) as error:
                    for _, answer in batch.values():
                        if not answer.cancelled():
                            answer.set_exception(error)
                            answer.exception()
                else:
                    for digest, (_, answer) in batch.items():
                        if not answer.cancelled():
                            answer.set_result(digest in missing)
        finally:
            self._asker = None

    async def _open(self) -> None:
        """Begin a session with whichever key at hand is a publisher's. Raises RequestError (``not_publisher``)."""
        refused: RequestError | None = None
        for key in self._ring.values():
            nonce = str(_field(await self._send("GET", "nonce"), "nonce"))
            body, signature = make_opening(Opening(self._model, nonce, key.public, self._private), key)
            try:
                answer = await self._send("POST", "session", body, {SIGNATURE_FIELD: signature, **self._begins})
            except RequestError as error:
                if error.error_code != "not_publisher":
                    raise
                refused = error
            else:
                self._token = str(_field(answer, "session"))
                return
        raise refused or RequestError("there is no key at hand to publish with", code="not_publisher")

    async def _request(self, method: str, path: str, body: bytes | memoryview | None = None) -> bytes:
        """A request within the session, which is begun again where it ended; tried again where the link failed."""
        for _ in range(TRIES):
            try:
                return await self._persist(
                    lambda: self._send(method, path, body, {"Authorization": f"{SCHEME} {self._token}"})
                )
            except RequestError as error:
                if error.error_code != "no_session":
                    raise
                await self._open()
        raise RequestError(f"{self._origin} ends each session at once", code="no_session")

    async def _read(self, path: str, limit: int) -> bytes:
        """What anybody may read who has the token, ``limit`` bytes of it at most. Raises NotFound."""
        return await self._persist(lambda: self._exchange("GET", self._origin + path, None, self._begins, limit))

    async def _persist(self, request: Callable[[], Awaitable[bytes]]) -> bytes:
        """Make a request, again where the link failed."""
        pause = PAUSE
        for _ in range(TRIES - 1):
            try:
                return await request()
            except UpstreamError as error:
                if error.error_code not in _AGAIN:
                    raise
            await self._sleep(pause)
            pause *= 2
        return await request()

    async def _send(
        self,
        method: str,
        path: str,
        body: bytes | memoryview | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        fields = {"Content-Type": "application/octet-stream", **(headers or {})}
        return await self._exchange(method, self._origin + path_of(self._model, path), body, fields, LIMIT)

    async def _exchange(
        self, method: str, url: str, body: bytes | memoryview | None, fields: Mapping[str, str], limit: int
    ) -> bytes:
        seconds = UPLOAD_GRACE + (len(body) if body else limit) / LEAST_RATE
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=CONNECT)
        with translated(url):
            async with self._http.request(
                method, url, data=body, headers=fields, timeout=timeout, allow_redirects=False
            ) as answer:
                data = bytearray()
                async for chunk in answer.content.iter_any():
                    data += chunk
                    if len(data) > limit:
                        raise UpstreamError(f"{url} answered more than {limit} bytes")
                if answer.status >= 300:
                    raise _refused(url, answer.status, bytes(data))
                return bytes(data)


def _refused(url: str, status: int, body: bytes) -> RequestError | UpstreamError:
    """What an origin answered, as the error that it was there."""
    code = ""
    with suppress(DecodeError, AttributeError):
        code = str(codec.decode_json(body).get("code"))
    if code not in CODES or CODES[code].status != status:
        return UpstreamError(f"{url} answered {status}")
    said = f"{url}: {CODES[code].title}"
    if status >= 500:
        return UpstreamError(said, code=code)
    kind = Conflict if status == 409 else NotFound if status == 404 else RequestError
    return kind(said, code=code)


def _field(body: bytes, name: str) -> Any:
    try:
        return codec.decode_json(body)[name]
    except (DecodeError, KeyError, TypeError) as error:
        raise UpstreamError("the origin's answer is malformed") from error


def _list(body: bytes, name: str) -> set[Any]:
    found = _field(body, name)
    if not isinstance(found, list):
        raise UpstreamError("the origin's answer is malformed")
    return set(map(str, found))
