"""Federated rounds from end to end: sites submit through an edge, and the network delivers what comes of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from nearshard import Client
from nearshard.federated.sending import Rejected, Sender
from nearshard.federated.site import enroll
from nearshard.federated.state import State
from nearshard.federated.submitting import Submitted
from shared.clock import SystemClock
from shared.errors import NearshardError, RequestError, SiteClock, UpstreamError
from tests.harness import Lab, Service, command, get_json, make_model, wait_until

MODEL = "acme/tiny"
NAMES = ("athens", "berlin", "cairo", "delhi", "espoo")
Tensors = dict[str, NDArray[np.float32]]


@dataclass
class Federation:
    """An origin with an edge before it, sites, and a model."""

    lab: Lab
    origin: Service
    edge: Service
    folder: Path
    base: str
    tensors: Tensors
    sites: dict[str, str] = field(default_factory=dict)
    """By name, the lines of the operator's file."""

    def enroll(self, *names: str) -> None:
        """New sites of this machine."""
        for name in names:
            self.sites[name] = command("federated", "enroll", name, "--sites", str(self.folder / "sites")).stdout

    def operate(self, *words: str, check: bool = True) -> dict[str, Any]:
        """A word of the operator's."""
        keys = [] if words[0] == "status" else ["--keys", str(self.lab.keys)]
        done = command("federated", *words, "--store", str(self.lab.store), *keys, "--json", check=check)
        return dict(json.loads(done.stdout))

    def open(self, *words: str) -> dict[str, Any]:
        """Open a round for all sites."""
        file = self.folder / "sites.toml"
        file.write_text("\n".join(self.sites.values()))
        few = [] if "--min-sites" in words else ["--min-sites", "1", "--rule", "mean"]
        return self.operate("open", MODEL, "--sites", str(file), *few, *words)

    def train(self, seed: int, size: float = 0.01) -> Tensors:
        """The model as somebody has trained it."""
        rng = np.random.default_rng(seed)
        return {
            name: (values - size * rng.standard_normal(values.shape)).astype(np.float32)
            for name, values in self.tensors.items()
        }

    async def submit(self, site: str, trained: Mapping[str, Any], base: str = "", **words: Any) -> Submitted:
        """As a program does it; straight to the origin unless ``url`` says otherwise."""
        url, clock = words.pop("url", self.origin.url), words.pop("clock", SystemClock())
        async with Client(self.origin.url, repository=self.folder / "repository", clock=clock) as client:
            return await client.submit(
                MODEL, trained, base or self.base, site=site, sites=self.folder / "sites", url=url, **words
            )

    def updates(self) -> dict[str, Any]:
        """What is counted in the last round, by site."""
        (last,) = self.operate("status", MODEL)["rounds"]
        return dict(last["updates"])

    def counted(self, site: str) -> int:
        """How often an update of a site was counted, by the audit log."""
        lines = (self.lab.store.parent / "audit.log").read_text().splitlines()
        said = [json.loads(line) for line in lines]
        return sum(line["event"] == "update counted" and site in line.values() for line in said)

    def state(self, site: str) -> State:
        """What a site keeps."""
        state = State(self.folder / "sites" / site / MODEL)
        with state.locked():
            return state


@pytest.fixture
def federation(lab: Lab, tmp_path: Path) -> Federation:
    return make_federation(lab, tmp_path, 64)


def make_federation(lab: Lab, folder: Path, width: int) -> Federation:
    """Of a model of that width."""
    tensors = make_model(folder / "model", width=width)
    base = lab.publish(folder / "model", MODEL)
    origin = lab.origin("--federated.interval=0", f"--audit={lab.store.parent / 'audit.log'}")
    return Federation(lab, origin, lab.edge(origin), folder, base, tensors)


