"""The people of the load test, by locust: ``python -m loadtests.load_users WORK`` (``loadtests.load`` starts it).

WORK is a JSON document (``loadtests.load.load``). Samples go to its file, a JSON line each; ``started`` and ``stopped``
are said on standard output. Locust changes Python's sockets for its own kind of threads: so this is another process.

A person asks the node of its region; where that can't answer, the router, with its region's name. Redirects are
followed. Every body is checked by the ETag, its SHA-256. A person in a network namespace has its sockets made there.
"""

from __future__ import annotations

from locust import LoadTestShape, User, task

# isort: split
# Above comes first: it changes the sockets that all below import.
import ctypes
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from random import Random
from typing import Any, ClassVar, TextIO
from urllib.parse import urljoin, urlsplit

from locust.env import Environment

from loadtests.load_report import Sample, outcome_of
from loadtests.scenarios import LOOPBACK, Popularity, Scenario

CONNECT, PATIENCE = 5.0, 20.0
"""Seconds to connect; seconds in which some byte must come."""
REDIRECTS = 3
CHUNK = 256 << 10
CLONE_NEWNET = 0x40000000
REDIRECTED = (301, 302, 303, 307, 308)


class Failed(Exception):
    """A request without the right answer; says why."""


class Way(HTTPConnection):
    """A connection whose socket is made in a network namespace, where one is given."""

    def __init__(self, host: str, port: int | None, netns: str) -> None:
        super().__init__(host, port, timeout=CONNECT)
        self._netns = netns

    def connect(self) -> None:
        """See HTTPConnection."""
        with entered(self._netns):
            self.sock = socket.socket()
        self.sock.settimeout(CONNECT)
        self.sock.connect((self.host, self.port))


