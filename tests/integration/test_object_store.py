"""An origin over an object store: publishing to it, serving from it, and what its errors say."""

from __future__ import annotations

import asyncio
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from origin import objects
from origin.storage import Storage
from shared.digest import digest_of
from shared.errors import ConfigError, DiskError, NearshardError, NotFound, StoreError
from tests.harness import Lab, command, make_model
from tests.s3_server import SECRET

DIGEST = digest_of(b"x")


def get(url: str, **fields: str) -> bytes:
    """The body of an answer."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=fields), timeout=20) as answer:
        return bytes(answer.read())


async def test_a_model_is_published_to_a_bucket_and_served_from_it(s3: str, lab: Lab, tmp_path: Path) -> None:
    """Again and again: each of these commands ends the moment its last call of the store does."""
    make_model(tmp_path / "model", width=512)
    body = (tmp_path / "model" / "model.safetensors").read_bytes()
    there = ("--store", s3, "--keys", str(tmp_path / "s3-keys"))
    await asyncio.to_thread(command, "trust", "init", *there, "--org", "acme")
    words = ("publish", str(tmp_path / "model"), "acme/tiny", *there)
    for n in range(3):
        said = await asyncio.to_thread(command, *words)
        assert ("now means" in said.stdout) == (n == 0)
    origin = await asyncio.to_thread(lab.service, "origin", "--store", s3)
    url = f"{origin.url}/shards/acme/tiny"
    assert await asyncio.to_thread(get, url) == body
    assert await asyncio.to_thread(get, url, Range="bytes=1000-2500000") == body[1000:2_500_001]
    assert origin.status()["store"] == f"<Storage {s3}>"
    done = await asyncio.to_thread(command, "gc", "--store", s3, "--dry-run")
    assert "would remove 0 revisions and 0 shards" in done.stdout
    assert SECRET not in origin.text()


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server on loopback that answers every connection with these bytes once, and then says nothing."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                held.append(connection)
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            for connection in held:
                connection.close()


def failing(status: str, code: str) -> bytes:
    """An error as S3 says it, with what it likes to quote."""
    body = f"<Error><Code>{code}</Code><StringToSign>{SECRET}</StringToSign></Error>".encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


TRUNCATED = (
    b'HTTP/1.1 206 Partial Content\r\nETag: "1"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n'
    b"Content-Length: 1000\r\nContent-Range: bytes 0-999/1000\r\n\r\n" + bytes(10)
)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        pytest.param(failing("403 Forbidden", "SignatureDoesNotMatch"), "store_denied", id="denied"),
        pytest.param(failing("401 Unauthorized", "InvalidToken"), "store_denied", id="unauthenticated"),
        pytest.param(failing("400 Bad Request", "Odd"), "store_failed", id="refused"),
        pytest.param(failing("503 Slow Down", "SlowDown"), "store_failed", id="overloaded"),
        pytest.param(b"", "store_timeout", id="silent"),
        pytest.param(TRUNCATED, "store_timeout", id="stalled"),
    ],
)
async def test_the_stores_errors_are_ours_and_tell_no_secret(
    s3: str, monkeypatch: pytest.MonkeyPatch, answer: bytes, code: str
) -> None:
    """Within bounds, whatever the store does: a read that brings nothing ends, and is repeated twice at most."""
    monkeypatch.setattr(objects, "_IDLE", timedelta(milliseconds=200))
    with answering(answer) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        storage = Storage(s3)
        with pytest.raises(StoreError) as raised:
            async with asyncio.timeout(60):
                _ = [part async for part in storage.stream_blob(DIGEST, 0, 1000)]
    assert raised.value.error_code == code
    assert SECRET not in str(raised.value) and raised.value.__cause__ is None
    assert raised.value.exit_code == (5 if code == "store_denied" else 6)


async def test_a_store_that_is_away_is_an_error_of_the_network(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError) as raised:
        await Storage(s3).create("a", b"x")
    assert raised.value.exit_code == 6
    done = await asyncio.to_thread(command, "gc", "--store", s3, check=False, AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert done.returncode == 6 and SECRET not in done.stderr and done.stderr.startswith("error: ")


async def test_a_bucket_that_is_not_there_has_nothing(s3: str) -> None:
    with pytest.raises(NotFound):
        await Storage("s3://no-such-bucket/x").blob_size(DIGEST)


def test_what_a_url_may_hide_is_not_shown(s3: str) -> None:
    location = s3.replace("s3://", f"s3://key:{SECRET.replace('/', '')}@") + "?token=hidden"
    storage = Storage(location)
    assert repr(storage) == f"<Storage {s3}>"
    with pytest.raises(ConfigError) as raised:
        Storage("ftp://user:hidden@host/x?token=hidden")
    assert "hidden" not in str(raised.value)


async def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*_: object) -> int:
        raise OSError(28, "No space left on device")

    storage = Storage(str(tmp_path / "store"))
    monkeypatch.setattr("os.write", write)
    calls = (storage.ensure_blob(DIGEST, b"x"), storage.create("a", b"x"), storage.replace("b", b"x", None))
    for call in calls:
        with pytest.raises(DiskError, match="No space left") as raised:
            await call
        assert isinstance(raised.value, NearshardError) and raised.value.exit_code == 7
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file() and path.name != objects.LOCK]
