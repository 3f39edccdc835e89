"""Run inside network and mount namespaces of its own: three servers and Sentinels started by ``redis-start``, as pods.

The first server becomes the master; killed, another one is, and the first comes back as a replica. A router's client
finds the master by the Sentinels all the while, with the router's own user and the deployment's CA. Prints ``well``.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

from router.redis_client import parse_redis_url
from shared.certificates import Authority, load_authority, make_authority, make_certificate
from tests.harness import wait_until

BASE = Path(__file__).parents[2] / "infra" / "kubernetes" / "base"
ACL = BASE.parents[1] / "redis" / "users.acl"
DOMAIN = "redis.test"
PODS = ("redis-0", "redis-1", "redis-2")
PASSWORD = "0123456789abcdef"


def secrets(folder: Path) -> Path:
    """What the secret ``redis`` has, as ``make-network`` makes it."""
    now = datetime.now(UTC)
    ca, etc = folder / "ca", folder / "etc"
    ca.mkdir()
    etc.mkdir()
    made = make_authority("test", now)
    (ca / "ca.pem").write_bytes(made.certificate)
    (ca / "ca.key").touch(0o600)
    (ca / "ca.key").write_bytes(made.key)
    authority: Authority = load_authority(ca)
    pair = make_certificate(authority, "redis", ["redis", f"*.{DOMAIN}"], [], now, 1)
    (etc / "tls.pem").write_bytes(pair.certificate)
    (etc / "tls.key").write_bytes(pair.key)
    (etc / "ca.pem").write_bytes(made.certificate)
    (etc / "password").write_text(PASSWORD)
    (etc / "users.acl").write_text(
        ACL.read_text().replace("PASSWORD_SHA256", hashlib.sha256(PASSWORD.encode()).hexdigest())
    )
    return etc


class Pods:
    """The pods: a name and an address of loopback each."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack
        self.etc = secrets(folder)
        self.running: dict[tuple[str, str], subprocess.Popen[bytes]] = {}
        hosts = "".join(f"127.0.2.{n + 1} {pod}.{DOMAIN}\n" for n, pod in enumerate(PODS))
        (folder / "hosts").write_text(hosts)
        subprocess.run(["mount", "--bind", folder / "hosts", "/etc/hosts"], check=True)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    def start(self, pod: str, role: str) -> None:
        """Start the server or the Sentinel of a pod; each binds its own address here, where pods have the whole."""
        text = (BASE / "redis-start").read_text()
        assert "bind *\n" in text
        script = self.folder / f"{pod}-{role}"
        address = f"127.0.2.{PODS.index(pod) + 1}"
        script.write_text(text.replace("bind *\n", f"bind {address}\n").replace("failover-timeout nearshard 15000",
            "failover-timeout nearshard 2000").replace("down-after-milliseconds nearshard 5000",
            "down-after-milliseconds nearshard 500"))  # fmt: skip
        env = {**os.environ, "POD_NAME": pod, "DOMAIN": DOMAIN, "ETC": str(self.etc), "SERVER": "redis-server",
               "CLI": "redis-cli", "RUN": str(self.folder / f"{pod}-{role}.run")}  # fmt: skip
        log = self.stack.enter_context((self.folder / f"{pod}-{role}.log").open("ab"))
        process = subprocess.Popen(["/bin/sh", str(script), role], env=env, stdout=log, stderr=log)
        self.stack.callback(process.wait, 10)
        self.stack.callback(process.kill)
        self.running[pod, role] = process

    def kill(self, pod: str) -> None:
        """Both of a pod, at once."""
        for role in ("server", "sentinel"):
            self.running[pod, role].kill()
            self.running[pod, role].wait(10)

    def master(self) -> str:
        """As a router finds it: the pod that takes writes of the router's user; empty where none does."""
        hosts = ",".join(f"{pod}.{DOMAIN}:26379" for pod in PODS)
        url = f"rediss+sentinel://router:{PASSWORD}@{hosts}/nearshard/0?ssl_ca_certs={self.etc}/ca.pem"
        return asyncio.run(_written_at(url))


async def _written_at(url: str) -> str:
    clients = parse_redis_url(url)()
    try:
        await clients[0].hset("{nearshard:}meta", "probe", "1")
        connection = await clients[0].connection_pool.get_connection()
        host = str(connection.host)
        await clients[0].connection_pool.release(connection)
        return host.partition(".")[0]
    finally:
        for client in clients:
            await client.aclose()


def run(pods: Pods) -> None:
    """Start all, kill the master, let it come back."""
    for pod in PODS:
        for role in ("server", "sentinel"):
            pods.start(pod, role)
    wait_until(lambda: _is(pods, {"redis-0"}), "the first to be the master", 30)
    wait_until(lambda: all(_knows_all(pods, pod) for pod in PODS), "the Sentinels to know each other", 30)
    wait_until(lambda: all(_could_choose(pods, pod) for pod in PODS), "replicas that may become the master", 30)
    pods.kill("redis-0")
    wait_until(lambda: _is(pods, {"redis-1", "redis-2"}), "another one to be the master", 40)
    for role in ("server", "sentinel"):
        pods.start("redis-0", role)
    wait_until(lambda: "MASTER <-> REPLICA sync: Finished" in _log(pods, "redis-0"), "the first to be a replica", 30)
    assert pods.master() != "redis-0"


def _is(pods: Pods, wanted: set[str]) -> bool:
    try:
        return pods.master() in wanted
    except Exception as error:  # whatever the library raises while there is no master is "not yet"
        raise ValueError(str(error)) from error


def _knows_all(pods: Pods, pod: str) -> bool:
    return _sentinel(pods, pod, "ckquorum").startswith("OK 3 usable")


def _could_choose(pods: Pods, pod: str) -> bool:
    """Whether a Sentinel has heard of both that they are in step: one that never was is not chosen."""
    told = _sentinel(pods, pod, "replicas").splitlines()
    return [value for name, value in pairwise(told) if name == "master-link-status"] == ["ok", "ok"]


def _sentinel(pods: Pods, pod: str, asked: str) -> str:
    """What a Sentinel answers."""
    words = ["redis-cli", "--tls", "--cacert", str(pods.etc / "ca.pem"), "-h", f"{pod}.{DOMAIN}", "-p", "26379"]
    return subprocess.run([*words, "sentinel", asked, "nearshard"], capture_output=True, text=True, check=False).stdout


def _log(pods: Pods, pod: str) -> str:
    return (pods.folder / f"{pod}-server.log").read_text()


def main() -> None:
    """Run it in the folder that is named."""
    folder = Path(sys.argv[1])
    try:
        with ExitStack() as stack:
            run(Pods(folder, stack))
    except BaseException:
        for log in sorted(folder.glob("*.log")):
            sys.stderr.write(f"--- {log.name}\n{log.read_text()[-1500:]}\n")
        raise
    sys.stdout.write("well\n")


if __name__ == "__main__":
    main()