def test_five_sites_make_a_revision_that_the_network_delivers(federation: Federation, tmp_path: Path) -> None:
    """Enrolled, opened, submitted through the edge alone, closed, and fetched through it as a canary."""
    it = federation
    it.enroll(*NAMES)
    it.open("--min-sites", "5", "--rule", "mean")
    said = command("federated", "rounds", MODEL, "--router", it.edge.url).stdout
    assert "round 1 is open" in said and f"base    {it.base}" in said
    updates = []
    for number, name in enumerate(NAMES):
        trained = it.train(number)
        updates.append({key: it.tensors[key] - values for key, values in trained.items()})
        folder = tmp_path / name
        folder.mkdir()
        save_file(trained, folder / "model.safetensors")
        words = [
            "--site",
            name,
            "--sites",
            str(tmp_path / "sites"),
            "--router",
            it.edge.url,
            "--codec",
            "int8",
            "--json",
        ]
        done = command(
            "federated", "submit", MODEL, "--base", it.base, "--update", str(folder), "--examples", "10", *words,
            NEARSHARD_REPOSITORY=str(tmp_path / "repository"),
        )  # fmt: skip
        told = json.loads(done.stdout)
        assert (told["round"], told["base"], told["resumed"]) == (1, it.base, False)
        assert told["size"] < 0.3 * told["full"]
    assert it.updates().keys() == set(NAMES)
    assert it.operate("close", MODEL)["state"] == "published"
    command("get", f"{MODEL}@canary", "--router", it.edge.url, "-o", str(tmp_path / "got"))
    got = load_file(tmp_path / "got" / "model.safetensors")
    for key, before in it.tensors.items():
        wanted = before - np.mean([update[key] for update in updates], axis=0)
        np.testing.assert_allclose(got[key], wanted, atol=1e-3)
        assert np.abs(got[key] - before).max() > 1e-3
    said = command("federated", "rounds", MODEL, "--router", it.edge.url).stdout
    assert "no round of acme/tiny is open" in said and "round 1 published, 5 sites" in said
    assert it.state("berlin").kept.last == 1


