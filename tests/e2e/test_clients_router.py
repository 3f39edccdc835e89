"""Other people's clients, unchanged, through the router: curl and aria2 get the right bytes from whoever lives."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from shared.manifest import MIN_PIECE
from tests.between import Between, between, lying
from tests.harness import Lab, Service, make_model, wait_nodes, wait_until

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
TASK = "/shards/acme/tiny"


class Flip:
    """Changes one byte of what passes, after so many: in the middle of a read, so of a body."""

    def __init__(self, after: int) -> None:
        self.done = False
        self._left = after

    def __call__(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self.done or self._left > 0 or data.startswith(b"HTTP/") or len(data) < 1000:
            return data
        self.done = True
        return data[:500] + bytes([data[500] ^ 1]) + data[501:]


@dataclass
class Network:
    """A router and three edges of one region, each behind a proxy that it is known by."""

    router: Service
    edges: list[Service]
    proxies: list[Between]
    model: Path
    out: Path
    sha256: str

    def run_curl(self, *words: str, code: int = 0) -> str:
        """curl in the folder for downloads; what it printed."""
        done = subprocess.run(
            ["curl", "-sS", *words], cwd=self.out, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    def aria2_command(self, *words: str) -> list[str]:
        """aria2 with its own settings, but for the least bytes that are worth a connection: the model is small."""
        return ["aria2c", "--no-conf", "--min-split-size=1M", "--file-allocation=none", f"--dir={self.out}", *words]

    def run_aria2(self, *words: str) -> str:
        """aria2 in the folder for downloads; what it printed."""
        done = subprocess.run(
            self.aria2_command(*words), capture_output=True, text=True, errors="replace", timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def got(self, name: str) -> str:
        """SHA-256 of a download."""
        return hashlib.sha256((self.out / name).read_bytes()).hexdigest()

    def names(self) -> set[str]:
        """What is in the folder for downloads."""
        return {path.name for path in self.out.iterdir()}

    def best(self) -> int:
        """Which edge the router would send a client to."""
        where = self.run_curl("-o/dev/null", "-w%{redirect_url}", self.router.url + TASK)
        return next(number for number, proxy in enumerate(self.proxies) if where.startswith(proxy.url + "/"))

    def hold(self, after: int) -> None:
        """Have whichever node is asked hold back after so many bytes. All have it all, and ask no other."""
        for edge in self.edges:
            self.run_curl("-o/dev/null", edge.url + TASK)
        for proxy in self.proxies:
            proxy.behave(hold_after=after)

    def caught(self) -> int:
        """Which edge was asked, and is held back; no other is any more. What the router would say may have changed
        since, as loads do."""
        wait_until(lambda: any(proxy.holding.is_set() for proxy in self.proxies), "a node is held back")
        number = next(number for number, proxy in enumerate(self.proxies) if proxy.holding.is_set())
        for other in (proxy for proxy in self.proxies if proxy is not self.proxies[number]):
            other.behave()
        return number

    def forgotten(self, number: int) -> None:
        """Wait until the router has dropped an edge."""
        gone = f"n{number}"
        wait_until(lambda: all(node["id"] != gone for node in self.router.status()["nodes"]), "the node is dropped")


@pytest.fixture(scope="module")
def network(shared_lab: Lab) -> Iterator[Network]:
    """A model of 17 pieces."""
    model = shared_lab.folder / "model"
    make_model(model, width=1024)
    shared_lab.publish(model)
    origin = shared_lab.origin()
    router = shared_lab.router(origin, ttl="2")
    sha256 = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    with between(*HOSTS) as proxies:
        edges = []
        for number, proxy in enumerate(proxies):
            edge = shared_lab.edge(
                origin, router=router, node=f"n{number}", region="default", advertise=proxy.url, heartbeat="0.2"
            )
            proxy.to = edge.port
            edges.append(edge)
        yield Network(router, edges, proxies, model, shared_lab.folder / "out", sha256)


@pytest.fixture
def net(network: Network, need: Callable[[str], str]) -> Network:
    """All edges there, nobody lies, and nothing downloaded yet."""
    for program in ("curl", "aria2c"):
        need(program)
    for proxy in network.proxies:
        proxy.behave()
    for edge in network.edges:
        if edge.ended():
            edge.start()
    wait_nodes(network.router, len(network.edges))
    shutil.rmtree(network.out, ignore_errors=True)
    network.out.mkdir()
    return network


# aria2


def test_aria2_takes_from_several_nodes_at_once_and_keeps_the_published_name(net: Network) -> None:
    net.run_aria2(net.router.url + TASK)
    assert net.got("model.safetensors") == net.sha256
    assert net.names() == {"model.safetensors", "model.safetensors.meta4"}
    assert all(proxy.passed > 1 << 20 for proxy in net.proxies)


def test_aria2_gets_a_file_by_its_path(net: Network) -> None:
    net.run_aria2("--follow-metalink=mem", f"{net.router.url}/models/acme/tiny/files/main/model.safetensors")
    assert net.got("model.safetensors") == net.sha256
    assert net.names() == {"model.safetensors"}, "the metalink stayed in memory"


def test_aria2_gets_it_from_an_edge_alone(net: Network) -> None:
    net.run_aria2(net.edges[0].url + TASK)
    assert net.got("model.safetensors") == net.sha256


def test_aria2_that_wants_no_metalink_follows_the_redirect_and_checks_the_digest(net: Network) -> None:
    out = net.run_aria2("--header=Accept: */*", "--out=mine.bin", "--log-level=info", "--log=-", net.router.url + TASK)
    assert net.got("mine.bin") == net.sha256
    assert "Verification finished successfully" in out


def test_aria2_ends_with_the_right_bytes_where_a_node_serves_wrong_ones(net: Network) -> None:
    liar = net.proxies[net.best()]
    liar.behave(change=lying)
    out = net.run_aria2("--log-level=info", "--log=-", net.router.url + TASK)
    assert net.got("model.safetensors") == net.sha256
    assert "checksum" in out.lower() and liar.passed > 1 << 20, "it was asked, and found out"


def test_aria2_goes_on_where_a_node_is_killed_on_the_way(net: Network) -> None:
    net.hold(1 << 20)
    with subprocess.Popen(net.aria2_command("--quiet", net.router.url + TASK)) as aria2:
        number = net.caught()
        net.edges[number].kill()
        net.proxies[number].release.set()
        assert aria2.wait(60) == 0
    assert net.got("model.safetensors") == net.sha256


def test_aria2_goes_on_where_it_was_stopped(net: Network) -> None:
    for proxy in net.proxies:
        proxy.behave(hold_after=2 << 20)
    with subprocess.Popen(net.aria2_command("--quiet", "--continue", net.router.url + TASK)) as aria2:
        assert all(proxy.holding.wait(20) for proxy in net.proxies)
        aria2.terminate()
        aria2.wait(20)
    assert "model.safetensors.aria2" in net.names(), "it was not done"
    for proxy in net.proxies:
        proxy.behave()
    number = net.best()
    net.edges[number].kill()
    net.forgotten(number)  # so that the next metalink names other nodes
    net.run_aria2("--continue", net.router.url + TASK)
    assert net.got("model.safetensors") == net.sha256
    assert "model.safetensors.aria2" not in net.names()


def test_aria2_with_all_its_connections_uses_every_node_and_checks_pieces(net: Network) -> None:
    words = ["-x16", "-s16", "--follow-metalink=mem", "--log-level=debug", "--log=-"]
    out = net.run_aria2(*words, net.router.url + TASK)
    assert net.got("model.safetensors") == net.sha256
    assert all(proxy.passed > 1 << 20 for proxy in net.proxies)
    assert "Good chunk checksum" in out, "of pieces, on the way"


def test_aria2_without_the_metalink_uses_every_node_by_the_link_fields_and_checks_the_whole_alone(net: Network) -> None:
    words = ["-x16", "-s16", "--header=Accept: */*", "--out=mine.bin", "--log-level=debug", "--log=-"]
    out = net.run_aria2(*words, net.router.url + TASK)
    assert net.got("mine.bin") == net.sha256
    assert all(proxy.passed > 1 << 20 for proxy in net.proxies)
    assert "Good chunk checksum" not in out and "Verification finished successfully" in out


def test_aria2_fetches_only_the_piece_again_of_which_one_byte_is_wrong(net: Network) -> None:
    flip = Flip(after=1 << 20)
    liar = net.proxies[net.best()]
    liar.behave(change=flip)
    size = (net.model / "model.safetensors").stat().st_size
    out = net.run_aria2("-x16", "-s16", "--log-level=info", "--log=-", net.router.url + TASK)
    assert flip.done and net.got("model.safetensors") == net.sha256
    assert "checksum" in out.lower()
    moved = sum(proxy.passed for proxy in net.proxies)
    assert size + 1 < moved < size + 3 * MIN_PIECE, "no more than a piece twice"


# curl


def test_curl_follows_the_redirect_and_can_keep_the_published_name(net: Network) -> None:
    net.run_curl("-L", "-omine.bin", net.router.url + TASK)
    net.run_curl("-LOJ", net.router.url + TASK)
    assert {net.got("mine.bin"), net.got("model.safetensors")} == {net.sha256}


def test_curl_goes_on_where_it_was_stopped(net: Network) -> None:
    whole = (net.model / "model.safetensors").read_bytes()
    (net.out / "mine.bin").write_bytes(whole[: len(whole) // 2])
    status = net.run_curl("-L", "-C-", "-omine.bin", "-w%{http_code} %{size_download}", net.router.url + TASK)
    assert status == f"206 {len(whole) - len(whole) // 2}"
    assert net.got("mine.bin") == net.sha256


@pytest.mark.parametrize("killed", [False, True])
def test_conditions_and_ranges_mean_the_same_through_the_router(net: Network, killed: bool) -> None:
    if killed:
        number = net.best()
        net.edges[number].kill()
        net.forgotten(number)
    size = (net.model / "model.safetensors").stat().st_size
    etag = f'"{net.sha256}"'

    def ask(*words: str) -> tuple[str, int]:
        """Status of the last answer, and bytes of its body."""
        said = net.run_curl("-L", "-obody", "-w%{http_code} %{size_download}", *words, net.router.url + TASK)
        status, _, length = said.partition(" ")
        return status, int(length)

    assert ask() == ("200", size)
    assert net.got("body") == net.sha256
    assert ask("-r100-299") == ("206", 200)
    assert (net.out / "body").read_bytes() == (net.model / "model.safetensors").read_bytes()[100:300]
    assert ask("-r100-299", "-HIf-Range: " + etag) == ("206", 200)
    assert ask("-r100-299", '-HIf-Range: "other"') == ("200", size)
    assert ask("-HIf-None-Match: " + etag) == ("304", 0)
    assert ask('-HIf-None-Match: "other"') == ("200", size)
    assert ask("-r99999999-")[0] == "416"
    assert ask('-HIf-Match: "other"')[0] == "412"
    heads = net.run_curl("-IL", net.router.url + TASK).lower()
    assert re.findall(r"^http/1.1 (\d+)", heads, re.MULTILINE) == ["307", "200"]
    assert f"content-length: {size}" in heads and heads.count(f"etag: {etag}") == 2
    # The router answers conditions itself where it can: nobody need be asked for what has not changed.
    own = net.run_curl("-I", "-HIf-None-Match: " + etag, net.router.url + TASK)
    assert own.startswith("HTTP/1.1 304 ") and "location" not in own.lower()


def test_curl_that_retries_is_served_by_another_node_where_one_is_killed_on_the_way(net: Network) -> None:
    net.hold(1 << 20)
    words = ["-sS", "-L", "--retry", "20", "--retry-delay", "1", "--retry-all-errors", "-omine.bin"]
    with subprocess.Popen(["curl", *words, net.router.url + TASK], cwd=net.out) as curl:
        number = net.caught()
        net.edges[number].kill()
        net.proxies[number].release.set()
        assert curl.wait(60) == 0
    assert net.got("mine.bin") == net.sha256


def test_curl_goes_on_at_another_node_where_one_is_killed_on_the_way(net: Network) -> None:
    net.hold(4 << 20)
    url = net.router.url + TASK
    with subprocess.Popen(["curl", "-sS", "-L", "-C-", "-omine.bin", url], cwd=net.out) as curl:
        number = net.caught()
        net.edges[number].kill()
        net.proxies[number].release.set()
        assert curl.wait(60) == 18, "a partial file: it broke off"
    had = (net.out / "mine.bin").stat().st_size
    size = (net.model / "model.safetensors").stat().st_size
    assert 1 << 20 < had < size
    net.forgotten(number)
    status = net.run_curl("-L", "-C-", "-omine.bin", "-w%{http_code} %{size_download}", url)
    assert status == f"206 {size - had}", "from another node, and only what was missing"
    assert net.got("mine.bin") == net.sha256
