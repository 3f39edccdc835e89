"""How the doctor judges: a table of cases for each check, and what holds of all facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearshard.doctor.checks import BUFFERS, CHECKS, SERVES, buffer_goal, examine, size
from nearshard.doctor.facts import (
    Connect,
    Facts,
    Finding,
    Machine,
    Network,
    Outcome,
    Peer,
    Place,
    Queue,
    Setting,
    Status,
)
from nearshard.doctor.machine import SYSCTLS
from nearshard.doctor.mending import is_safe, wanted

OK, SLOW, BROKEN, UNKNOWN = Status.OK, Status.SLOW, Status.BROKEN, Status.UNKNOWN
URL = "http://router:8700"
MB = 1_000_000
HOUR = 3600.0


def machine(**sysctls: str) -> Machine:
    """One with these sysctls; the folder by the name's beginning."""
    folders = {"tcp": "net/ipv4", "rme": "net/core", "wme": "net/core", "def": "net/core", "fil": "fs"}
    named = {f"{folders[name[:3]]}/{name.replace('file_nr', 'file-nr')}": text for name, text in sysctls.items()}
    return Machine(named, kernel="6.1.0")


def connected(seconds: float = 0.1, family: int = 4, **options: bool | int) -> Connect:
    address = "192.0.2.1" if family == 4 else "2001:db8::1"
    return replace(Connect(address, family, Outcome.CONNECTED, seconds), **options)  # type: ignore[arg-type]


def peer(*connects: Connect, **facts: object) -> Peer:
    return replace(Peer(URL, "router", lookup=0.01, connects=connects or (connected(),), asked=True), **facts)  # type: ignore[arg-type]


def network(*peers: Peer, rate: float | None = 12.5 * MB) -> Network:
    return Network(True, peers, rate, "as given")


def far(here: Machine, seconds: float = 0.1) -> Facts:
    """100 Mbit/s and a round trip."""
    return Facts(here, network(peer(connected(seconds))))


def of_peer(one: Peer, now: float = 0.0) -> Facts:
    return Facts(network=network(one), now=now)


def place(**facts: object) -> Facts:
    return Facts(Machine(places=(replace(Place("cache", "/var/cache", free=1 << 40), **facts),)))  # type: ignore[arg-type]


def disk(**facts: object) -> Facts:
    queue = Queue("sda", False, "none", ("none", "mq-deadline", "bfq"), 256, 32, 512 << 10, "sda")
    return place(queue=replace(queue, **facts), filesystem="ext4")  # type: ignore[arg-type]


