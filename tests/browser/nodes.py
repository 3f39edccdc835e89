"""Nodes that say of themselves what a test has them say: real servers on real sockets, without caches."""

from __future__ import annotations

import json
import threading
import urllib.request
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.harness import Service


def traffic(
    served: int, link: int, *, hits: int = 9, requests: int = 10, saved: int = 0, errors: int = 0
) -> dict[str, int]:
    """What a node counted of a model."""
    return {
        "served": served,
        "link": link,
        "peers": 0,
        "saved": saved,
        "hits": hits,
        "requests": requests,
        "errors": errors,
    }


def status(models: dict[str, dict[str, int]], *, sent: int = 0, **more: object) -> dict[str, Any]:
    """A node's status, as far as the dashboard reads it."""
    tiers = {"memory": {"used": 10**8, "budget": 10**9}, "disk": {"used": 150 * 10**9, "budget": 200 * 10**9}}
    usage = {"day": datetime.now(UTC).date().isoformat(), "models": models}
    return {"sent_bytes": {"hit-disk": sent}, "upstream_bytes": 0, "fills": 0, **tiers, "usage": usage, **more}


class FakeNode:
    """``status`` is what it says; None: it answers 503, also to probes."""

    def __init__(self, said: dict[str, Any] | bytes | None) -> None:
        self.status = said
        self.asked = 0
        """Times that its status was asked for."""
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if self.path == "/status":
                    node.asked += 1
                body = node.status if isinstance(node.status, bytes) else json.dumps(node.status).encode()
                self.send_response(503 if node.status is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def join(self, router: Service, node: str, region: str, **told: object) -> None:
        """A heartbeat of it, to a router without an enrolment."""
        body = json.dumps({"url": self.url, "region": region, "weight": 1, **told}).encode()
        fields = {"Content-Type": "application/json"}
        asking = urllib.request.Request(f"{router.url}/nodes/{node}", body, fields, method="PUT")
        urllib.request.urlopen(asking, timeout=10).close()

    def close(self) -> None:
        """Stop."""
        self._server.shutdown()
        self._server.server_close()
