"""The catalog against an upstream on a real socket, with time in the test's hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from shared.catalog import Catalog
from shared.clock import SystemClock
from shared.errors import NotFound
from shared.manifest import Manifest
from shared.paths import manifest_path
from shared.web.session import Sessions
from tests.scripted import Script, source

MODEL = "acme/tiny"
FIRST, SECOND = Manifest(MODEL, {}, {}, {}), Manifest(MODEL, {}, {}, {}, piece_length=1 << 21)
LIFETIME = 8.0


class Clock(SystemClock):
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Where it stands."""
        return self.now


@dataclass
class Kept:
    """A catalog that has asked for ``main`` once."""

    catalog: Catalog
    script: Script
    clock: Clock

    def publish(self, manifest: Manifest) -> None:
        """Let ``main`` mean this."""
        for ref in ("main", manifest.revision):
            self.script.blobs[manifest_path(MODEL, ref)] = manifest.encoded

    async def asked(self, count: int) -> None:
        """Until the upstream was asked so often and all is done."""
        async with asyncio.timeout(10):
            while len(self.script.asked) < count or self.catalog._asking:
                await asyncio.sleep(0)


@pytest.fixture
async def kept() -> AsyncIterator[Kept]:
    """``main`` is the first revision."""
    async with source(Script()) as script:
        sessions = Sessions()
        clock = Clock()
        made = Kept(Catalog(sessions, [script.url], clock, "test", lifetime=LIFETIME), script, clock)
        made.publish(FIRST)
        assert made.catalog.at_hand(MODEL, "main") is None, "it was never asked for"
        await made.catalog.resolve(MODEL, "main")
        yield made
        await made.catalog.close()
        await sessions.close()


async def test_what_is_fresh_is_at_hand(kept: Kept) -> None:
    catalog = kept.catalog
    for ref in ("main", FIRST.revision):
        found = catalog.at_hand(MODEL, ref)
        assert found is not None and found.revision == FIRST.revision
        assert catalog.at_hand("acme/other", ref) is None
    assert catalog.at_hand(MODEL, SECOND.revision) is None
    kept.clock.now += LIFETIME + 0.01
    assert catalog.at_hand(MODEL, "main") is None
    assert catalog.at_hand(MODEL, FIRST.revision) is not None, "a revision is for ever"
    assert len(kept.script.asked) == 1


async def test_a_ref_that_is_asked_for_is_revalidated_before_its_lifetime_ends(kept: Kept) -> None:
    catalog = kept.catalog
    kept.publish(SECOND)
    kept.clock.now += 0.7 * LIFETIME
    assert catalog.at_hand(MODEL, "main") is not None and not catalog._asking
    kept.clock.now += 0.1 * LIFETIME
    for _ in range(3):
        found = catalog.at_hand(MODEL, "main")
        assert found is not None and found.revision == FIRST.revision, "it is fresh still"
    await kept.asked(2)
    assert len(kept.script.asked) == 2
    kept.clock.now += 0.7 * LIFETIME
    found = catalog.at_hand(MODEL, "main")
    assert found is not None and found.revision == SECOND.revision


async def test_a_ref_that_is_gone_is_at_hand_no_more(kept: Kept) -> None:
    kept.script.blobs.clear()
    kept.clock.now += 0.8 * LIFETIME
    assert kept.catalog.at_hand(MODEL, "main") is not None
    await kept.asked(2)
    assert kept.catalog.at_hand(MODEL, "main") is None
    with pytest.raises(NotFound):
        await kept.catalog.resolve(MODEL, "main")


async def test_what_was_announced_is_not_at_hand(kept: Kept) -> None:
    kept.catalog.forget(MODEL)
    assert kept.catalog.at_hand(MODEL, "main") is None
    assert (await kept.catalog.resolve(MODEL, "main")).manifest.revision == FIRST.revision
    assert kept.catalog.at_hand(MODEL, "main") is not None