SIX = (connected(0.01), Connect("2001:db8::1", 6, Outcome.HANGS, 2.0))
CASES: dict[str, list[tuple[Facts, Status]]] = {
    "reach": [
        (of_peer(peer()), OK),
        (of_peer(peer(Connect("192.0.2.1", 4, Outcome.REFUSED, 0.01, "Connection refused"))), BROKEN),
        (of_peer(peer(role="node", connects=())), SLOW),
        (Facts(network=network(peer(), Peer("http://other:8700", "router", lookup=0.0))), SLOW),
        (of_peer(peer(answer="no answer in 3 s")), BROKEN),
        (Facts(network=Network(asked=False)), UNKNOWN),
    ],
    "dns": [
        (of_peer(peer()), OK),
        (of_peer(peer(lookup=0.5)), SLOW),
        (of_peer(peer(lookup=None, lookup_error="Name or service not known", connects=())), BROKEN),
        (Facts(network=Network(asked=False)), UNKNOWN),
    ],
    "ipv6": [
        (of_peer(peer(connected(0.01), connected(0.02, 6))), OK),
        (of_peer(peer(connected(0.01), connected(0.5, 6))), SLOW),
        (of_peer(peer(*SIX)), BROKEN),
        (of_peer(peer(connected(), Connect("2001:db8::1", 6, Outcome.REFUSED, 0.0, "Network is unreachable"))), OK),
    ],
    "path-mtu": [
        (of_peer(peer(connected(path_mtu=1500))), OK),
        (of_peer(peer(connected(path_mtu=1400))), OK),
        (of_peer(peer(connected(path_mtu=1279))), SLOW),
        (of_peer(peer()), UNKNOWN),
        (Facts(network=replace(network(peer(connected(path_mtu=1500))), stalled=URL)), BROKEN),
    ],
    "mtu-probing": [
        (far(machine(tcp_mtu_probing="1")), OK),
        (far(machine(tcp_mtu_probing="0")), OK),
        (Facts(machine(tcp_mtu_probing="0"), network(peer(connected(path_mtu=1400)))), SLOW),
        (Facts(machine(tcp_mtu_probing="0"), replace(network(), stalled=URL)), SLOW),
        (far(machine()), UNKNOWN),
    ],
    "clock": [
        (of_peer(peer(skew=5.4, skew_error=0.5)), OK),
        (of_peer(peer(skew=-20.0, skew_error=0.5)), SLOW),
        (of_peer(peer(skew=300.4, skew_error=0.5)), SLOW),
        (of_peer(peer(skew=-2 * 86_400.0, skew_error=0.5)), BROKEN),
        (of_peer(peer()), UNKNOWN),
    ],
    "expiry": [
        (of_peer(peer(expires=HOUR), now=0.0), OK),
        (of_peer(peer(expires=HOUR), now=2 * HOUR), BROKEN),
        (of_peer(peer(expires=HOUR, skew=-2 * HOUR), now=2 * HOUR), BROKEN),
    ],
    "tcp-receive-buffer": [
        (far(machine(tcp_rmem="4096 131072 6291456")), OK),
        (far(machine(tcp_rmem="4096 131072 2500000")), OK),
        (far(machine(tcp_rmem="4096 131072 2499999")), SLOW),
        (far(machine(tcp_rmem="4096 131072 212992"), 0.0002), SLOW),
        (far(machine(tcp_rmem="4096 131072"), 0.0002), UNKNOWN),
        (Facts(machine(tcp_rmem="4096 131072 6291456")), UNKNOWN),
        (far(machine()), UNKNOWN),
    ],
    "tcp-send-buffer": [
        (far(machine(tcp_wmem="4096 16384 4194304")), OK),
        (far(machine(tcp_wmem="4096 16384 2000000")), SLOW),
        (far(machine(tcp_wmem="a b c")), UNKNOWN),
    ],
    "socket-buffers": [
        (far(machine(rmem_max="4194304", wmem_max="4194304")), OK),
        (far(machine(rmem_max="212992", wmem_max="4194304")), SLOW),
        (Facts(machine(rmem_max="212992")), UNKNOWN),
        (far(machine()), UNKNOWN),
    ],
    "receive-tuning": [
        (far(machine(tcp_moderate_rcvbuf="1")), OK),
        (far(machine(tcp_moderate_rcvbuf="0")), SLOW),
        (far(machine()), UNKNOWN),
    ],
    "window-scaling": [
        (far(machine(tcp_window_scaling="1")), OK),
        (far(machine(tcp_window_scaling="0")), SLOW),
        (Facts(machine(tcp_window_scaling="1"), network(peer(connected(window_scaling=False)))), SLOW),
        (Facts(machine(tcp_window_scaling="1"), network(peer(connected(window_scaling=True)))), OK),
    ],
    "timestamps": [
        (far(machine(tcp_timestamps="2")), OK),
        (far(machine(tcp_timestamps="0")), SLOW),
        (Facts(machine(tcp_timestamps="1"), network(peer(connected(timestamps=False)))), SLOW),
    ],
    "sack": [
        (far(machine(tcp_sack="1")), OK),
        (far(machine(tcp_sack="0")), SLOW),
        (Facts(machine(tcp_sack="1"), network(peer(connected(sack=False)))), SLOW),
    ],
    "congestion-control": [
        (far(machine(tcp_congestion_control="bbr")), OK),
        (far(machine(tcp_congestion_control="cubic", tcp_allowed_congestion_control="reno cubic bbr")), OK),
        (far(machine(tcp_congestion_control="cubic", tcp_available_congestion_control="reno cubic bbr")), SLOW),
        (far(replace(machine(tcp_congestion_control="cubic"), bbr_module=True)), SLOW),
        (far(replace(machine(tcp_congestion_control="cubic"), bbr_module=False)), SLOW),
        (far(machine(tcp_congestion_control="cubic")), UNKNOWN),
        (far(machine(tcp_congestion_control="cubic"), 0.001), OK),
        (far(machine()), UNKNOWN),
    ],
    "qdisc": [
        (far(machine(default_qdisc="fq")), OK),
        (far(machine(default_qdisc="fq_codel")), OK),
        (far(machine(default_qdisc="pfifo_fast")), SLOW),
        (far(machine()), UNKNOWN),
    ],
    "slow-start-after-idle": [
        (far(machine(tcp_slow_start_after_idle="0")), OK),
        (far(machine(tcp_slow_start_after_idle="1")), SLOW),
        (far(machine(tcp_slow_start_after_idle="1"), 0.001), OK),
        (Facts(machine(tcp_slow_start_after_idle="1")), UNKNOWN),
    ],
    "disk-scheduler": [
        (disk(), OK),
        (disk(scheduler="bfq"), SLOW),
        (disk(scheduler="bfq", rotational=True), OK),
        (disk(scheduler="none", rotational=True), SLOW),
        (disk(scheduler="none", rotational=True, name="vda"), OK),
        (disk(scheduler="none", rotational=True, schedulers=("none",)), SLOW),
        (disk(scheduler=None), UNKNOWN),
        (place(filesystem="ext4"), UNKNOWN),
    ],
    "queue-depth": [
        (disk(), OK),
        (disk(depth=1), SLOW),
        (disk(nr_requests=4), OK),
        (disk(nr_requests=4, scheduler="mq-deadline"), SLOW),
        (disk(nr_requests=None), UNKNOWN),
    ],
    "read-ahead": [
        (disk(), OK),
        (disk(read_ahead=128 << 10), OK),
        (disk(read_ahead=0), SLOW),
        (disk(read_ahead=128 << 10, rotational=True), SLOW),
        (disk(read_ahead=128 << 10, rotational=True, name="vdb"), OK),
        (disk(read_ahead=None), UNKNOWN),
    ],
    "free-space": [
        (place(free=5 << 30), OK),
        (place(free=1 << 30), SLOW),
        (place(free=1 << 20), BROKEN),
        (place(files_free=3), BROKEN),
        (place(files_free=1 << 20), OK),
        (place(free=None), UNKNOWN),
    ],
    "filesystem": [
        (place(filesystem="xfs", reflink=True, writable=True), OK),
        (place(filesystem="nfs4"), SLOW),
        (place(filesystem="tmpfs"), SLOW),
        (place(filesystem="vfat"), BROKEN),
        (place(filesystem="ext4", writable=False), BROKEN),
        (place(hangs=True), BROKEN),
        (place(), UNKNOWN),
    ],
    "open-files": [
        (Facts(Machine(files_soft=1024, files_hard=524_288)), OK),
        (Facts(Machine()), OK),
        (Facts(Machine(files_soft=1024, files_hard=SERVES - 1)), SLOW),
        (Facts(Machine(files_soft=255, files_hard=524_288)), BROKEN),
    ],
    "system-files": [
        (Facts(machine(file_nr="1000 0 9223372036854775807")), OK),
        (Facts(machine(file_nr="950 0 1000")), SLOW),
        (Facts(machine(file_nr="950 0 0")), UNKNOWN),
    ],
    "memory": [
        (Facts(Machine(memory_available=1 << 30)), OK),
        (Facts(Machine(memory_available=1 << 20)), SLOW),
        (Facts(Machine()), UNKNOWN),
    ],
    "hashing": [
        (Facts(Machine(hashing=1e9)), OK),
        (Facts(Machine(hashing=50e6)), SLOW),
        (Facts(Machine(hashing=300e6), network(rate=1.25e9)), SLOW),
        (Facts(Machine()), UNKNOWN),
    ],
    "kernel": [
        (Facts(Machine(kernel="6.1.0-13-amd64")), OK),
        (Facts(Machine(kernel="3.10.0-1160.el7")), SLOW),
        (Facts(Machine(system="Darwin", kernel="23.1.0")), UNKNOWN),
        (Facts(Machine()), UNKNOWN),
    ],
}


