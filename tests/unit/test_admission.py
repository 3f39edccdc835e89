"""Who is heard: nonces, order, replays."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from router.admission import Admission
from shared.enrolment import HEARTBEAT, LEAVE, Enrolled, sign
from shared.errors import RequestError
from shared.keys import NodeKey
from shared.node import Node
from shared.nonces import NONCE_TIME

KEY, OTHER = NodeKey.generate(), NodeKey.generate()
NODE = Node("a", "http://10.0.0.1:8720", "north", 2)
ENROLLED = {"a": Enrolled(NODE, KEY.public), "b": Enrolled(Node("b", NODE.url, "north", 1), OTHER.public)}
LOCAL = "127.0.0.1"


class Router:
    """An admission with a clock that is set by hand."""

    def __init__(self, *, enrolled: bool = True) -> None:
        self.now = 1000.0
        words = itertools.count(1)
        self.admission = Admission(ENROLLED if enrolled else None, lambda: self.now, lambda: f"{next(words):032x}")

    def said(self, sequence: int, *, boot: str = "b0", key: NodeKey = KEY, **change: Any) -> tuple[bytes, str]:
        """A heartbeat of node a, signed."""
        order = {"boot": boot, "sequence": sequence, "nonce": self.admission.nonce()}
        return sign(key, HEARTBEAT, {**NODE.record(), **order, **change})

    def left(self, sequence: int, *, boot: str = "b0", key: NodeKey = KEY) -> tuple[bytes, str]:
        """Its word that it goes."""
        order = {"id": "a", "boot": boot, "sequence": sequence, "nonce": self.admission.nonce()}
        return sign(key, LEAVE, order)

    def hear(self, said: tuple[bytes, str], node: str = "a") -> None:
        """Take a heartbeat."""
        self.admission.heartbeat(node, *said, "10.0.0.1")


def code(act: Callable[[], object]) -> str:
    """What is refused with."""
    with pytest.raises(RequestError) as refused:
        act()
    assert 400 <= refused.value.status < 500
    assert ("WWW-Authenticate" in refused.value.headers) == (refused.value.status == 401)
    return refused.value.error_code


@pytest.fixture
def router() -> Router:
    """With an enrolment."""
    return Router()


def test_a_heartbeat_is_heard_once(router: Router) -> None:
    first, second = router.said(1), router.said(2)
    router.hear(first)
    assert code(lambda: router.hear(first)) == "stale_heartbeat"
    router.hear(second)
    assert code(lambda: router.hear(first)) == "stale_heartbeat"


def test_a_refused_nonce_comes_with_the_right_one(router: Router) -> None:
    for nonce in ("", "ff" * 16):
        with pytest.raises(RequestError) as refused:
            router.hear(router.said(1, nonce=nonce))
        assert refused.value.error_code == "stale_nonce" and refused.value.status == 401
        assert refused.value.public == {"nonce": router.admission.nonce()}
    router.hear(router.said(1))


def test_a_recorded_heartbeat_is_no_use_later_or_elsewhere(router: Router) -> None:
    recorded = router.said(1)
    assert code(lambda: Router(enrolled=True).hear(router.said(1, nonce="99" * 16))) == "stale_nonce"
    router.now += 2 * NONCE_TIME - 1
    router.admission.nonce()  # has been given out until now
    router.now += 2 * NONCE_TIME
    assert code(lambda: router.hear(recorded)) == "stale_nonce"


def test_a_nonce_is_accepted_for_as_long_again_as_it_is_given_out(router: Router) -> None:
    old = router.said(1)
    router.now += NONCE_TIME
    assert router.admission.nonce() not in old[0].decode()
    router.hear(old)
    router.now += NONCE_TIME
    router.admission.nonce()
    again = sign(KEY, HEARTBEAT, {**json.loads(old[0]), "sequence": 2})
    assert code(lambda: router.hear(again)) == "stale_nonce"


def test_a_boot_that_another_followed_does_not_come_back(router: Router) -> None:
    router.hear(router.said(5))
    recorded = router.said(6)
    router.hear(router.said(1, boot="b1"))
    assert code(lambda: router.hear(recorded)) == "stale_heartbeat"
    router.hear(router.said(2, boot="b1"))


def test_who_has_left_does_not_come_back_by_what_was_recorded(router: Router) -> None:
    router.hear(router.said(1))
    late = router.said(2)
    router.admission.leave("a", *router.left(3), "10.0.0.1")
    assert code(lambda: router.hear(late)) == "stale_heartbeat"
    router.hear(router.said(4))


def test_a_leave_is_signed_as_such_and_once(router: Router) -> None:
    router.hear(router.said(1))
    heartbeat = router.said(2)
    leave = router.left(3)
    assert code(lambda: router.admission.leave("a", *heartbeat, "10.0.0.1")) == "bad_signature"
    assert code(lambda: router.hear(leave)) == "bad_signature"
    assert code(lambda: router.admission.leave("a", *router.left(3, key=OTHER), LOCAL)) == "bad_signature"
    assert code(lambda: router.admission.leave("a", b"", None, LOCAL)) == "bad_signature"
    router.admission.leave("a", *leave, "10.0.0.1")
    assert code(lambda: router.admission.leave("a", *leave, "10.0.0.1")) == "stale_heartbeat"


@pytest.mark.parametrize("node", ["a", "b", "c"])
def test_nobody_speaks_for_another(router: Router, node: str) -> None:
    expected = {"a": "bad_signature", "b": "bad_node", "c": "not_enrolled"}
    said = router.said(1, key=OTHER)
    assert code(lambda: router.hear(said, node)) == expected[node]


def test_what_is_not_signed_is_not_even_parsed(router: Router) -> None:
    for body in (b"", b"{", b"[" * 100_000, router.said(1)[0]):
        for field in (None, "", "00" * 64, "zz"):
            assert code(lambda body=body, field=field: router.hear((body, field))) == "bad_signature"  # type: ignore[misc]


def test_who_is_thrown_out_is_not_heard(router: Router) -> None:
    router.hear(router.said(1))
    router.admission.enrolled = {"b": ENROLLED["b"]}
    assert code(lambda: router.hear(router.said(2))) == "not_enrolled"


def test_no_wall_clock_is_asked() -> None:
    """Two routers whose clocks differ by years hear the same node."""
    for start in (0.0, 1e9):
        router = Router()
        router.now = start
        router.hear(router.said(1))


def test_open_on_loopback_takes_what_is_local_alone() -> None:
    router = Router(enrolled=False)
    local = b'{"url":"http://127.0.0.1:1","region":"north"}'
    for _ in range(2):
        router.admission.heartbeat("x", local, None, LOCAL)
    router.admission.leave("x", b"", None, "::1")
    admission = router.admission
    assert admission.mode == "open on loopback"
    assert code(lambda: admission.heartbeat("x", local, None, "10.0.0.9")) == "not_enrolled"
    assert code(lambda: admission.leave("x", b"", None, "10.0.0.9")) == "not_enrolled"
    assert code(lambda: admission.heartbeat("x", local.replace(b"127.0.0.1", b"10.0.0.1"), None, LOCAL)) == (
        "not_enrolled"
    )
