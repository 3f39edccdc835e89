"""Run inside network and mount namespaces of its own: a network from ``infra/make-network``, started as its files say.

Every name that is in the files leads to an address of loopback here, so nothing of them has to be changed but where
services listen and keep their data. Prints ``well`` at its end; what a service printed, where it is not.
"""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.harness import make_model, wait_until

INFRA = Path(__file__).parents[2] / "infra"
NODES = {"berlin-1": "berlin", "paris-1": "paris"}
HOSTS = {"redis": "127.0.1.1", "origin": "127.0.1.2", "router-1": "127.0.1.3", "router-2": "127.0.1.4",
         "berlin-1": "127.0.1.5", "paris-1": "127.0.1.6"}  # fmt: skip


def nearshard(*words: str) -> list[str]:
    return [sys.executable, "-m", "nearshard", *words]


class Place:
    """A network's folder, and its services."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.net, self.stack = folder, folder / "net", stack
        self.tls: ssl.SSLContext | None = None

    def make(self) -> None:
        """Names, then keys, certificates and settings."""
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in HOSTS.items()))
        subprocess.run(["mount", "--bind", self.folder / "hosts", "/etc/hosts"], check=True)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        command = self.folder / "nearshard"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m nearshard "$@"\n')
        command.chmod(0o755)
        words = [
            str(INFRA / "make-network"),
            str(self.net),
            "acme",
            "",
            *(f"{node}@{region}" for node, region in NODES.items()),
        ]
        env = {**os.environ, "NEARSHARD": str(command), "NEARSHARD_ETC": f"{self.net}/%s"}
        subprocess.run(words, env=env, check=True, stdout=sys.stderr)
        self.tls = ssl.create_default_context(cafile=str(self.net / "origin" / "ca.pem"))

    def start(self, name: str, words: list[str]) -> None:
        """Have a service run until the end, its words in a log."""
        log = self.stack.enter_context((self.folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(words, stdout=log, stderr=log)
        self.stack.callback(process.wait, 20)
        self.stack.callback(process.terminate)

    def service(self, name: str, kind: str, *words: str) -> None:
        """Have one of ours run, by its settings."""
        config = ["--config", str(self.net / name / "nearshard.toml"), "--host", HOSTS[name]]
        self.start(name, nearshard(kind, *config, *words))
        port = {"origin": 8710, "router": 8700, "edge": 8720}[kind]
        wait_until(lambda: urlopen(f"https://{name}:{port}/readyz", context=self.tls, timeout=5), f"{name} ready", 30)

    def check_health(self, name: str) -> None:
        """The image's health check, but for localhost, where here is another service. Raises CalledProcessError."""
        script = (INFRA / "ready").read_text()
        assert "://localhost:" in script
        words = [sys.executable, "-W", "error", "-c", script.replace("://localhost:", f"://{name}:")]
        subprocess.run([*words, str(self.net / name / "nearshard.toml")], check=True)

    def status(self, name: str) -> dict[str, Any]:
        """A router's ``/status``."""
        with urlopen(f"https://{name}:8700/status", context=self.tls, timeout=5) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


def redis_words(etc: Path) -> list[str]:
    """As Compose starts it."""
    return [
        "redis-server", "--bind", HOSTS["redis"], "--port", "0", "--tls-port", "6379",
        "--tls-cert-file", f"{etc}/tls.pem", "--tls-key-file", f"{etc}/tls.key", "--tls-ca-cert-file", f"{etc}/ca.pem",
        "--tls-auth-clients", "no", "--aclfile", f"{etc}/users.acl", "--save", "", "--appendonly", "no",
    ]  # fmt: skip


def run(place: Place) -> None:
    """Start all, publish, fetch."""
    place.make()
    folder, net = place.folder, place.net
    place.start("redis", redis_words(net / "redis"))
    place.service("origin", "origin", "--store", str(net / "store"), "--audit", str(folder / "audit.jsonl"))
    for router in ("router-1", "router-2"):
        place.service(router, "router", "--data", str(folder / router))
    for node in NODES:
        (folder / node).mkdir()
        key = (net / node / "node.key").read_bytes()
        (folder / node / "node.key").touch(0o600)
        (folder / node / "node.key").write_bytes(key)
        place.service(node, "edge", "--data", str(folder / node))
    place.check_health("router-2")
    for router in ("router-1", "router-2"):
        wait_until(lambda name=router: len(place.status(name)["nodes"]) == 2, f"both nodes at {router}")  # type: ignore[misc]
        wait_until(lambda name=router: not place.status(name).get("degraded"), f"{router} to reach Redis")  # type: ignore[misc]

    make_model(folder / "model")
    ca = ["--ca", str(net / "origin" / "ca.pem")]
    publish = ["publish", str(folder / "model"), "acme/tiny", "--origin", "https://origin:8710"]
    subprocess.run(nearshard(*publish, "--keys", str(net / "offline" / "keys"), *ca), check=True, stdout=sys.stderr)
    got = ["get", "acme/tiny", "-o", str(folder / "got"), "--router", "https://router-1:8700,https://router-2:8700"]
    subprocess.run(
        nearshard(*got, "--trust-root", str(net / "origin" / "root.json"), *ca), check=True, stdout=sys.stderr
    )
    assert (folder / "got" / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
    if os.stat(net / "router-1" / "nearshard.toml").st_mode & 0o077:
        raise AssertionError("others may read the settings, which have a password")


def main() -> None:
    """Run it in the folder that is named."""
    folder = Path(sys.argv[1])
    try:
        with ExitStack() as stack:
            run(Place(folder, stack))
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            sys.stderr.write(f"--- {log.name}\n{log.read_text()[-2000:]}\n")
        raise
    sys.stdout.write("well\n")


if __name__ == "__main__":
    main()