def judged(check: str, facts: Facts) -> list[Finding]:
    """What one check finds."""
    return [finding for finding in examine(facts) if finding.check == check]


@pytest.mark.parametrize(
    ("check", "facts", "status"), [(check, *case) for check, cases in CASES.items() for case in cases]
)
def test_each_check_judges_as_its_table_says(check: str, facts: Facts, status: Status) -> None:
    assert status in {finding.status for finding in judged(check, facts)}, judged(check, facts)


def test_every_check_has_cases_a_source_and_a_name_of_its_own() -> None:
    assert [check.id for check in CHECKS] == list(dict.fromkeys(check.id for check in CHECKS))
    assert CASES.keys() == {check.id for check in CHECKS}
    for check in CHECKS:
        assert all((check.reads, check.rule, check.why, check.mend, check.source)), check.id
        assert "|" not in check.reads + check.rule + check.why + check.mend + check.source, "they are cells of a table"


def test_each_check_can_say_what_is_wrong() -> None:
    """One that is always well would be no check."""
    for check, cases in CASES.items():
        assert {status for _, status in cases} & {SLOW, BROKEN}, check


def test_a_hanging_ipv6_address_is_named_with_what_to_do() -> None:
    (finding,) = judged("ipv6", of_peer(peer(*SIX)))
    assert "2001:db8::1" in finding.value and "gai.conf" in finding.advice