class Cut:
    """A TCP proxy before a service, that cuts a connection once it has passed so many bytes up."""

    def __init__(self, to: int) -> None:
        self._to, self._listener = to, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.up: list[int] = []
        """Bytes passed up, by connection."""
        self.cuts: list[int] = []
        """After how many bytes the next connections that bring so many are cut, in order."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        number = len(self.up)
        self.up.append(0)
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as server:
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()
            while data := client.recv(65536):
                server.sendall(data)
                self.up[number] += len(data)
                if self.cuts and self.up[number] >= self.cuts[0]:
                    self.cuts.pop(0)
                    break
            server.shutdown(socket.SHUT_RDWR)
            client.shutdown(socket.SHUT_RDWR)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)
            client.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def cut_before(service: Service) -> Iterator[Cut]:
    """A proxy before a service."""
    cut = Cut(service.port)
    try:
        yield cut
    finally:
        cut.close()


@pytest.mark.parametrize("by_edge", [False, True])
async def test_an_upload_goes_on_at_the_byte_it_reached(lab: Lab, tmp_path: Path, by_edge: bool) -> None:
    """The link breaks twice, between the site and the one it asks; what came over it before is not sent again."""
    it = await asyncio.to_thread(make_federation, lab, tmp_path, 512)
    it.enroll("berlin")
    await asyncio.to_thread(it.open)
    with cut_before(it.edge if by_edge else it.origin) as cut:
        cut.cuts = [1 << 20, 2 << 20]
        done = await it.submit("berlin", it.train(1), url=cut.url, codec="fp32")
        assert not cut.cuts and done.size > 3 << 20
        assert sum(cut.up) < done.size + (2 << 20)  # what was on its way at a cut: what sockets hold
    assert (await asyncio.to_thread(it.updates)).keys() == {"berlin"} and it.counted("berlin") == 1


async def test_an_origin_that_dies_in_the_middle_is_sent_the_rest(lab: Lab, tmp_path: Path) -> None:
    it = await asyncio.to_thread(make_federation, lab, tmp_path, 512)
    it.enroll("berlin")
    await asyncio.to_thread(it.open)
    reached: list[int] = []

    def progress(there: int, whole: int) -> None:
        reached.append(there)

    def arrived() -> int:
        return max(
            (file.stat().st_size for file in lab.store.parent.glob("**/spool/**/*") if file.is_file()), default=0
        )

    with cut_before(it.origin) as cut:
        cut.cuts = [2 << 20]

        class Restarting(SystemClock):
            """The first pause is as long as it takes the origin to come back."""

            async def sleep(self, seconds: float) -> None:
                if not restarted:
                    restarted.append(1)
                    await asyncio.to_thread(it.origin.kill)
                    await asyncio.to_thread(it.origin.start)

        restarted: list[int] = []
        sending = Sender._append

        async def append(self: Sender, *words: Any) -> Any:
            """The origin is killed as the link breaks."""
            try:
                return await sending(self, *words)
            except UpstreamError:
                if not restarted:
                    await asyncio.to_thread(wait_until, lambda: arrived() >= 1 << 20, "some of it to arrive")
                    await asyncio.to_thread(it.origin.kill)
                raise

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sender, "_append", append)
            await it.submit("berlin", it.train(1), url=cut.url, codec="fp32", progress=progress, clock=Restarting())
    assert restarted and len(reached) > 2 and reached[-2] >= 1 << 20
    assert it.counted("berlin") == 1


def in_child(act: Callable[[], object]) -> int:
    """Do it in another process; the signal that killed it, or 0."""
    child = os.fork()
    if not child:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or not status, status
    return status


def dying(cls: type, name: str, *, after: bool) -> None:
    """Have this process die as a method is called, or as it has done its work."""
    method = getattr(cls, name)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sync(*words: Any) -> None:
        if after:
            method(*words)
        die()

    async def coroutine(*words: Any) -> None:
        if after:
            await method(*words)
        die()

    setattr(cls, name, coroutine if asyncio.iscoroutinefunction(method) else sync)


MOMENTS: list[tuple[type, str, bool]] = [
    (State, "begin", False),
    (State, "begin", True),
    (Sender, "_open", True),
    (Sender, "_append", True),
    (State, "counted", False),
    (State, "counted", True),
]


def test_a_site_that_is_killed_anywhere_is_counted_once(federation: Federation) -> None:
    """And its feedback is that of what was counted, once. F33."""
    it = federation
    names = [f"site-{number}" for number in range(len(MOMENTS))]
    it.enroll(*names, "absent")  # once all have delivered, the round is over
    it.open()
    trained = it.train(1)
    kept = []
    for site, (cls, name, after) in zip(names, MOMENTS, strict=True):

        def killed(site: str = site, cls: type = cls, name: str = name, after: bool = after) -> None:
            dying(cls, name, after=after)
            asyncio.run(it.submit(site, trained, url=it.edge.url))

        assert in_child(killed) == signal.SIGKILL
        was_counted = (cls, after) == (State, True) and name == "counted"
        try:
            done = asyncio.run(it.submit(site, trained))
        except Rejected as error:
            assert was_counted and error.error_code == "other_update"  # nothing was open: it made another
        else:
            assert not was_counted and done.resumed == ((cls, name, after) != (State, "begin", False))
        assert it.counted(site) == 1
        state = it.state(site)
        assert state.kept.pending is None and state.kept.last == 1
        files = sorted(file.name.partition("-")[0] for file in state.folder.iterdir())
        assert files == ["feedback", "lock", "state.json"]
        kept.append(state.path(state.kept.feedback).read_bytes())
    assert len(set(kept)) == 1
    assert it.updates().keys() == set(names)


class Off(SystemClock):
    """A wall clock that is wrong."""

    def __init__(self, by: float) -> None:
        self._by = by

    def time(self) -> float:
        return super().time() + self._by


async def refused(act: Any) -> NearshardError:
    """The error that it ends with."""
    with pytest.raises(NearshardError) as raised:
        await act
    return raised.value


async def test_each_refusal_says_what_to_do(federation: Federation) -> None:
    it = federation
    it.enroll("athens", "berlin")
    trained, edge = it.train(1), it.edge.url
    error = await refused(it.submit("athens", trained, url=edge))
    assert error.error_code == "no_round" and "no round of acme/tiny is open" in str(error)
    await asyncio.to_thread(it.open)
    make_model(it.folder / "other", width=64, seed=9)
    other = await asyncio.to_thread(it.lab.publish, it.folder / "other", MODEL, "--ref", "other")
    error = await refused(it.submit("athens", trained, other, url=edge))
    assert error.error_code == "stale_round" and it.base in str(error) and other in str(error)
    enroll("nobody", it.folder / "sites")
    error = await refused(it.submit("nobody", trained, url=edge))
    assert (error.error_code, error.exit_code) == ("unknown_site", 5)
    error = await refused(it.submit("athens", {**trained, "encoder.layer.0.bias": np.ones(3)}, url=edge))
    assert error.error_code == "schema_mismatch" and "encoder.layer.0.bias" in str(error)
    error = await refused(it.submit("athens", trained, url=edge, clock=Off(-900)))
    assert isinstance(error, SiteClock) and "900 s behind" in str(error) and error.exit_code == 5
    assert it.state("athens").kept.pending  # it is sent once the clock is right
    assert (await it.submit("athens", trained, url=edge)).resumed
    error = await refused(it.submit("athens", it.train(2), url=edge))
    assert error.error_code == "other_update" and it.state("athens").kept.last == 1
    error = await refused(it.submit("athens", trained, url="http://192.0.2.1:8710"))
    assert isinstance(error, RequestError) and "https" in str(error)


async def test_a_round_that_closes_meanwhile_keeps_the_update_for_the_next(federation: Federation) -> None:
    it = federation
    it.enroll("athens", "berlin")
    await asyncio.to_thread(it.open, "--late", "0.5")
    await it.submit("berlin", it.train(1))
    sending = Sender._open

    async def late(self: Sender, *words: Any) -> Any:
        """The round ends between the site's question and its statement."""
        patch.undo()
        await asyncio.to_thread(it.operate, "close", MODEL)
        return await sending(self, *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sender, "_open", late)
        error = await refused(it.submit("athens", it.train(2)))
    assert error.error_code == "stale_round" and "kept" in str(error) and "late" in str(error)
    await asyncio.to_thread(it.open, "--late", "0.5", "--base", "canary")
    done = await it.submit("athens", it.train(2))
    assert done.resumed and (done.round, done.base) == (1, it.base)
    taken = (await asyncio.to_thread(it.updates))["athens"]
    assert taken["round"] == 1 and it.state("athens").kept.last == 1


