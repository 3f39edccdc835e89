"""What a router keeps of its nodes' words, over time."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from router.admission import Admission
from router.registry import Registry
from router.selection import Selection
from router.watch import FRESH, Watch
from shared import log
from shared.enrolment import parse_told
from shared.metrics import Metrics
from shared.nearness import Nearness
from shared.web.session import make_session
from tests.browser.network import status, usage
from tests.clock import HandClock
from tests.scripted import Script, source


@asynccontextmanager
async def watching(script: Script, clock: HandClock) -> AsyncIterator[Watch]:
    """A watch over one node, without the tasks of a router."""
    metrics, logger = Metrics(), log.get("test")
    admission = Admission(None, clock.monotonic, lambda: "0")
    registry = Registry(admission, 300, clock, random.Random(1), metrics, logger)
    told = {"url": script.url, "region": "r", "boot": "b", "sequence": 1}
    registry.heartbeat(parse_told("a", json.dumps(told).encode()))
    async with make_session() as session:
        selection = Selection(registry, Nearness({}, {}), clock, metrics, logger)
        watch = Watch(session, registry, selection, dict, clock)
        yield watch
        await watch.close()


async def test_what_a_node_said_is_kept_when_it_is_gone_and_rates_are_of_two_answers() -> None:
    clock, said = HandClock(), status({"acme/llm": usage(900, 100)})
    day = said["usage"]["day"]

    def says(sent: int) -> bytes:
        return json.dumps({**said, "sent_bytes": {"hit-disk": sent, "fill-peer": 1}}).encode()

    async with source(Script(blobs={"/status": says(1000)})) as script, watching(script, clock) as watch:
        (first,) = await watch.look()
        assert first.rate is None and first.share == 1.0
        script.blobs["/status"] = says(6000)
        clock.now += FRESH - 0.1
        assert len(script.gets()) == 1 and (await watch.look())[0].rate is None and len(script.gets()) == 1
        clock.now += 0.1
        (second,) = await watch.look()
        assert (second.rate, second.heard) == (5000 / FRESH, 0.0)
        script.blobs["/status"] = says(10)  # it has started anew
        clock.now += FRESH
        assert (await watch.look())[0].rate is None
        script.blobs.clear()
        clock.now += FRESH
        (gone,) = await watch.look()
        assert gone.trouble == "upstream_error" and gone.heard == FRESH and gone.rate is None
        kept = gone.usage(day)
        assert kept is not None and kept.served == 900