def test_metadata_that_expired_by_this_clock_alone_is_the_clocks_fault() -> None:
    (ours,) = judged("expiry", of_peer(peer(expires=HOUR, skew=-2 * HOUR), now=2 * HOUR))
    (theirs,) = judged("expiry", of_peer(peer(expires=HOUR, skew=0.0), now=2 * HOUR))
    assert "clock" in ours.advice and "origin" in theirs.advice


def test_buffers_are_raised_to_twice_the_product_and_no_further_than_memory_allows() -> None:
    (finding,) = judged("tcp-receive-buffer", far(machine(tcp_rmem="4096 131072 212992")))
    assert finding.settings == (Setting("proc/sys/net/ipv4/tcp_rmem", "4096 131072 2500000"),)
    small = replace(machine(tcp_rmem="4096 131072 212992"), memory=128 << 20)
    (finding,) = judged("tcp-receive-buffer", far(small))
    assert finding.settings[0].value == "4096 131072 2097152"


def test_a_rate_that_was_measured_counts_with_the_round_trip_of_its_own_path() -> None:
    near, distant = peer(connected(0.001)), replace(peer(connected(0.2)), url="http://origin:8710", role="origin")
    measured = Network(True, (near, distant), 1000 * MB, "measured", rate_round_trip=0.001)
    assert Facts(network=measured).product == MB
    assert Facts(network=replace(measured, rate_round_trip=None)).product == 200 * MB


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1 << 20, "1 MiB"), (1 << 30, "1 GiB"), (1 << 50, "1024 TiB")],
)
def test_sizes_for_people(value: float, text: str) -> None:
    assert size(value) == text


# What holds of all facts

