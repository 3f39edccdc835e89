"""The table of what the doctor checks, and how it judges. Pure: facts in, findings out.

A check gives a finding for each thing that it looks at (a disk, a URL, the machine). What could not be read is
``not known``, never an error. ``broken`` is for what makes transfers fail or hang; ``slow`` for what costs time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from nearshard.doctor.facts import Connect, Facts, Finding, Outcome, Peer, Place, Queue, Setting, Status
from shared.trust import SKEW

IP_SYSCTL = "https://docs.kernel.org/networking/ip-sysctl.html"
NET_SYSCTL = "https://docs.kernel.org/admin-guide/sysctl/net.html"
FS_SYSCTL = "https://docs.kernel.org/admin-guide/sysctl/fs.html"
SYSFS_BLOCK = "https://docs.kernel.org/admin-guide/abi-stable.html (sysfs-block)"
TCP_BBR = "https://git.kernel.org/pub/scm/linux/kernel/git/torvalds/linux.git/tree/net/ipv4/tcp_bbr.c"

RMEM, WMEM = "net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"
CONGESTION = "net/ipv4/tcp_congestion_control"
BUFFERS = (1 << 20, 128 << 20)
"""The least and the most that a buffer limit is raised to: below, there is nothing to gain; above, one connection could
take what a machine needs for others."""
SHARE = 64
"""A buffer limit is at most this part of the machine's memory: limits are for each connection, and there are many."""
FAR = 0.02
"""Seconds of a round trip from which on a window that has to grow again, or a loss, costs a transfer much."""
LOOKUP = 0.1
"""Seconds of a name's look-up that nobody notices."""
RACE = 0.25
"""Seconds that a client gives IPv6 before it tries IPv4 as well (RFC 8305, section 5)."""
DRIFT = 5.0
"""Seconds that a clock may be off: Date has whole seconds, and clocks that are kept right are off by far less."""
FREE = (256 << 20, 4 << 30)
"""Bytes free: below the first not even a few shards (32 MiB each) have room; below the second, hardly a model."""
FILES_FREE = 1000
READ_AHEAD = {True: (1 << 20, 2 << 20), False: (128 << 10, 512 << 10)}
"""Bytes of read-ahead by whether the disk turns: the least that is well, and what is set otherwise. A disk that turns
loses about 10 ms when its head goes elsewhere, in which it could have read 2 MiB; 128 KiB is the kernel's default."""
DEPTH = 32
"""Requests that are queued at least: as many commands as a SATA disk takes at once."""
SERVES = 4096 * 3 + 64
"""Descriptors that a service asks for with its default number of connections (``shared/web/server.py``)."""
CLIENT_FILES = 256
"""Descriptors that a client gets by with."""
MEMORY = 256 << 20
"""Bytes of memory: a client holds a shard (32 MiB at most) for each of its parallel streams."""
HASHING = 100e6
"""Bytes a second of SHA-256: a core with instructions for it does over ten times that, one without about four times."""
FULL_MTU, LEAST_MTU = 1500, 1280
"""Of Ethernet; and what every path of IPv6 carries (RFC 8200, section 5)."""
NETWORKED = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "fuse.sshfs", "ceph", "glusterfs", "virtiofs"}
PLAIN = {"vfat", "msdos", "exfat"}
LOST = {"tmpfs", "ramfs"}
PACING = {"fq", "fq_codel", "cake"}
KERNEL = (4, 13)
"""From here on BBR paces by itself, on any queueing discipline."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    id: str
    reads: str
    rule: str
    """When it is well, and what it is otherwise."""
    why: str
    mend: str
    source: str
    judge: Callable[[Facts], Iterator[Finding]]


class _Of:
    """Makes findings of one check about one thing."""

    def __init__(self, check: str, subject: str = "") -> None:
        self._check, self._subject = check, subject

    def ok(self, value: str) -> Finding:
        return Finding(self._check, self._subject, Status.OK, value)

    def slow(self, value: str, advice: str, *settings: Setting) -> Finding:
        return Finding(self._check, self._subject, Status.SLOW, value, advice, settings)

    def broken(self, value: str, advice: str) -> Finding:
        return Finding(self._check, self._subject, Status.BROKEN, value, advice)

    def unknown(self, why: str = "cannot be read here") -> Finding:
        return Finding(self._check, self._subject, Status.UNKNOWN, why)


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order of the table."""
    return [finding for check in CHECKS for finding in check.judge(facts)]


# Buffers of TCP