@contextmanager
def entered(netns: str) -> Iterator[None]:
    """This thread's new sockets are made in a namespace. Nothing in here may wait: locust has one thread for all."""
    if not netns:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{netns}", os.O_RDONLY)
    try:
        if libc.setns(there, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            libc.setns(here, CLONE_NEWNET)
    finally:
        os.close(here)
        os.close(there)


class Person(User):
    """Somebody in a region. The fields of the class are set for each region, from ``Work``."""

    abstract = True
    region: ClassVar[str]
    netns: ClassVar[str]
    beyond: ClassVar[bool]
    """Whether it may be sent on to another machine, or another namespace."""
    sources: ClassVar[Sequence[str]]
    """Base URLs, tried in turn."""
    ways: ClassVar[Mapping[str, str]]
    """Where a ``host:port`` is reached from there, if not directly."""
    headers: ClassVar[Mapping[str, str]]
    paths: ClassVar[Sequence[str]]
    seed: ClassVar[int]
    pause: ClassVar[float]
    log: ClassVar[Log]

    def on_start(self) -> None:
        """Begin: with a seed of one's own, and no connection."""
        rng = Random(f"{self.seed} {self.region} {self.log.next_person()}")
        self._popular, self._rng = Popularity(self.paths, rng), rng
        self._connections: dict[tuple[str, str], HTTPConnection] = {}

    def wait_time(self) -> float:
        """Seconds until the next request."""
        return self._rng.expovariate(1 / self.pause)

    @task
    def fetch(self) -> None:
        """One body, as popular things are asked for."""
        path, size, outcome, error = self._popular.choose(), 0, "", ""
        begun = time.monotonic()
        for source in self.sources:
            try:
                size, outcome = self._get(source + path)
                error = ""
                break
            except (OSError, HTTPException, Failed) as failure:
                error = str(failure) if isinstance(failure, Failed) else type(failure).__name__
        seconds = time.monotonic() - begun
        self.log.add(begun, Sample(0.0, self.region, path, seconds, size, outcome, error))
        self.environment.events.request.fire(
            request_type="GET",
            name=f"{self.region} {path.partition('@')[0]}",
            response_time=seconds * 1e3,
            response_length=size,
            exception=Failed(error) if error else None,
            context={},
        )

    def _get(self, url: str) -> tuple[int, str]:
        """Follow redirects, and read all. The size, and the outcome. Raises OSError, HTTPException, Failed."""
        for _ in range(REDIRECTS + 1):
            answer = self._send(url)
            if answer.status not in REDIRECTED:
                break
            url = urljoin(url, answer.getheader("Location") or "")
            answer.read()
        if answer.status != 200:
            answer.read()
            raise Failed(f"status {answer.status}")
        digest, size = hashlib.sha256(), 0
        while data := answer.read(CHUNK):
            digest.update(data)
            size += len(data)
        wanted = answer.getheader("Content-Length")
        if wanted is not None and size != int(wanted):
            raise Failed("cut short")
        etag = (answer.getheader("ETag") or "").strip('"').removeprefix("sha256:")
        if len(etag) == 64 and etag != digest.hexdigest():
            raise Failed("other bytes than were published")
        return size, outcome_of(answer.getheader("Cache-Status") or "")

    def _send(self, url: str) -> HTTPResponse:
        """One request, on a connection that is there, or on a new one; the answer's head."""
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        headers = {"Accept-Encoding": "identity", "Host": parts.netloc, **self.headers}
        kept = self._connections.get(key)
        if kept is not None:
            with suppress(OSError, HTTPException):  # it was idle, and may have been closed: once more on a new one
                return self._ask(kept, target, headers)
            kept.close()
        connection = self._connections[key] = self._connection(parts.scheme, parts.netloc)
        try:
            return self._ask(connection, target, headers)
        except (OSError, HTTPException):
            self._connections.pop(key).close()
            raise

    def _ask(self, connection: HTTPConnection, target: str, headers: Mapping[str, str]) -> HTTPResponse:
        connection.request("GET", target, headers=dict(headers))
        if connection.sock:
            connection.sock.settimeout(PATIENCE)
        return connection.getresponse()

    def _connection(self, scheme: str, netloc: str) -> HTTPConnection:
        parts = urlsplit(f"//{self.ways.get(netloc, netloc)}")
        if not parts.hostname or scheme not in ("http", "https"):
            raise Failed("sent on to what is no http address")
        if parts.hostname not in LOOPBACK and not self.beyond:
            raise Failed("sent on to another machine: that needs --beyond-loopback")
        if scheme == "https":
            return HTTPSConnection(parts.hostname, parts.port, timeout=CONNECT)
        return Way(parts.hostname, parts.port or 80, self.netns) if self.netns else _plain(parts.hostname, parts.port)

    def on_stop(self) -> None:
        """Leave nothing open."""
        for connection in self._connections.values():
            connection.close()


def _plain(host: str, port: int | None) -> HTTPConnection:
    return HTTPConnection(host, port, timeout=CONNECT)


class Log:
    """Samples, in a file, with times from the start of the run."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._start, self._people = file, time.monotonic(), 0

    def next_person(self) -> int:
        """A number for somebody."""
        self._people += 1
        return self._people

    def begin(self) -> None:
        """A run begins: forget the samples of one before."""
        self._file.seek(0)
        self._file.truncate()
        self._start, self._people = time.monotonic(), 0

    def add(self, begun: float, sample: Sample) -> None:
        """Keep a sample of a request that began then."""
        self._file.write(json.dumps(asdict(sample) | {"at": begun - self._start}) + "\n")

    def flush(self) -> None:
        """Have all in the file."""
        self._file.flush()


def shape_of(scenario: Scenario, users: int, seconds: float) -> LoadTestShape:
    """How many people there are when; nobody once the time is over."""

    class Shape(LoadTestShape):
        def tick(self) -> tuple[int, float] | None:
            run: float = self.get_run_time()  # type: ignore[no-untyped-call]
            return (scenario.users_at(run / seconds, users), float(users)) if run < seconds else None

    return Shape()  # type: ignore[no-untyped-call]


def people(work: Mapping[str, Any], log: Log) -> list[type[User]]:
    """A class of people for each region."""
    common = {"paths": work["paths"], "seed": work["seed"], "pause": work["pause"], "log": log}
    return [type(region["region"], (Person,), {**region, **common, "abstract": False}) for region in work["regions"]]


def await_listening(port: int) -> None:
    """Wait until locust's page can be asked for; whoever finds the port taken ends by itself."""
    while True:
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), CONNECT).close()
            return
        time.sleep(0.05)


def main() -> None:
    """See above."""
    work = json.loads(Path(sys.argv[1]).read_bytes())
    scenario = Scenario("", [tuple(point) for point in work["users"]])
    with Path(work["samples"]).open("w") as file:
        log = Log(file)
        # A run that ends lets requests end that are under way, for a while.
        environment = Environment(
            user_classes=people(work, log),
            shape_class=shape_of(scenario, work["most"], work["seconds"]),
            stop_timeout=CONNECT,
        )
        ended = threading.Event()

        def started(**_: object) -> None:
            log.begin()
            print("started", flush=True)

        def stopped(**_: object) -> None:
            log.flush()
            print("stopped", flush=True)
            ended.set()

        environment.events.test_start.add_listener(started)
        environment.events.test_stop.add_listener(stopped)
        runner = environment.create_local_runner()
        if work["web"]:
            environment.create_web_ui("127.0.0.1", work["web"])
            await_listening(work["web"])
            print("web", flush=True)
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
        else:
            runner.start_shape()
            ended.wait()
        runner.quit()


if __name__ == "__main__":
    main()