numbers = st.integers(0, 1 << 63).map(str)
words = st.sampled_from(["bbr", "cubic", "reno", "fq", "fq_codel", "pfifo_fast", "none", "", "x y", "-1", "²", "0"])
values = st.one_of(
    numbers, words, st.lists(numbers, max_size=4).map("\t".join), st.lists(words, max_size=3).map(" ".join)
)
maybe: Callable[[st.SearchStrategy[object]], st.SearchStrategy[object]] = lambda inner: st.none() | inner  # noqa: E731
seconds = st.floats(0, 1e4)
sizes = st.integers(0, 1 << 62)
connects = st.builds(
    Connect, st.just("192.0.2.1"), st.sampled_from([4, 6]), st.sampled_from(Outcome), seconds, st.text(max_size=5),
    maybe(st.integers(0, 1 << 32)), maybe(st.booleans()), maybe(st.booleans()), maybe(st.booleans()),
)  # fmt: skip
peers = st.builds(
    Peer, st.sampled_from([URL, "http://n:1"]), st.sampled_from(["router", "node", "origin"]), st.booleans(),
    maybe(seconds), st.text(max_size=5), st.lists(connects, max_size=3).map(tuple), st.sampled_from(["", "no"]),
    st.booleans(), maybe(st.floats(-1e9, 1e9)), st.floats(0, 10), maybe(st.floats(0, 4e9)),
)  # fmt: skip
networks = st.builds(
    Network, st.booleans(), st.lists(peers, max_size=3).map(tuple), maybe(st.floats(1, 1e12)), st.text(max_size=3),
    maybe(seconds), st.sampled_from(["", URL]),
)  # fmt: skip
schedulers = st.sampled_from(["none", "mq-deadline", "kyber", "bfq", "cfq"])
queues = st.builds(
    Queue, st.sampled_from(["sda", "vda", "nvme0n1", "../../etc"]), maybe(st.booleans()), maybe(schedulers),
    st.lists(schedulers, max_size=3).map(tuple), maybe(sizes), maybe(st.integers(0, 64)), maybe(sizes),
    st.sampled_from(["sda", "dm-0", "a\"b"]),
)  # fmt: skip
places = st.builds(
    Place, st.sampled_from(["cache", "repository"]), st.just("/x"), maybe(sizes), maybe(sizes),
    maybe(st.sampled_from(["ext4", "vfat", "nfs", "tmpfs"])), maybe(st.booleans()), maybe(st.booleans()), maybe(queues),
    st.booleans(),
)  # fmt: skip
machines = st.builds(
    Machine, st.dictionaries(st.sampled_from(SYSCTLS), values), st.sampled_from(["Linux", "Darwin"]),
    st.sampled_from(["6.1", "2.6", "", "x"]), st.just("3.11"), maybe(st.booleans()), maybe(sizes), maybe(sizes),
    maybe(sizes), maybe(sizes), maybe(st.floats(0, 1e12)), st.lists(places, max_size=2).map(tuple),
)  # fmt: skip
anything = st.builds(Facts, machines, networks, st.floats(0, 4e9))


@given(anything)
def test_anything_is_judged(facts: Facts) -> None:
    """No facts are an error, what is wrong comes with advice, and what is set can be written."""
    findings = examine(facts)
    assert {finding.check for finding in findings} <= {check.id for check in CHECKS}
    for finding in findings:
        assert finding.value
        assert bool(finding.advice) == (finding.status in (SLOW, BROKEN)), finding
        assert not finding.settings or finding.status is SLOW, finding
    assert all(is_safe(setting) for setting in wanted(findings))


@given(anything)
def test_what_is_mended_is_well(facts: Facts) -> None:
    """Whoever applies what is proposed is not told to apply it again."""
    mended = replace(facts, machine=_mended(facts.machine, wanted(examine(facts))))
    assert wanted(examine(mended)) == ()


def _mended(here: Machine, settings: tuple[Setting, ...]) -> Machine:
    sysctls = dict(here.sysctls)
    changes = {one.path: one.value for one in settings}
    for path, value in changes.items():
        if path.startswith("proc/sys/"):
            sysctls[path.removeprefix("proc/sys/")] = value
    mended = [replace(one, queue=_requeued(one.queue, changes)) if one.queue else one for one in here.places]
    return replace(here, sysctls=sysctls, places=tuple(mended))


def _requeued(queue: Queue, changes: dict[str, str]) -> Queue:
    own, above = f"sys/block/{queue.name}", f"sys/block/{queue.read_ahead_of or queue.name}"
    depth, ahead = changes.get(f"{own}/device/queue_depth"), changes.get(f"{above}/queue/read_ahead_kb")
    requests = changes.get(f"{own}/queue/nr_requests")
    return replace(
        queue,
        scheduler=changes.get(f"{own}/queue/scheduler", queue.scheduler),
        nr_requests=int(requests) if requests else queue.nr_requests,
        depth=int(depth) if depth else queue.depth,
        read_ahead=int(ahead) << 10 if ahead else queue.read_ahead,
    )


@given(anything)
def test_a_buffers_goal_is_within_bounds(facts: Facts) -> None:
    goal = buffer_goal(facts)
    assert goal is None or BUFFERS[0] <= goal <= BUFFERS[1]