def buffer_goal(facts: Facts) -> int | None:
    """Bytes that a connection's buffer must be able to grow to: twice the bandwidth-delay product.

    The kernel counts its own overhead in a buffer: about half of it becomes window, and a sender keeps what is not yet
    acknowledged beside what is under way. None where the product is not known.
    """
    if facts.product is None:
        return None
    most = BUFFERS[1] if facts.machine.memory is None else min(BUFFERS[1], facts.machine.memory // SHARE)
    return max(BUFFERS[0], min(2 * facts.product, most))


def _without_product(facts: Facts) -> str:
    if facts.round_trip is None:
        return "the round trip is not known: name a router that answers"
    return "the rate is not known: give --rate; it is measured where a public model is served"


def _judge_limit(check: str, sysctl: str) -> Callable[[Facts], Iterator[Finding]]:
    def judge(facts: Facts) -> Iterator[Finding]:
        of, numbers = _Of(check), facts.machine.numbers(sysctl, 3)
        if numbers is None:
            yield of.unknown()
            return
        value, goal = f"up to {size(numbers[2])}", buffer_goal(facts)
        if goal is None:
            yield of.unknown(f"{value}; {_without_product(facts)}")
        elif numbers[2] >= goal:
            yield of.ok(f"{value}, {size(goal)} needed")
        else:
            raised = Setting(f"proc/sys/{sysctl}", f"{numbers[0]} {numbers[1]} {goal}")
            yield of.slow(
                f"{value}, {size(goal)} needed", f"let the kernel go up to {goal} bytes ({raised.line})", raised
            )

    return judge


def _judge_own_buffers(facts: Facts) -> Iterator[Finding]:
    of, goal = _Of("socket-buffers"), buffer_goal(facts)
    limits = {name: facts.machine.number(f"net/core/{name}") for name in ("rmem_max", "wmem_max")}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    if not known:
        yield of.unknown()
        return
    value = ", ".join(f"{name} {size(limit)}" for name, limit in known.items())
    half = None if goal is None else goal // 2
    short = {name for name, limit in known.items() if half is not None and limit < half}
    if half is None:
        yield of.unknown(f"{value}; {_without_product(facts)}")
    elif not short:
        yield of.ok(value)
    else:
        raised = [Setting(f"proc/sys/net/core/{name}", str(half)) for name in sorted(short)]
        advice = "raise them for other tools that set their own buffers; nearshard leaves sizes to the kernel"
        yield of.slow(f"{value}, {size(half)} wanted", advice, *raised)


# Switches of TCP


def _judge_switch(check: str, sysctl: str, *, negotiated: Callable[[Connect], bool | None] | None = None,
                  good: int = 1) -> Callable[[Facts], Iterator[Finding]]:  # fmt: skip
    """A switch that is well unless it is 0. ``negotiated``: whether a connection really has it."""

    def judge(facts: Facts) -> Iterator[Finding]:
        of, number = _Of(check), facts.machine.number(sysctl)
        if number is None:
            yield of.unknown()
        elif number == 0:
            on = Setting(f"proc/sys/{sysctl}", str(good))
            yield of.slow("off", f"switch it on ({on.line})", on)
        else:
            yield _as_negotiated(of, facts, negotiated)

    return judge


def _as_negotiated(of: _Of, facts: Facts, negotiated: Callable[[Connect], bool | None] | None) -> Finding:
    without = sorted(
        {
            peer.url
            for peer in facts.network.peers
            for one in peer.connects
            if negotiated and one.outcome is Outcome.CONNECTED and negotiated(one) is False
        }
    )
    if not without:
        return of.ok("on")
    advice = "it is switched off there, or a firewall in between takes it out: ask who runs them"
    return of.slow(f"on here, but not with {', '.join(without)}", advice)


def _judge_congestion(facts: Facts) -> Iterator[Finding]:
    of, machine = _Of("congestion-control"), facts.machine
    current = machine.sysctls.get(CONGESTION, "").strip()
    if not current:
        yield of.unknown()
        return
    allowed = machine.sysctls.get("net/ipv4/tcp_allowed_congestion_control", "").split()
    available = machine.sysctls.get("net/ipv4/tcp_available_congestion_control", "").split()
    bbr = Setting(f"proc/sys/{CONGESTION}", "bbr")
    if current.startswith("bbr"):
        yield of.ok(current)
    elif "bbr" in allowed:
        yield of.ok(f"{current}; nearshard's services choose bbr by themselves")
    elif facts.round_trip is not None and facts.round_trip < FAR:
        yield of.ok(f"{current}, which will do: everybody is within {FAR * 1000:.0f} ms")
    elif "bbr" in available or machine.bbr_module:
        yield of.slow(
            f"{current}; bbr is there and not allowed", f"make it the default ({bbr.line}), which loads it", bbr
        )
    elif machine.bbr_module is None:
        yield of.unknown(f"{current}; whether this kernel has bbr cannot be read here")
    else:
        yield of.slow(f"{current}; this kernel has no bbr", "use a kernel with CONFIG_TCP_CONG_BBR where this serves")


def _judge_qdisc(facts: Facts) -> Iterator[Finding]:
    of, qdisc = _Of("qdisc"), facts.machine.sysctls.get("net/core/default_qdisc", "").strip()
    if not qdisc:
        yield of.unknown()
    elif qdisc in PACING:
        yield of.ok(qdisc)
    else:
        fq = Setting("proc/sys/net/core/default_qdisc", "fq")
        advice = f"make fq the default ({fq.line}); interfaces take it when they next come up"
        yield of.slow(qdisc, advice, fq)


def _judge_idle(facts: Facts) -> Iterator[Finding]:
    of, number = _Of("slow-start-after-idle"), facts.machine.number("net/ipv4/tcp_slow_start_after_idle")
    if number is None:
        yield of.unknown()
    elif number == 0:
        yield of.ok("off")
    elif facts.round_trip is None:
        yield of.unknown("on; whether anybody is far is not known")
    elif facts.round_trip < FAR:
        yield of.ok(f"on, which costs little: everybody is within {FAR * 1000:.0f} ms")
    else:
        off = Setting("proc/sys/net/ipv4/tcp_slow_start_after_idle", "0")
        yield of.slow(f"on, with a round trip of {ms(facts.round_trip)}", f"switch it off ({off.line})", off)


# Packet sizes


def _judge_mtu_probing(facts: Facts) -> Iterator[Finding]:
    of, number = _Of("mtu-probing"), facts.machine.number("net/ipv4/tcp_mtu_probing")
    on = Setting("proc/sys/net/ipv4/tcp_mtu_probing", "1")
    small = [mtu for mtu in _path_mtus(facts) if mtu < FULL_MTU]
    if number is None:
        yield of.unknown()
    elif number > 0:
        yield of.ok("on")
    elif small or facts.network.stalled:
        why = f"off, and a path takes {min(small)} bytes" if small else "off, and a large answer did not come"
        yield of.slow(why, f"have the kernel look for the size that gets through ({on.line})", on)
    else:
        yield of.ok("off, and nothing here needs it")


def _path_mtus(facts: Facts) -> list[int]:
    return [one.path_mtu for peer in facts.network.peers for one in peer.connects if one.path_mtu is not None]


def _judge_path_mtu(facts: Facts) -> Iterator[Finding]:
    for peer in _peers(facts):
        of = _Of("path-mtu", peer.url)
        known = [one.path_mtu for one in peer.connects if one.path_mtu is not None]
        if facts.network.stalled == peer.url:
            yield of.broken("small answers come, a large one does not", _BLACK_HOLE)
        elif not known:
            yield of.unknown("no connection to look at")
        elif min(known) < LEAST_MTU:
            yield of.slow(f"{min(known)} bytes", "look at the tunnels on the way: this is less than IPv6 asks for")
        else:
            yield of.ok(f"{min(known)} bytes")


_BLACK_HOLE = (
    "it waits for its own source (look at its log), or something on the way drops large packets in silence: let ICMP"
    " 'fragmentation needed' through, lower the interface's MTU, or have the kernel probe (mtu-probing)"
)


# The network


def _peers(facts: Facts) -> tuple[Peer, ...]:
    return facts.network.peers if facts.network.asked else ()


def _no_network(check: str, facts: Facts) -> Iterator[Finding]:
    if not facts.network.asked:
        yield _Of(check).unknown("the network was not asked")


def _judge_reach(facts: Facts) -> Iterator[Finding]:
    yield from _no_network("reach", facts)
    named = [peer for peer in _peers(facts) if peer.role == "router"]
    for peer in _peers(facts):
        of = _Of("reach", peer.url)
        if peer.round_trip is None:
            others = any(other.round_trip is not None for other in named if other.role == peer.role)
            advice = f"is it running, and is the address right? {_then(peer)}"
            value = f"{peer.role} is not reached: {_why(peer)}"
            # A node that is away costs a detour; that none of the routers named is there stops everything.
            yield of.slow(value, advice) if peer.role != "router" or others else of.broken(value, advice)
        elif peer.asked and peer.answer:
            yield of.broken(f"{peer.role} does not answer: {peer.answer}", "look at its log, and at proxies in between")
        else:
            yield of.ok(f"{peer.role}, {ms(peer.round_trip)} away")


def _why(peer: Peer) -> str:
    if peer.lookup is None and peer.named:
        return peer.lookup_error or "its name is not known"
    return "; ".join(sorted({f"{one.address}: {one.reason or one.outcome.value}" for one in peer.connects}))


def _then(peer: Peer) -> str:
    return "--router names another" if peer.role == "router" else "others serve in its place"


def _judge_names(facts: Facts) -> Iterator[Finding]:
    yield from _no_network("dns", facts)
    for peer in _peers(facts):
        of = _Of("dns", peer.url)
        if not peer.named:
            continue
        if peer.lookup is None:
            advice = "look at /etc/resolv.conf and the resolvers that it names; `getent ahosts NAME` asks them"
            yield of.broken(peer.lookup_error or "no answer", advice)
        elif peer.lookup <= LOOKUP:
            yield of.ok(ms(peer.lookup))
        else:
            advice = "use a resolver that is near (systemd-resolved, unbound), or a faster one in /etc/resolv.conf"
            yield of.slow(ms(peer.lookup), advice)


def _judge_ipv6(facts: Facts) -> Iterator[Finding]:
    yield from _no_network("ipv6", facts)
    for peer in _peers(facts):
        of = _Of("ipv6", peer.url)
        six = [one for one in peer.connects if one.family == 6]
        four = [one.seconds for one in peer.connects if one.family == 4 and one.outcome is Outcome.CONNECTED]
        if not six:
            continue
        worked = [one.seconds for one in six if one.outcome is Outcome.CONNECTED]
        if any(one.outcome is Outcome.HANGS for one in six):
            hung = ", ".join(one.address for one in six if one.outcome is Outcome.HANGS)
            advice = (
                "mend its route or firewall, or take the AAAA record away; until then prefer IPv4 in /etc/gai.conf"
                " (precedence ::ffff:0:0/96 100)"
            )
            yield of.broken(f"{hung} hangs: clients that try addresses in order wait for minutes", advice)
        elif not worked:
            yield of.ok("refused at once, so IPv4 is taken at once")
        elif four and min(worked) > min(four) + RACE:
            advice = "IPv6 takes a detour: ask the provider, or prefer IPv4 in /etc/gai.conf"
            yield of.slow(f"{ms(min(worked))}, IPv4 {ms(min(four))}", advice)
        else:
            yield of.ok(ms(min(worked)))


def _judge_clock(facts: Facts) -> Iterator[Finding]:
    yield from _no_network("clock", facts)
    for peer in _peers(facts):
        if not peer.asked:
            continue
        of = _Of("clock", peer.url)
        if peer.skew is None:
            yield of.unknown("it tells no time")
            continue
        off = max(0.0, abs(peer.skew) - peer.skew_error)
        value = f"{off:.0f} s {'behind' if peer.skew > 0 else 'ahead of'} {peer.role}" if off else "right"
        advice = "set this clock, or that one: run chrony or systemd-timesyncd on both"
        if off > SKEW:
            yield of.broken(value, f"{advice}; signed metadata cannot be judged by a clock this wrong")
        elif off > DRIFT:
            yield of.slow(value, advice)
        else:
            yield of.ok(value)


def _judge_expiry(facts: Facts) -> Iterator[Finding]:
    yield from _no_network("expiry", facts)
    for peer in _peers(facts):
        if peer.expires is None:
            continue
        of, left = _Of("expiry", peer.url), peer.expires - facts.now
        there = left - (peer.skew or 0.0)
        when = datetime.fromtimestamp(peer.expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
        if left > 0:
            yield of.ok(f"the signed metadata is good until {when}")
        elif there > 0:
            yield of.broken(f"expired at {when} by this clock, not by theirs", "set this machine's clock")
        else:
            advice = "its origin signs no more, or is out of reach: look at the origin's log"
            yield of.broken(f"expired at {when}: refs are refused", advice)


# Disks


def _judge_disk(check: str, judge: Callable[[_Of, Queue], Finding]) -> Callable[[Facts], Iterator[Finding]]:
    """Each disk once, whatever is kept on it."""

    def judge_all(facts: Facts) -> Iterator[Finding]:
        queues = {place.queue.name: place.queue for place in facts.machine.places if place.queue}
        for place in facts.machine.places:
            if place.queue is None and place.filesystem not in LOST | NETWORKED:
                yield _Of(check, place.path).unknown("no disk is known under it")
        for queue in queues.values():
            yield judge(_Of(check, queue.name), queue)

    return judge_all


def _attribute(device: str, attribute: str, value: str) -> Setting:
    return Setting(f"sys/block/{device}/{attribute}", value)


def _judge_scheduler(of: _Of, queue: Queue) -> Finding:
    if queue.scheduler is None:
        return of.unknown()
    turns = queue.rotational and not queue.virtual
    good = ("mq-deadline", "bfq") if turns else ("none", "mq-deadline", "kyber")
    if queue.scheduler in good:
        return of.ok(queue.scheduler)
    kind = "a disk that turns" if turns else "a disk that does not turn"
    ready = [name for name in good if name in queue.schedulers]
    if not ready:
        return of.slow(f"{queue.scheduler} on {kind}", f"load one of {', '.join(good)} (modprobe)")
    better = _attribute(queue.name, "queue/scheduler", ready[0])
    return of.slow(f"{queue.scheduler} on {kind}", f"use {ready[0]} ({better.line})", better)


def _judge_depth(of: _Of, queue: Queue) -> Finding:
    if queue.nr_requests is None:
        return of.unknown()
    value = f"{queue.nr_requests} requests" + (f", {queue.depth} at the disk" if queue.depth is not None else "")
    if queue.depth == 1 and not queue.virtual:
        advice = "the disk gets one command at a time: give it its queue back, unless its firmware is known to be bad"
        return of.slow(value, advice, _attribute(queue.name, "device/queue_depth", str(DEPTH)))
    if queue.nr_requests >= DEPTH:
        return of.ok(value)
    if queue.scheduler in (None, "none"):  # then it is what the hardware has, and writing more is refused
        return of.ok(f"{value}, as many as the hardware has")
    more = _attribute(queue.name, "queue/nr_requests", str(2 * DEPTH))
    return of.slow(value, f"queue more ({more.line})", more)


def _judge_read_ahead(of: _Of, queue: Queue) -> Finding:
    if queue.read_ahead is None:
        return of.unknown()
    turns = bool(queue.rotational and not queue.virtual)
    least, better = READ_AHEAD[turns]
    if queue.read_ahead >= least:
        return of.ok(size(queue.read_ahead))
    more = _attribute(queue.read_ahead_of or queue.name, "queue/read_ahead_kb", str(better >> 10))
    kind = "a disk that turns" if turns else "any disk"
    return of.slow(f"{size(queue.read_ahead)}, too little for {kind}", f"read {size(better)} ahead ({more.line})", more)


def _judge_space(facts: Facts) -> Iterator[Finding]:
    for place in facts.machine.places:
        of = _Of("free-space", place.path)
        if place.free is None:
            yield of.unknown()
            continue
        value = f"{size(place.free)} for the {place.role}"
        advice = "make room (`nearshard rm`, a smaller cache), or keep it on another disk"
        if place.free < FREE[0]:
            yield of.broken(value, advice)
        elif place.files_free is not None and place.files_free < FILES_FREE:
            yield of.broken(f"{value}, but for {place.files_free} more files only", "free inodes, or use another disk")
        elif place.free < FREE[1]:
            yield of.slow(value, advice)
        else:
            yield of.ok(value)


def _judge_filesystem(facts: Facts) -> Iterator[Finding]:
    for place in facts.machine.places:
        yield _judge_place(_Of("filesystem", place.path), place)


def _judge_place(of: _Of, place: Place) -> Finding:
    kind = place.filesystem
    if place.hangs:
        return of.broken("it does not answer", f"is it on a server that is gone? Keep the {place.role} on a disk here")
    if place.writable is False:
        return of.broken(f"{kind or 'it'}, and nothing can be written", "mount it for writing, or own it")
    if kind is None:
        return of.unknown()
    shares = {True: "with reflinks", False: "without reflinks", None: "reflinks not known"}[place.reflink]
    if kind in PLAIN:
        return of.broken(f"{kind}: no hard links", "keep models on a file system of Linux: xfs, btrfs, ext4")
    if kind in NETWORKED:
        return of.slow(f"{kind}, over the network", f"keep the {place.role} on a disk of this machine")
    if kind in LOST:
        return of.slow(f"{kind}: in memory, gone at the next start", f"keep the {place.role} on a disk")
    return of.ok(f"{kind}, {shares}")


# The machine


def _judge_files(facts: Facts) -> Iterator[Finding]:
    of, soft, hard = _Of("open-files"), facts.machine.files_soft, facts.machine.files_hard
    if soft is None and hard is None:
        yield of.ok("no limit")
        return
    value = f"{soft} a process" + (f", up to {hard}" if hard is not None else "")
    advice = "LimitNOFILE=65536 in the unit of a service, or a line in /etc/security/limits.conf"
    if soft is not None and soft < CLIENT_FILES:
        yield of.broken(value, advice)
    elif hard is not None and hard < SERVES:
        yield of.slow(f"{value}: a node here serves fewer than 4096 connections", advice)
    else:
        yield of.ok(value)


def _judge_all_files(facts: Facts) -> Iterator[Finding]:
    of, numbers = _Of("system-files"), facts.machine.numbers("fs/file-nr", 3)
    if numbers is None or not numbers[2]:
        yield of.unknown()
        return
    used, _, most = numbers
    value = f"{used} of {most}" if most < 1 << 40 else f"{used}, no limit"
    if used > 0.9 * most:
        yield of.slow(value, "find who keeps so many open (lsof), or raise fs.file-max")
    else:
        yield of.ok(value)


def _judge_memory(facts: Facts) -> Iterator[Finding]:
    of, available = _Of("memory"), facts.machine.memory_available
    if available is None:
        yield of.unknown()
    elif available < MEMORY:
        yield of.slow(f"{size(available)} available", "end something, or ask for fewer shards at once")
    else:
        yield of.ok(f"{size(available)} available")


def _judge_hashing(facts: Facts) -> Iterator[Finding]:
    of, speed, rate = _Of("hashing"), facts.machine.hashing, facts.network.rate
    if speed is None:
        yield of.unknown()
    elif speed < HASHING or (rate is not None and speed < rate):
        beside = f", the link brings {size(rate)}/s" if rate is not None else ""
        advice = "check that Python's OpenSSL is built for this processor; more cores help, several streams use them"
        yield of.slow(f"{size(speed)}/s a core{beside}", advice)
    else:
        yield of.ok(f"{size(speed)}/s a core")


def _judge_kernel(facts: Facts) -> Iterator[Finding]:
    of, machine = _Of("kernel"), facts.machine
    match = re.match(r"(\d+)\.(\d+)", machine.kernel)
    value = f"{machine.system} {machine.kernel}, Python {machine.python}".strip()
    if machine.system != "Linux":
        yield of.unknown(f"{value}: what is read here is Linux's")
    elif not match:
        yield of.unknown()
    elif (int(match[1]), int(match[2])) < KERNEL:
        yield of.slow(value, "a kernel from this decade: this one paces BBR only on fq")
    else:
        yield of.ok(value)


# What people read


def size(value: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"


def ms(seconds: float) -> str:
    """Milliseconds for people."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


CHECKS: tuple[Check, ...] = (
    Check(
        "reach", "a TCP handshake and a small request", "well: connected and answered; broken: no router is reached",
        "Without a router, an edge or an origin there is nobody to fetch from.",
        "Start it, or name another with `--router`.", "RFC 9293, section 3.5", _judge_reach,
    ),
    Check(
        "dns", "the time of `getaddrinfo` for each host",
        f"well up to {LOOKUP * 1000:.0f} ms; slow above; broken: no answer",
        "Every new host of a download waits for its name.",
        "A resolver that is near.", "man 5 resolv.conf; man 3 getaddrinfo", _judge_names,
    ),
    Check(
        "ipv6", "handshakes with all addresses of a host, of both families at once",
        f"broken: an address hangs; slow: {RACE * 1000:.0f} ms behind IPv4",
        "Programs that try addresses in order wait for the ones that hang; ours race them.",
        "Mend the route, take the record away, or prefer IPv4.", "RFC 8305, sections 4 and 5; man 5 gai.conf",
        _judge_ipv6,
    ),
    Check(
        "path-mtu", "`tcpi_pmtu` of each connection (TCP_INFO), and whether a large answer comes",
        f"slow below {LEAST_MTU} bytes; broken: small answers come and large ones do not",
        "Where packets that are too large vanish in silence, a transfer stops at its first full packet.",
        "Let ICMP through, or probe.", "RFC 1191; RFC 8201; RFC 2923, section 2.1; RFC 8200, section 5",
        _judge_path_mtu,
    ),
    Check(
        "mtu-probing", "`net.ipv4.tcp_mtu_probing`",
        f"slow: off although a path takes less than {FULL_MTU} bytes or a large answer stalled",
        "With 1 the kernel finds the size that gets through once it meets a black hole.",
        "`net.ipv4.tcp_mtu_probing = 1`", f"{IP_SYSCTL}; RFC 4821", _judge_mtu_probing,
    ),
    Check(
        "clock", "`Date` of the answers beside this clock",
        f"well up to {DRIFT:.0f} s; slow up to {SKEW:.0f} s; broken above",
        "Expiry of signed metadata, tokens and certificates is judged by this clock.",
        "chrony or systemd-timesyncd", "RFC 9110, section 6.6.1", _judge_clock,
    ),
    Check(
        "expiry", "`expires` of `/trust/timestamp.json` beside this clock", "broken: expired",
        "Clients refuse refs by metadata that has expired.", "Set the clock; look at the origin.",
        "The Update Framework, section 5.4.4", _judge_expiry,
    ),
    Check(
        "tcp-receive-buffer", "the third number of `net.ipv4.tcp_rmem`",
        f"well: at least twice the bandwidth-delay product (from {size(BUFFERS[0])} to {size(BUFFERS[1])}, and at most"
        f" 1/{SHARE} of the memory); slow below",
        "A sender may have no more under way than the window, which is about half of this buffer.",
        "`net.ipv4.tcp_rmem = MIN DEFAULT MAX`", f"{IP_SYSCTL}; RFC 9293, section 3.8.6; RFC 7323, section 1.1",
        _judge_limit("tcp-receive-buffer", RMEM),
    ),
    Check(
        "tcp-send-buffer", "the third number of `net.ipv4.tcp_wmem`", "as for receiving",
        "A node or an origin keeps here what is under way until it is acknowledged.",
        "`net.ipv4.tcp_wmem = MIN DEFAULT MAX`", f"{IP_SYSCTL}; RFC 9293, section 3.8",
        _judge_limit("tcp-send-buffer", WMEM),
    ),
    Check(
        "socket-buffers", "`net.core.rmem_max`, `net.core.wmem_max`",
        "well: at least the bandwidth-delay product; slow below",
        "They bound programs that set their own buffers (SO_RCVBUF, SO_SNDBUF), which ends the kernel's own tuning.",
        "`net.core.rmem_max`, `net.core.wmem_max`", f"{NET_SYSCTL}; man 7 socket", _judge_own_buffers,
    ),
    Check(
        "receive-tuning", "`net.ipv4.tcp_moderate_rcvbuf`", "slow: 0",
        "Without it a connection keeps the buffer that it began with, 64 KiB of window by default.",
        "`net.ipv4.tcp_moderate_rcvbuf = 1`", IP_SYSCTL,
        _judge_switch("receive-tuning", "net/ipv4/tcp_moderate_rcvbuf"),
    ),
    Check(
        "window-scaling", "`net.ipv4.tcp_window_scaling`, and what was agreed with each peer (TCP_INFO)",
        "slow: 0, or not agreed", "Without it no window is larger than 64 KiB: 5 Mbit/s at 100 ms.",
        "`net.ipv4.tcp_window_scaling = 1`", f"{IP_SYSCTL}; RFC 7323, section 2",
        _judge_switch(
            "window-scaling", "net/ipv4/tcp_window_scaling", negotiated=lambda one: one.window_scaling
        ),
    ),
    Check(
        "timestamps", "`net.ipv4.tcp_timestamps`, and what was agreed", "slow: 0, or not agreed",
        "They measure the round trip of every packet, and keep sequence numbers that wrapped apart.",
        "`net.ipv4.tcp_timestamps = 1`", f"{IP_SYSCTL}; RFC 7323, sections 3 to 5",
        _judge_switch("timestamps", "net/ipv4/tcp_timestamps", negotiated=lambda one: one.timestamps),
    ),
    Check(
        "sack", "`net.ipv4.tcp_sack`, and what was agreed", "slow: 0, or not agreed",
        "Without it one round trip mends one lost packet.", "`net.ipv4.tcp_sack = 1`",
        f"{IP_SYSCTL}; RFC 2018", _judge_switch("sack", "net/ipv4/tcp_sack", negotiated=lambda one: one.sack),
    ),
    Check(
        "congestion-control",
        "`net.ipv4.tcp_congestion_control`, `tcp_allowed_…`, `tcp_available_…`, the kernel's modules",
        f"well: bbr, or allowed (services then choose it), or nobody is {FAR * 1000:.0f} ms away; slow otherwise",
        "What slows down at each loss fills no long path that loses packets. The sender's side counts.",
        "`net.ipv4.tcp_congestion_control = bbr`", f"{IP_SYSCTL}; {TCP_BBR}; RFC 9438, section 1", _judge_congestion,
    ),
    Check(
        "qdisc", "`net.core.default_qdisc`", "well: fq, fq_codel, cake; slow: pfifo_fast and others",
        "BBR is paced by fq at little cost, by a timer for each socket elsewhere; one queue for all lets a large"
        " transfer delay all others.",
        "`net.core.default_qdisc = fq`", f"{NET_SYSCTL}; {TCP_BBR}; man 8 tc-fq; RFC 8290, section 1", _judge_qdisc,
    ),
    Check(
        "slow-start-after-idle", "`net.ipv4.tcp_slow_start_after_idle`",
        f"slow: on, with somebody {FAR * 1000:.0f} ms away or more",
        "A connection that waited between two shards begins anew with a small window.",
        "`net.ipv4.tcp_slow_start_after_idle = 0`", f"{IP_SYSCTL}; RFC 5681, section 4.1", _judge_idle,
    ),
    Check(
        "disk-scheduler", "`queue/scheduler` and `queue/rotational` of the disk",
        "well: none, mq-deadline, kyber; mq-deadline, bfq on disks that turn; slow otherwise",
        "Sorting costs a fast disk time; a disk that turns loses most of its speed without.",
        "`ATTR{queue/scheduler}` in a udev rule",
        "https://docs.kernel.org/block/switching-sched.html; https://docs.kernel.org/block/bfq-iosched.html",
        _judge_disk("disk-scheduler", _judge_scheduler),
    ),
    Check(
        "queue-depth", "`queue/nr_requests`, `device/queue_depth` of the disk",
        f"slow: one command at a time, or fewer than {DEPTH} requests under a scheduler",
        "Several streams read and write at once; a queue of one makes them take turns.",
        "`ATTR{queue/nr_requests}`, `ATTR{device/queue_depth}` in a udev rule",
        f"{SYSFS_BLOCK}; https://docs.kernel.org/scsi/scsi_mid_low_api.html", _judge_disk("queue-depth", _judge_depth),
    ),
    Check(
        "read-ahead", "`queue/read_ahead_kb` of the device that is mounted",
        f"slow: below {size(READ_AHEAD[False][0])}; below {size(READ_AHEAD[True][0])} on disks that turn",
        "Shards are read from beginning to end; a disk that turns pays a seek each time another stream has its turn.",
        "`ATTR{queue/read_ahead_kb}` in a udev rule", SYSFS_BLOCK, _judge_disk("read-ahead", _judge_read_ahead),
    ),
    Check(
        "free-space", "`statvfs` of the cache and the repository",
        f"slow below {size(FREE[1])}; broken below {size(FREE[0])} or {FILES_FREE} files",
        "A cache without room serves through memory; a repository without room ends the transfer.",
        "Remove models, or use another disk.", "man 3 statvfs", _judge_space,
    ),
    Check(
        "filesystem", "`/proc/self/mountinfo`, and a trial of FICLONE with files that have no name",
        "slow: over the network, in memory; broken: no answer, not writable, or of the FAT family",
        "The repository hard-links files; reflinks save a second copy where files are put together.",
        "Keep models on xfs, btrfs or ext4.", "man 5 proc_pid_mountinfo; man 2 ioctl_ficlone; man 2 link",
        _judge_filesystem,
    ),
    Check(
        "open-files", "RLIMIT_NOFILE", f"slow: hard limit below {SERVES}; broken: soft limit below {CLIENT_FILES}",
        "A service takes as many connections as it may have descriptors for, three each.",
        "`LimitNOFILE=65536`", "man 2 getrlimit; man 5 systemd.exec", _judge_files,
    ),
    Check(
        "system-files", "`fs.file-nr`", "slow: over 90 % of `fs.file-max`",
        "Beyond it nobody on the machine opens anything.", "`fs.file-max`", FS_SYSCTL, _judge_all_files,
    ),
    Check(
        "memory", "`MemAvailable` of `/proc/meminfo`", f"slow below {size(MEMORY)}",
        "Shards are held in memory until they are verified.", "End something.", "man 5 proc_meminfo", _judge_memory,
    ),
    Check(
        "hashing", "SHA-256 of a few megabytes", f"slow below {HASHING / 1e6:.0f} MB/s, or below the link",
        "Every byte is hashed before it is believed.", "A Python whose OpenSSL knows the processor.",
        "FIPS 180-4; man 3 EVP_sha256", _judge_hashing,
    ),
    Check(
        "kernel", "`uname`", "slow before 4.13", "Since then BBR paces by itself where the qdisc does not.",
        "A newer kernel.", TCP_BBR, _judge_kernel,
    ),
)  # fmt: skip
"""What is checked, in the order of the report: whether anybody is there, then the path, the disks, the machine."""
