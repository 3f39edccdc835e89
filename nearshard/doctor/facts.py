"""What the doctor found out about a machine and its network. Pure data: None is what could not be found out here.

Sizes are bytes, times seconds, rates bytes a second, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Status(Enum):
    """A verdict."""

    OK = "ok"
    SLOW = "slow"
    BROKEN = "broken"
    UNKNOWN = "not known"


@dataclass(frozen=True)
class Setting:
    """A value of the kernel's. ``path``: below ``/``, in ``proc/sys`` (a sysctl) or in ``sys/block`` (of a disk)."""

    path: str
    value: str

    @property
    def line(self) -> str:
        """As ``/etc/sysctl.d`` and people write a sysctl; a disk's by its path."""
        if not self.path.startswith("proc/sys/"):
            return f"/{self.path} = {self.value}"
        return f"{self.path.removeprefix('proc/sys/').replace('/', '.')} = {self.value}"


@dataclass(frozen=True)
class Finding:
    """What a check found of one thing."""

    check: str
    """The check's id."""
    subject: str
    """What it is of: a disk, a URL, or empty for the machine."""
    status: Status
    value: str
    """What was read, for people."""
    advice: str = ""
    """What to do; empty where nothing is to be done."""
    settings: tuple[Setting, ...] = ()
    """What ``--apply`` would set."""


@dataclass(frozen=True)
class Queue:
    """The disk that a file system is on, by its ``/sys/block/<name>/``."""

    name: str
    """Of the whole disk, not of a partition; under mappers and RAIDs, of the first disk below them."""
    rotational: bool | None = None
    scheduler: str | None = None
    """The one in use."""
    schedulers: tuple[str, ...] = ()
    """All that the kernel has ready, the one in use among them."""
    nr_requests: int | None = None
    """Requests that the block layer queues."""
    depth: int | None = None
    """Commands that a SCSI or SATA disk is given at once."""
    read_ahead: int | None = None
    read_ahead_of: str = ""
    """The device whose read-ahead counts: the one that is mounted, which may be a mapper above the disk."""

    @property
    def virtual(self) -> bool:
        """Whether it is a disk of a virtual machine, whose host has the real queue (and rotation is not known)."""
        return self.name.startswith(("vd", "xvd"))


@dataclass(frozen=True)
class Place:
    """A directory that shards are kept in."""

    role: str
    """``cache`` or ``repository``."""
    path: str
    free: int | None = None
    files_free: int | None = None
    """Files that there is room for; None also where the file system sets no such limit."""
    filesystem: str | None = None
    reflink: bool | None = None
    """Whether a file can share blocks with another."""
    writable: bool | None = None
    queue: Queue | None = None
    """None where there is no block device under it."""
    hangs: bool = False
    """Whether the file system does not answer."""


@dataclass(frozen=True)
class Machine:
    """This machine."""

    sysctls: Mapping[str, str] = field(default_factory=dict)
    """Values by path below ``proc/sys``; one that is missing here could not be read."""
    system: str = "Linux"
    kernel: str = ""
    python: str = ""
    bbr_module: bool | None = None
    """Whether the running kernel comes with BBR, loaded or not."""
    memory: int | None = None
    memory_available: int | None = None
    files_soft: int | None = None
    files_hard: int | None = None
    """Descriptors of one process; None is no limit."""
    hashing: float | None = None
    """SHA-256 on one core."""
    places: tuple[Place, ...] = ()

    def number(self, sysctl: str) -> int | None:
        """A sysctl of one number."""
        text = self.sysctls.get(sysctl, "")
        return int(text) if text.isascii() and text.lstrip("-").isdecimal() else None

    def numbers(self, sysctl: str, count: int) -> tuple[int, ...] | None:
        """A sysctl of ``count`` numbers."""
        words = self.sysctls.get(sysctl, "").split()
        if len(words) != count or not all(word.isascii() and word.isdecimal() for word in words):
            return None
        return tuple(map(int, words))


class Outcome(Enum):
    """How an attempt to connect ended."""

    CONNECTED = "connected"
    REFUSED = "refused"
    """At once, by whoever is there, or by a network without a way there."""
    HANGS = "hangs"
    """No answer until the deadline."""


@dataclass(frozen=True)
class Connect:
    """Connecting to one address."""

    address: str
    family: int
    """4 or 6."""
    outcome: Outcome
    seconds: float
    """A round trip, where it connected."""
    reason: str = ""
    path_mtu: int | None = None
    window_scaling: bool | None = None
    timestamps: bool | None = None
    sack: bool | None = None
    """Whether both ends agreed on these options of TCP."""


@dataclass(frozen=True)
class Peer:
    """A service of the network, as this machine reaches it."""

    url: str
    role: str
    """``router`` for what was named with ``--router``, whatever it is; ``node`` or ``origin`` for what it named."""
    named: bool = True
    """Whether its host is a name, which has to be looked up."""
    lookup: float | None = None
    """Seconds until its addresses were there; None where they did not come."""
    lookup_error: str = ""
    connects: tuple[Connect, ...] = ()
    answer: str = ""
    """Why it was not asked, or how it failed, over HTTP; empty where it answered, or nobody asked it."""
    asked: bool = False
    skew: float | None = None
    """Its clock minus this one."""
    skew_error: float = 0.0
    """Either way."""
    expires: float | None = None
    """When the signed timestamp that it has ends, in seconds since 1970; not verified, so good for advice only."""

    @property
    def round_trip(self) -> float | None:
        """The shortest handshake."""
        times = [one.seconds for one in self.connects if one.outcome is Outcome.CONNECTED]
        return min(times) if times else None


@dataclass(frozen=True)
class Network:
    """The network, from here."""

    asked: bool = True
    """False: it was not to be used."""
    peers: tuple[Peer, ...] = ()
    rate: float | None = None
    """What the link brings."""
    rate_of: str = ""
    """Where that is from, for people."""
    rate_round_trip: float | None = None
    """The round trip of the path that it was measured on; None where it was given, for all paths."""
    stalled: str = ""
    """The URL whose large answer never came although small ones did."""


@dataclass(frozen=True)
class Facts:
    """Everything that is judged. ``now``: by this machine's clock, seconds since 1970."""

    machine: Machine = Machine()
    network: Network = Network()
    now: float = 0.0

    @property
    def round_trip(self) -> float | None:
        """The longest round trip to anybody who was reached: the path that needs the largest buffers."""
        times = [peer.round_trip for peer in self.network.peers if peer.round_trip is not None]
        return max(times) if times else None

    @property
    def product(self) -> int | None:
        """The bandwidth-delay product: bytes that are under way on a path that is full."""
        round_trip = self.network.rate_round_trip or self.round_trip
        if self.network.rate is None or round_trip is None:
            return None
        return round(self.network.rate * round_trip)
