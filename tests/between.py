"""A TCP proxy between clients and a node, at an address of its own: it can lie, hold back, and count."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Change = Callable[[bytes], bytes]


class Between:
    """One proxy. ``to`` (a port) is set once the node is there."""

    def __init__(self, host: str) -> None:
        """``host``: some 127.0.0.x: aria2 counts connections by host, whatever the port."""
        self._listener = socket.create_server((host, 0))
        self.url = f"http://{host}:{self._listener.getsockname()[1]}"
        self.to = self.accepted = 0
        self.holding, self.release = threading.Event(), threading.Event()
        self.behave()
        threading.Thread(target=self._accept, daemon=True).start()

    def behave(self, change: Change = bytes, hold_after: int | None = None) -> None:
        """Begin to count anew; ``change`` all that is read, hold back after so many bytes until ``release`` is set."""
        self.release.set()  # whoever is still being held
        self.change, self.hold_after, self.passed = change, hold_after, 0
        self.holding, self.release = threading.Event(), threading.Event()

    def close(self) -> None:
        """Take no more connections."""
        self.release.set()
        with suppress(OSError):  # wakes up the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        release = self.release
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self.to), 10) as node:
            node.settimeout(None)
            threading.Thread(target=_pump, args=(client, node), daemon=True).start()
            try:
                while data := node.recv(65536):
                    self.passed += len(data)
                    if self.hold_after is not None and self.passed >= self.hold_after:
                        self.holding.set()
                        release.wait()
                    client.sendall(self.change(data))
            finally:  # to close it would wait for the thread that reads from it
                client.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def between(*hosts: str) -> Iterator[list[Between]]:
    """A proxy for each host."""
    proxies = [Between(host) for host in hosts]
    try:
        yield proxies
    finally:
        for proxy in proxies:
            proxy.close()


def lying(data: bytes) -> bytes:
    """Bodies with a bit wrong in every read but the one that begins with a head."""
    return data if data.startswith(b"HTTP/") else data[:-1] + bytes([data[-1] ^ 1])
