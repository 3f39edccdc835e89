"""A real S3-speaking server (moto's) as a process on loopback, and the environment that leads obstore there.

It looks at the condition of a conditional write and then writes, on threads: real stores do both in one step, so here
one write ends before the next begins.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from shared.web.server import free_port
from tests.harness import wait_until

BUCKET = "models"
SECRET = "s3cr3t/that+nobody/may+see"


def environment(url: str) -> Mapping[str, str]:
    """What says where the server is, and who asks, as with any S3."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """The URL of a server with an empty bucket."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (folder / "s3.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(port)],
            stdout=log, stderr=log, env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": ""},
        )  # fmt: skip
    try:
        wait_until(lambda: _answers(url), "the S3 server to answer")
        yield url
    finally:
        process.kill()
        process.wait(10)


def _answers(url: str) -> bool:
    with (
        suppress(urllib.error.URLError),
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT"), timeout=5) as answer,
    ):
        return bool(answer.status == 200)
    return False


def _one_write_at_a_time(app: WSGIApplication) -> WSGIApplication:
    lock = threading.Lock()

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        with lock if environ["REQUEST_METHOD"] in ("PUT", "POST", "DELETE") else nullcontext():
            return app(environ, start)

    return answer


def _serve(port: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    run_simple("127.0.0.1", port, _one_write_at_a_time(DomainDispatcherApplication(create_backend_app)), threaded=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
