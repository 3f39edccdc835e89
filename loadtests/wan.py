"""A WAN on one machine: two network namespaces, ``site`` and ``hub``, and a link of a given delay, rate and loss.

Several sites around one hub are several links that share a ``Hub``: sites reach each other through it, over both links.
Each end of a link is a TUN device; a forwarder, a process of its own (``python -m loadtests.wan``), carries IP packets
from each to the other. A direction is, in the order in which a packet passes them:

* a bounded queue, ``QUEUE`` times the link's bandwidth-delay product, that drops what it has no room for;
* a token bucket that lets ``mbit`` through, counted in bytes of IP packets;
* loss: each packet for itself, by a generator that is seeded for each direction;
* half the round-trip time.

Queue and bucket are computed, not waited for: a packet's time of delivery is known when it comes, so a forwarder that
wakes up late delivers late, but never at a lower rate. The TCP on both ends is the kernel's, in packets of the usual
1500 bytes: loss comes by the packet, and what TCP makes of it depends on their size. At 200 Mbit/s that takes a
quarter of a core; 800 Mbit/s, half of one. What a link cannot keep apart is the memory that the kernel has for TCP,
which all programs share: where they have taken it (``mem`` in /proc/net/sockstat over /proc/sys/net/ipv4/tcp_mem),
windows shrink to four packets.

Nothing leaves the namespaces, which have no other device than their loopback. At the end, Ctrl-C and failures
included, all of it is gone; only a run that was killed with SIGKILL leaves the (empty) namespaces, for ``ip netns
delete``. Root only: for the namespaces, and for /dev/net/tun.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import gc
import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from types import TracebackType

from loadtests.services import BenchmarkError, bound, environment

MTU = 1500
QUEUE = 1.0
"""Bandwidth-delay products that a direction's queue holds."""
QUEUE_LEAST = 32 * MTU
"""Bytes that it holds at least."""
BUFFERS = 4
"""TCP buffers may grow to this many times what a full pipe and a full queue hold: they count more than payload."""
BURST = 0.002
"""Seconds of the rate that the token bucket holds: what the forwarder may be late without loss of rate."""
TICK = 0.0003
"""Seconds in which packets gather: a handful costs the forwarder little more than one."""
BATCH = 256
"""Packets taken from one device before the other one has its turn."""
DEVICE_QUEUE = 4096
"""Packets that wait in a device for the forwarder."""

DEVICE = "wan"
"""The site's end of a link; the hub's have a number after it."""
HUB_ADDRESS, NETWORK = "10.77.0.2", "10.77.0.0/16"
SIDES = ("site", "hub")
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_numbers = count(1)


class Unavailable(BenchmarkError):
    """This machine, or this user, cannot have such a link; says why."""


@dataclass(frozen=True)
class Traffic:
    """What one direction has carried so far: bytes and packets of IP, as sent and as they arrived."""

    sent: int
    arrived: int
    packets_sent: int
    packets_arrived: int


