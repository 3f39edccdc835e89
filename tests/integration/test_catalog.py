"""The catalog against an upstream on a real socket, with time in the test's hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from shared.catalog import Catalog
from shared.errors import IntegrityError, ManifestTooLarge, NotFound, UpstreamError, WrongModel
from shared.manifest import Manifest
from shared.metrics import Metrics
from shared.paths import manifest_path
from shared.web.reads import Resolved
from shared.web.session import Sessions
from shared.web.trusted import Trusted, Upstreams
from tests.clock import HandClock
from tests.metadata import NOW, Repository, serving
from tests.scripted import Script, source, unavailable

MODEL = "acme/tiny"
FIRST, SECOND = Manifest(MODEL, {}, {}, {}), Manifest(MODEL, {}, {}, {}, piece_length=1 << 21)
THEIRS = Manifest("acme/other", {}, {}, {})
LIFETIME = 8.0


@dataclass
class Kept:
    """A catalog and its upstream. ``main`` is the first revision."""

    catalog: Catalog
    trusted: Trusted
    repository: Repository
    script: Script
    clock: HandClock

    def publish(self, manifest: Manifest, model: str = MODEL) -> None:
        """Let ``main`` mean this."""
        self.script.blobs[manifest_path(model, manifest.revision)] = manifest.encoded
        self.repository.publish(model, "main", manifest.encoded)

    def manifests(self) -> int:
        """How often a manifest was asked for."""
        return sum("/manifests/" in asked.path for asked in self.script.asked)


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    """Nothing was asked yet."""
    async with source(Script()) as script:
        sessions, clock, repository = Sessions(), HandClock(NOW), Repository()
        script.acts[:] = [serving(repository.files)]
        upstreams = Upstreams(sessions, [script.url], Metrics(), structlog.get_logger())
        trusted = Trusted(repository.root, upstreams, clock, lifetime=LIFETIME, name="test")
        catalog = Catalog(sessions, [script.url], trusted, clock, "test", lifetime=LIFETIME, directory=tmp_path)
        made = Kept(catalog, trusted, repository, script, clock)
        made.publish(FIRST)
        yield made
        await catalog.close()
        await trusted.close()
        await sessions.close()


async def test_what_is_fresh_is_at_hand(kept: Kept) -> None:
    catalog = kept.catalog
    assert catalog.at_hand(MODEL, "main") is None, "it was never asked for"
    assert (await catalog.resolve(MODEL, "main")).manifest.revision == FIRST.revision
    for ref in ("main", FIRST.revision):
        found = catalog.at_hand(MODEL, ref)
        assert found is not None and found.revision == FIRST.revision
        assert catalog.at_hand("acme/other", ref) is None
    assert catalog.at_hand(MODEL, SECOND.revision) is None
    kept.clock.now += LIFETIME + 0.01
    assert catalog.at_hand(MODEL, "main") is None
    assert catalog.at_hand(MODEL, FIRST.revision) is not None, "a revision is for ever"
    assert kept.manifests() == 1


async def test_a_ref_means_what_was_signed_last(kept: Kept) -> None:
    await kept.catalog.resolve(MODEL, "main")
    kept.publish(SECOND)
    assert (await kept.catalog.resolve(MODEL, "main")).manifest.revision == FIRST.revision
    kept.catalog.forget(MODEL)
    assert kept.catalog.at_hand(MODEL, "main") is None
    assert (await kept.catalog.resolve(MODEL, "main")).manifest.revision == SECOND.revision
    assert kept.catalog.at_hand(MODEL, "main") is not None


async def test_a_ref_that_is_gone_is_not_there(kept: Kept) -> None:
    await kept.catalog.resolve(MODEL, "main")
    kept.repository.refs["acme~public"].clear()
    kept.repository.sign_role("acme~public")
    kept.repository.sign_snapshot()
    kept.catalog.forget(MODEL)
    with pytest.raises(NotFound):
        await kept.catalog.resolve(MODEL, "main")
    assert kept.catalog.at_hand(MODEL, "main") is None


async def test_without_upstreams_what_is_known_is_served_stale(kept: Kept) -> None:
    await kept.catalog.resolve(MODEL, "main")
    kept.script.acts[:] = [unavailable]
    kept.clock.now += LIFETIME + 1
    found = await kept.catalog.resolve(MODEL, "main")
    assert found.stale and found.manifest.revision == FIRST.revision and "stale" in found.fields["Cache-Status"]


async def test_bytes_that_are_not_what_was_signed_are_refused(kept: Kept) -> None:
    """F17 for manifests: wrong bytes, more bytes, none, and what was signed by mistake for another model."""
    path = manifest_path(MODEL, FIRST.revision)
    wrong = bytes([FIRST.encoded[0] ^ 1]) + FIRST.encoded[1:]
    for data, error in ((wrong, IntegrityError), (FIRST.encoded + b"x", ManifestTooLarge), (None, UpstreamError)):
        kept.script.blobs.pop(path, None)
        if data is not None:
            kept.script.blobs[path] = data
        with pytest.raises(error):
            await kept.catalog.resolve(MODEL, "main")
    kept.script.blobs[path] = THEIRS.encoded
    with pytest.raises((IntegrityError, ManifestTooLarge)):
        await kept.catalog.resolve(MODEL, "main")
    kept.publish(THEIRS)
    kept.catalog.forget(MODEL)
    with pytest.raises(WrongModel):
        await kept.catalog.resolve(MODEL, "main")


async def test_a_revision_of_another_model_is_not_there(kept: Kept) -> None:
    kept.publish(THEIRS, "acme/other")
    await kept.catalog.resolve("acme/other", "main")
    with pytest.raises(NotFound):
        await kept.catalog.resolve(MODEL, THEIRS.revision)


async def test_who_asks_for_another_models_revision_shares_no_answer_with_who_may(kept: Kept) -> None:
    """While one is fetched for those who may see it, it is not given to who names another model, nor taken away."""
    asked = [kept.catalog.resolve(model, FIRST.revision) for model in ("acme/other", MODEL, "acme/other")]
    first, found, last = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(first, NotFound) and isinstance(last, NotFound)
    assert isinstance(found, Resolved) and found.manifest.revision == FIRST.revision
    with pytest.raises(NotFound):
        await kept.catalog.resolve("acme/other", FIRST.revision)


async def test_a_commit_is_found_where_it_is_and_asked_for_once(kept: Kept, tmp_path: Path) -> None:
    """In memory, by what refs mean, on disk after a restart, else upstream; the digest is the check."""
    catalog = kept.catalog
    assert (await catalog.resolve(MODEL, FIRST.commit)).manifest.revision == FIRST.revision
    assert kept.manifests() == 1
    assert kept.script.asked[-1].path == manifest_path(MODEL, FIRST.revision), "a ref means it"
    kept.script.blobs[manifest_path(MODEL, SECOND.commit)] = SECOND.encoded
    answers = await asyncio.gather(*(catalog.resolve(MODEL, SECOND.commit) for _ in range(5)))
    assert {answer.manifest.revision for answer in answers} == {SECOND.revision}
    assert kept.manifests() == 2
    assert (await catalog.resolve(MODEL, SECOND.revision)).manifest.commit == SECOND.commit
    sessions = Sessions()
    restarted = Catalog(sessions, [], kept.trusted, kept.clock, "test", lifetime=LIFETIME, directory=tmp_path)
    assert (await restarted.resolve(MODEL, SECOND.commit)).manifest.revision == SECOND.revision
    assert kept.manifests() == 2
    await sessions.close()


async def test_a_commit_that_is_not_there_or_of_something_else_is_refused(kept: Kept) -> None:
    with pytest.raises(NotFound) as raised:
        await kept.catalog.resolve(MODEL, "ab" * 20)
    assert raised.value.error_code == "unknown_revision"
    kept.script.blobs[manifest_path(MODEL, "cd" * 20)] = SECOND.encoded
    with pytest.raises(IntegrityError):
        await kept.catalog.resolve(MODEL, "cd" * 20)
    kept.script.blobs[manifest_path(MODEL, THEIRS.commit)] = THEIRS.encoded
    for _ in range(2):
        with pytest.raises(NotFound) as raised:
            await kept.catalog.resolve(MODEL, THEIRS.commit)
        assert raised.value.error_code == "unknown_revision"