async def test_a_fresh_update_takes_the_place_of_one_that_came_too_late(federation: Federation) -> None:
    """And what was not counted is not in the feedback."""
    it = federation
    it.enroll("athens", "berlin")
    await asyncio.to_thread(it.open)
    await it.submit("berlin", it.train(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sender, "send", _lost)
        await refused(it.submit("athens", it.train(2)))
    assert it.state("athens").kept.pending
    await asyncio.to_thread(it.operate, "close", MODEL)
    opened = await asyncio.to_thread(it.open, "--base", "canary")
    done = await it.submit("athens", it.train(3), opened["base"])
    assert not done.resumed and done.round == 2
    assert it.state("athens").kept.rounds == 1


async def _lost(self: Sender, upload: object) -> None:
    raise UpstreamError("the link is gone")


async def test_an_edge_passes_on_what_its_caps_allow_and_answers_for_an_origin_that_is_away(
    federation: Federation,
) -> None:
    it = federation
    it.enroll("athens")
    await asyncio.to_thread(it.open)
    shown = await asyncio.to_thread(get_json, f"{it.edge.url}/federated/{MODEL}")
    assert shown == await asyncio.to_thread(get_json, f"{it.origin.url}/federated/{MODEL}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearshard.federated.sending.TRIES", 1)
        await asyncio.to_thread(it.origin.kill)
        error = await refused(it.submit("athens", it.train(1), url=it.edge.url))
    assert isinstance(error, UpstreamError) and error.exit_code == 6