class Hub:
    """The namespace in the middle of several links, from ``with`` until its end, which comes after theirs.

    Raises Unavailable.
    """

    def __init__(self) -> None:
        self.netns = f"nearshard-{os.getpid()}-{next(_numbers)}-hub"
        self._sites = count()
        self._stack = ExitStack()

    def __enter__(self) -> Hub:
        _need_root()
        with ExitStack() as stack:
            stack.enter_context(_namespace(self.netns))
            _sysctl(self.netns, "ipv4/ip_forward", "1")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command, run in it."""
        return _inside(self.netns, *command)

    def next_site(self) -> int:
        """A number for one more site."""
        return next(self._sites)


class Link:
    """Two namespaces with a link between them, from ``with`` until its end.

    ``rtt_ms``: round trip in milliseconds. ``mbit``: 10^6 bits a second, each way. ``loss``: fraction of the packets,
    each way. ``congestion``: the kernel's congestion control on both sides. ``hub``: the one that it leads to, by
    default one of its own. Raises Unavailable.
    """

    def __init__(
        self,
        *,
        rtt_ms: float,
        mbit: float,
        loss: float = 0.0,
        seed: int = 1,
        congestion: str = "bbr",
        hub: Hub | None = None,
    ) -> None:
        self.rtt_ms, self.mbit, self.loss, self.seed, self.congestion = rtt_ms, mbit, loss, seed, congestion
        self._hub = hub
        number = hub.next_site() if hub else 0
        self.site_address, self.hub_address = f"10.77.{number}.1", HUB_ADDRESS
        self._devices = {"site": DEVICE, "hub": f"{DEVICE}{number}"}
        self.bdp = round(mbit * 1e6 / 8 * rtt_ms / 1e3)
        """Bandwidth-delay product in bytes."""
        self.queue = max(QUEUE_LEAST, round(QUEUE * self.bdp))
        """Bytes that wait at most for the link, each way."""
        self.netns = f"nearshard-{os.getpid()}-{next(_numbers)}-site"
        """The site's namespace."""
        self._stack = ExitStack()

    def __enter__(self) -> Link:
        _need_root()
        with ExitStack() as stack, ExitStack() as devices:
            self._hub = self._hub or stack.enter_context(Hub())
            stack.enter_context(_namespace(self.netns))
            ends = [devices.enter_context(_device(self._netns(side), self._devices[side])) for side in SIDES]
            for side in SIDES:
                self._configure(side)
            stack.enter_context(self._forwarder(*ends))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def site(self, command: Sequence[str]) -> list[str]:
        """The command, run on the site's side."""
        return _inside(self._netns("site"), *command)

    def hub(self, command: Sequence[str]) -> list[str]:
        """The command, run on the hub's side."""
        return _inside(self._netns("hub"), *command)

    def down(self) -> Traffic:
        """From hub to site."""
        return self._traffic("hub", "site")

    def up(self) -> Traffic:
        """From site to hub."""
        return self._traffic("site", "hub")

    def cut(self) -> None:
        """Let nothing through, until ``mend``."""
        self._set("down")

    def mend(self) -> None:
        """Let all through again."""
        self._set("up")

    def _set(self, state: str) -> None:
        # The hub's end: the site keeps its route, so that its packets are lost, as on a link which is cut further away.
        _ip("-n", self._netns("hub"), "link", "set", "dev", self._devices["hub"], state)

    def _netns(self, side: str) -> str:
        if side == "site":
            return self.netns
        assert self._hub is not None, "the link is not open"
        return self._hub.netns

    def _traffic(self, source: str, target: str) -> Traffic:
        sent, arrived = (
            _counters(self._netns(side), self._devices[side])[way] for side, way in ((source, "tx"), (target, "rx"))
        )
        return Traffic(sent["bytes"], arrived["bytes"], sent["packets"], arrived["packets"])

    def _configure(self, side: str) -> None:
        """Addresses, and the TCP of one side."""
        netns, device = self._netns(side), self._devices[side]
        own, peer = self.site_address, self.hub_address
        if side == "hub":
            own, peer = peer, own
        with suppress(Unavailable):  # a kernel without IPv6; with it, neighbour discovery would be counted as traffic
            _sysctl(netns, "ipv6/conf/all/disable_ipv6", "1")
        _ip("-n", netns, "address", "add", own, "peer", peer, "dev", device)
        for name in ("lo", device):
            _ip("-n", netns, "link", "set", "dev", name, "up")
        if side == "site":
            _ip("-n", netns, "route", "add", NETWORK, "via", peer, "dev", device)
        _sysctl(netns, "ipv4/tcp_congestion_control", self.congestion)
        _sysctl(netns, "ipv4/tcp_no_metrics_save", "1")  # a new connection knows nothing of the one before
        for name in ("ipv4/tcp_rmem", "ipv4/tcp_wmem"):
            least, default, most = _sysctl(netns, name).split()
            wanted = max(int(most), BUFFERS * (self.bdp + self.queue))
            _sysctl(netns, name, f"{least} {default} {wanted}")

    @contextmanager
    def _forwarder(self, site: int, hub: int) -> Iterator[None]:
        """The process between the two devices, given by their files."""
        flags = {
            "site": site,
            "hub": hub,
            "delay": self.rtt_ms / 2e3,
            "rate": self.mbit * 1e6 / 8,
            "queue": self.queue,
            "loss": self.loss,
            "seed": self.seed,
        }
        process = subprocess.Popen(
            bound([sys.executable, "-m", "loadtests.wan", *(f"--{name}={value}" for name, value in flags.items())]),
            pass_fds=[site, hub],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=Path(__file__).parents[1],
            start_new_session=True,  # Ctrl-C is for the benchmark, which stops this one after all else
        )
        with process:
            try:
                if not process.stdout or not process.stdout.readline():
                    raise BenchmarkError("the forwarder of the link did not start")
                yield
            finally:
                process.kill()


# One side


def _need_root() -> None:
    if os.geteuid() != 0:
        raise Unavailable("a WAN of network namespaces needs root")


