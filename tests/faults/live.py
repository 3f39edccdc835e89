"""One network under load, that faults are injected into one after the other; after each, what must hold is looked at.

Two routers, an origin, two edges in the north and one in the south, all of them processes, and a Redis. Nodes beat
every 2 s and are out after 6, as by default; their caches are smaller than what is asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.numpy import load_file, save_file

from loadtests.report import note
from tests.faults import invariants
from tests.faults.client import until
from tests.faults.figures import Case
from tests.faults.line import Line, forwarder
from tests.faults.load import Broken, Load
from tests.faults.network import MODEL, Net, network, now
from tests.harness import Lab, NotYet, Service, get_json, make_model
from tests.redis_server import KINDS, RedisServer

EDGES = {"north-1": "north", "north-2": "north", "south-1": "south"}
MANY = "acme/many"
"""The model whose shards are more than the nodes may keep."""
CACHE = {"memory": "1MiB", "disk": "3MiB", "ref_lifetime": "1"}
WARMING = 60
"""Requests of each client before the baseline is taken."""
SLACK_TASKS = 8
"""Beside a tenth."""
LATE = 120.0
"""Seconds that a recovery is waited for, so that one that is late is measured too."""


SOME = 8
"""Shards that each node is asked for after a fault."""


@dataclass(frozen=True)
class Options:
    """How a run is."""

    seed: int = 0
    hold: float = 10.0
    """Seconds that a fault lasts, where it does not say otherwise."""
    clients: int = 24
    pause: float = 0.3
    recovery: float = invariants.RECOVERY
    """Seconds in which all is well again."""
    settling: float = invariants.SETTLING
    warming: int = WARMING


@dataclass
class Scene:
    """What faults are injected into."""

    lab: Lab
    net: Net
    redis: RedisServer
    line: Line
    load: Load
    options: Options
    rng: random.Random
    revisions: list[str] = field(default_factory=list)
    """Those that ``main`` has meant, in order."""
    baseline: dict[str, Usage] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)
    """The newest version that a service was seen to give, by its name."""

    @property
    def services(self) -> dict[str, Service]:
        """All, by name."""
        routers = {f"router-{number}": router for number, router in enumerate(self.net.routers)}
        return {"origin": self.net.origin, **routers, **self.net.edges}

    def any_edge(self) -> str:
        """One of the nodes."""
        return self.rng.choice(sorted(self.net.edges))

    async def hold(self, seconds: float = 0.0) -> None:
        """Time passes."""
        await asyncio.sleep(seconds or self.options.hold)

    def next_version(self) -> Path:
        """The model with other numbers in one tensor; whoever has it from now on has what is right."""
        number = len(self.load.versions)
        folder = self.lab.folder / "model"
        tensors = load_file(folder / "model.safetensors")
        tensors["encoder.layer.0.bias"] += number
        save_file(tensors, folder / "next", metadata={"format": "pt"})
        self.load.versions[hashlib.sha256((folder / "next").read_bytes()).hexdigest()] = number
        (folder / "next").rename(folder / "model.safetensors")
        return folder

    def whole(self, file: Path) -> None:
        """A file that is there is a version, and all of it. Raises AssertionError."""
        if file.exists():
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            assert found in self.load.versions, f"{file.name} has other bytes than were published"

    async def publish(self) -> None:
        """The next version is there."""
        folder = await asyncio.to_thread(self.next_version)
        self.revisions.append(await asyncio.to_thread(self.lab.publish, folder, MODEL))


@dataclass(frozen=True)
class Usage:
    """Of a process: bytes resident, open descriptors, tasks of its event loop."""

    memory: int
    files: int
    tasks: int

    def within(self, before: Usage) -> bool:
        """No more than a tenth, and the slack, above."""
        memory = self.memory <= before.memory * 1.1 + invariants.SLACK_MEMORY
        files = self.files <= before.files * 1.1 + invariants.SLACK_FILES
        return memory and files and self.tasks <= before.tasks * 1.1 + SLACK_TASKS


def usage(service: Service) -> Usage:
    """Right now; tasks as of the last second. Raises ValueError where they are not told yet."""
    seen = invariants.usage(service)
    return Usage(seen.memory, seen.files, int(service.ready_file.with_suffix(".tasks").read_text()))


def watched(module: str) -> Sequence[str]:
    """The words that start a service that notes its tasks."""
    return ("tests.faults.watched", module)


@asynccontextmanager
async def scene(lab: Lab, options: Options) -> AsyncIterator[Scene]:
    """A network under load, warm, with a baseline."""
    redis = RedisServer(KINDS[0], lab.folder / "redis").start()
    try:
        await asyncio.to_thread(make_model, lab.folder / "many", seed=8)
        small = ("--shard-target", "64KiB", "--shard-limit", "64KiB")
        await asyncio.to_thread(lab.publish, lab.folder / "many", MANY, *small)
        flags = {"regions": EDGES, "ttl": 6.0, "heartbeat": 2.0, "program": watched}
        async with (
            forwarder() as line,
            network(lab, redis.url, line=line, **flags, **CACHE) as net,  # type: ignore[arg-type]
        ):
            load = Load(net, await asyncio.to_thread(shards, net.origin), options.clients, options.pause, options.seed)
            load.versions[hashlib.sha256(net.model.read_bytes()).hexdigest()] = 0
            made = Scene(lab, net, redis, line, load, options, random.Random(options.seed))
            made.revisions.append(refs(net.origin))
            async with load.running():
                load.go_on()
                wanted = options.warming * options.clients
                await until(lambda: load.served.total() + len(load.broken) >= wanted, "load to be warm", 600)
                await load.pause()
                await settle(made)
                made.baseline = {name: usage(service) for name, service in made.services.items()}
                yield made
    finally:
        redis.kill()


def shards(origin: Service) -> list[str]:
    """Digests of the shards of the larger model."""
    plan = "application/vnd.nearshard.plan+json"
    return [shard["digest"] for shard in get_json(f"{origin.url}/shards/{MANY}", Accept=plan)["shards"]]


def refs(service: Service) -> str:
    """What ``main`` means to a service."""
    return str(get_json(f"{service.url}/models/{MODEL}")["refs"]["main"]["revision"])


async def settle(scene: Scene) -> None:
    """Nothing is under way anywhere, and all tasks are told."""
    for edge in scene.net.edges.values():
        await invariants.settled(edge)
    await until(lambda: all(usage(service) for service in scene.services.values()), "tasks told")


Inject = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, from its begin until it is over."""

    number: str
    inject: Inject
    harmless: bool
    """Whether no request may fail."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.number} {self.inject.__name__.replace('_', ' ')}"


async def suffer(scene: Scene, fault: Fault, case: Case) -> None:
    """One fault: injected, over, all well again, and all that must hold looked at."""
    load = scene.load
    load.served.clear()
    load.refused.clear()
    load.go_on()
    found = await _inject(scene, fault)
    case.injected += 1
    took = await recovered(scene)
    case.recoveries.append(took)
    await load.pause()
    found += await looked(scene)
    if took > scene.options.recovery:
        found.append(Broken("I5", f"all was well {took:.1f} s after it was over"))
    if fault.harmless and load.refused:
        found.append(Broken("F", f"{len(load.refused)} requests failed, the first: {load.refused[0]}"))
    said = [f"{fault.name}: {one}" for one in (*load.broken, *found)]
    case.broken += said
    case.served += load.served.total()
    case.refused += len(load.refused)
    load.broken.clear()
    note(
        f"{fault.name}: {load.served.total()} served, {len(load.refused)} refused, well after {took:.1f} s"
        + "".join(f"\n  refused: {one}" for one in load.refused[:1])
        + "".join(f"\n  BROKEN {one}" for one in said)
    )


async def _inject(scene: Scene, fault: Fault) -> list[Broken]:
    """Half of the times with a new version that services learn of during the fault."""
    try:
        if scene.rng.random() < 0.5:
            await scene.publish()
        await fault.inject(scene)
    except (AssertionError, OSError) as error:
        return [Broken("I1" if "other bytes" in str(error) else "F", f"{type(error).__name__}: {error}"[:1000])]
    return []


async def recovered(scene: Scene) -> float:
    """Seconds until routers know all and agree, and every node serves some shards, that it may not have."""
    started = now()
    try:
        await until(scene.net.well, "the network to be well", LATE)
        for digest in scene.rng.sample(scene.load.shards, SOME):
            await asyncio.gather(*(invariants.serves(edge, digest, LATE) for edge in scene.net.edges.values()))
    except (NotYet, TimeoutError):
        pass  # so long it took at least
    return now() - started


async def looked(scene: Scene) -> list[Broken]:
    """What does not hold."""
    checks: list[tuple[str, Callable[[], Awaitable[None]]]] = [
        *(("I6", lambda name=name: _kept(scene, name)) for name in scene.net.edges),
        *(("I7", lambda one=one: _alive(one)) for one in scene.services.values()),
        *(("I4", lambda name=name: _usage(scene, name)) for name in scene.services),
        ("I2", lambda: _versions(scene)),
    ]
    found = []
    for invariant, check in checks:
        try:
            await check()
        except (AssertionError, OSError) as error:
            wrong = "I1" if "other bytes" in str(error) else invariant
            found.append(Broken(wrong, str(error)[-1000:]))
    return found


async def _kept(scene: Scene, name: str) -> None:
    await invariants.settled(scene.net.edges[name])
    await asyncio.to_thread(invariants.nothing_wrong_is_kept, scene.lab.folder / name)
    assert list((scene.lab.folder / name / "tmp").iterdir()) == [], f"{name} left a temporary file"


async def _alive(service: Service) -> None:
    await asyncio.to_thread(invariants.nothing_crashed, service)


async def _usage(scene: Scene, name: str) -> None:
    service, before = scene.services[name], scene.baseline[name]
    try:
        await until(lambda: usage(service).within(before), "resources back", scene.options.settling)
    except NotYet:
        raise AssertionError(f"{name} had {before} before, and has {usage(service)}") from None


async def _versions(scene: Scene) -> None:
    for name, service in scene.services.items():
        revision = await asyncio.to_thread(refs, service)
        version = scene.revisions.index(revision)
        assert version >= scene.seen.get(name, 0), f"{name} went back from version {scene.seen[name]} to {version}"
        scene.seen[name] = version


async def run(
    lab: Lab, options: Options, faults: Sequence[Fault], cases: Mapping[str, Case], go_on: Callable[[], bool]
) -> None:
    """All ``faults`` in turn, while ``go_on`` says so; what came of them goes to ``cases``."""
    async with scene(lab, options) as made:
        for fault in faults:
            if go_on():
                await suffer(made, fault, cases[fault.number])


def wipe(data: Path) -> None:
    """A node's cache is gone."""
    shutil.rmtree(data / "blobs")
