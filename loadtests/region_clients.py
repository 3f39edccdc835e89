"""The people of one office, as plain HTTP clients: ``python -m loadtests.region_clients WORK RESULT``.

WORK is a JSON document: ``url`` of whom they ask, ``bodies`` (a folder), and ``people``: for each the requests that it
makes one after the other, each with the seconds to wait before, the path, and the file in ``bodies`` that has to come.
They begin at the first line on standard input, after ``ready`` was said. RESULT gets the samples. Each person has one
connection, as long as it lasts; a body is compared with what was published byte by byte, after the clock was stopped.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict, dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 120.0
"""Seconds that nothing may come before a request has failed."""


@dataclass(frozen=True)
class Asked:
    """One request. ``error`` is empty where what came was right."""

    path: str
    begun: float
    """Seconds on the machine's monotonic clock."""
    seconds: float
    """Until the last byte."""
    size: int
    cache: str
    error: str


class Person:
    """One of them, on one connection while that lasts."""

    def __init__(self, url: str, bodies: dict[str, bytes]) -> None:
        """``url``: of whom is asked. ``bodies``: what has to come, by name."""
        parts = urlsplit(url)
        assert parts.hostname
        self._connection = HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE)
        self._bodies = bodies

    def work(self, requests: list[tuple[float, str, str]], done: list[Asked]) -> None:
        """Make all requests; samples are added to ``done``."""
        for wait, path, name in requests:
            time.sleep(wait)
            done.append(self.ask(path, self._bodies[name]))
        self._connection.close()

    def ask(self, path: str, wanted: bytes) -> Asked:
        """Make one request."""
        body, got, cache, error = bytearray(len(wanted) + 1), 0, "", ""
        begun = time.monotonic()
        try:
            self._connection.request("GET", path, headers={"Accept-Encoding": "identity"})
            answer = self._connection.getresponse()
            cache = answer.getheader("Cache-Status") or answer.getheader("X-Cache-Status") or ""
            with memoryview(body) as buffer:
                while got < len(buffer) and (size := answer.readinto(buffer[got:])):
                    got += size
            error = "" if answer.status == 200 else f"status {answer.status}"
        except (OSError, HTTPException) as failure:
            self._connection.close()
            error = type(failure).__name__
        seconds = time.monotonic() - begun
        del body[got:]
        if not error and body != wanted:  # not as memoryviews: 50 ms for 10 MB, in which no other person is served
            error = "other bytes than were published"
        return Asked(path, begun, seconds, got, cache, error)


def main() -> None:
    """See above."""
    work: dict[str, Any] = json.loads(Path(sys.argv[1]).read_bytes())
    names = {name for requests in work["people"] for _, _, name in requests}
    bodies = {name: Path(work["bodies"], name).read_bytes() for name in names}
    done: list[Asked] = []
    people = [
        threading.Thread(target=Person(work["url"], bodies).work, args=(requests, done)) for requests in work["people"]
    ]
    print("ready", flush=True)
    sys.stdin.readline()
    for person in people:
        person.start()
    for person in people:
        person.join()
    Path(sys.argv[2]).write_text(json.dumps([asdict(sample) for sample in done]))


if __name__ == "__main__":
    main()