def _inside(netns: str, *command: str) -> list[str]:
    return ["ip", "netns", "exec", netns, *command]


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*command: str, stdin: str = "") -> str:
    """What a command prints. Raises Unavailable where it cannot be run or fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=30, start_new_session=True)
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} is not installed") from None
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def _namespace(name: str) -> Iterator[None]:
    """A network namespace; at the end, what still runs in it is killed."""
    try:
        _ip("netns", "add", name)
        yield
    finally:
        if name in _ip("netns", "list").split():
            for pid in _ip("netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "delete", name)


@contextmanager
def _device(netns: str, as_name: str) -> Iterator[int]:
    """A TUN device in a namespace, under a name: its file. The device is gone when nobody has that open."""
    try:
        file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"/dev/net/tun: {error.strerror}") from error
    try:
        asked = struct.pack("16sH22x", b"nearshard%d", _IFF_TUN | _IFF_NO_PI)  # the kernel finds a free number
        name = fcntl.ioctl(file, _TUNSETIFF, asked)[:16].rstrip(b"\0").decode()
        _ip("link", "set", "dev", name, "netns", netns, "name", as_name)
        _ip("-n", netns, "link", "set", "dev", as_name, "mtu", str(MTU), "txqueuelen", str(DEVICE_QUEUE))
        yield file
    finally:
        os.close(file)


def _sysctl(netns: str, name: str, value: str = "") -> str:
    """Read a setting of a namespace, or change it. Raises Unavailable where the kernel refuses."""
    path = f"/proc/sys/net/{name}"
    return _run(*_inside(netns, "tee", path), stdin=value) if value else _run(*_inside(netns, "cat", path))


def _counters(netns: str, device: str) -> dict[str, dict[str, int]]:
    shown = json.loads(_ip("-n", netns, "-json", "-statistics", "link", "show", "dev", device))
    counters: dict[str, dict[str, int]] = shown[0]["stats64"]
    return counters


# The forwarder


class Way:
    """One direction: what is read from ``source`` is written to ``target`` when its time has come.

    ``delay`` in seconds, ``rate`` in bytes a second, ``queue`` in bytes, ``loss`` as a fraction.
    """

    def __init__(
        self, source: int, target: int, *, delay: float, rate: float, queue: int, loss: float, rng: Random
    ) -> None:
        self._source, self._target = source, target
        self._delay = max(0.0, delay - TICK)  # as it comes, a packet has waited that long
        self._byte, self._patience, self._loss = 1 / rate, queue / rate, loss
        self._random = rng.random
        self._free = 0.0
        """When the last packet will have left the queue."""
        self._under_way: deque[tuple[float, bytes]] = deque()

    @property
    def due(self) -> float:
        """When the next packet arrives."""
        return self._under_way[0][0] if self._under_way else math.inf

    def take(self, now: float) -> None:
        """Read what was sent, and decide what becomes of it."""
        free = max(self._free, now - BURST)
        for _ in range(BATCH):
            try:
                packet = os.read(self._source, MTU)
            except BlockingIOError:
                break
            if free - now > self._patience:
                continue
            free += len(packet) * self._byte
            if self._random() >= self._loss:
                self._under_way.append((max(free, now) + self._delay, packet))
        self._free = free

    def give(self, now: float) -> None:
        """Write what has arrived."""
        while self._under_way and self._under_way[0][0] <= now:
            try:
                os.write(self._target, self._under_way.popleft()[1])
            except OSError as error:
                if error.errno != errno.EIO:  # that is a device which was set down: what comes meanwhile is lost
                    raise


def forward(ways: Sequence[Way], devices: Sequence[int]) -> None:
    """Carry packets until the process is killed."""
    while True:
        idle = min(way.due for way in ways) - time.monotonic() - TICK
        select.select(devices, [], [], None if idle == math.inf else max(0.0, idle))
        time.sleep(TICK)
        for way in ways:
            now = time.monotonic()
            way.take(now)
            way.give(now)


def main() -> None:
    """The forwarder: the files of the two devices, and what the link is like."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.wan", description="The forwarder of a link.")
    for name in ("site", "hub", "queue", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("delay", "rate", "loss"):
        parser.add_argument(f"--{name}", type=float, required=True)
    options = parser.parse_args()
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    gc.disable()
    terms = {"delay": options.delay, "rate": options.rate, "queue": options.queue, "loss": options.loss}
    up = Way(options.site, options.hub, **terms, rng=Random(f"{options.seed} up"))
    down = Way(options.hub, options.site, **terms, rng=Random(f"{options.seed} down"))
    print("ready", flush=True)
    forward([up, down], [options.site, options.hub])


if __name__ == "__main__":
    main()
