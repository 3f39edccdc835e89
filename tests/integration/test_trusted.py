"""The signed metadata against sources on real sockets, with time in the test's hands."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest

from shared import trust
from shared.acceptance import accept
from shared.errors import (
    ClockSkew,
    ConfigError,
    KeyRevoked,
    MetadataExpired,
    MetadataTooLarge,
    NotFound,
    RollbackDetected,
    SignatureInvalid,
    TrustError,
    UpstreamError,
)
from shared.keys import NodeKey
from shared.paths import TrustPath
from shared.tokens import NOBODY, TokenRevoked, issue, parse_scopes
from shared.trust_file import TrustFile
from shared.trust_names import public_role
from shared.web.session import Fetched, make_session
from shared.web.trusted import Trusted
from tests.clock import HandClock
from tests.metadata import NOW, Repository, chained, make_key, serving
from tests.scripted import Asked, Script, source, unavailable

MODEL = "acme/tiny"
LIFETIME = 8.0


@dataclass
class Named:
    """Sources in the order of a test; notes who failed and how."""

    http: aiohttp.ClientSession
    scripts: list[Script]
    codes: list[str] = field(default_factory=list)

    def bases(self) -> list[str]:
        """All of them."""
        return [script.url for script in self.scripts]

    def session(self, base: str) -> aiohttp.ClientSession:
        """One for all."""
        return self.http

    def answered(self, base: str, answer: Fetched) -> None:
        """Nothing to note."""

    def credentials(self, base: str) -> dict[str, str]:
        """No token."""
        return {}

    def failed(self, base: str, error: UpstreamError) -> None:
        """Noted."""
        self.codes.append(error.error_code)


@dataclass
class Setting:
    """A repository, who serves it, and who asks."""

    repository: Repository
    script: Script
    other: Script
    sources: Named
    clock: HandClock
    folder: Path
    made: list[Trusted] = field(default_factory=list)

    def trusted(self, *, file: bool = False, asker: bool = False) -> Trusted:
        """One more process."""
        kept = TrustFile(self.folder / "trust") if file else None
        made = Trusted(
            self.repository.root, self.sources, self.clock, lifetime=LIFETIME, name="test", file=kept, asker=asker
        )
        self.made.append(made)
        return made

    def serve(self, files: Mapping[str, bytes]) -> None:
        """Let the first source have these."""
        self.script.acts[:] = [serving(files)]

    def paths(self) -> list[str]:
        """What the first source was asked for since the last time."""
        paths = [asked.path.removeprefix("/trust/") for asked in self.script.asked]
        self.script.asked.clear()
        return paths


@pytest.fixture
async def setting(tmp_path: Path) -> AsyncIterator[Setting]:
    """One source that has everything."""
    async with AsyncExitStack() as stack:
        repository = Repository()
        repository.publish(MODEL, "main", b"first")
        script, other = [await stack.enter_async_context(source(Script())) for _ in range(2)]
        http = await stack.enter_async_context(make_session())
        made = Setting(repository, script, other, Named(http, [script]), HandClock(NOW), tmp_path)
        made.serve(repository.files)
        yield made
        for trusted in made.made:
            await trusted.close()


async def test_one_conditional_request_where_nothing_changed(setting: Setting) -> None:
    trusted = setting.trusted()
    first = await trusted.target(MODEL, "main")
    assert setting.paths() == [
        "timestamp.json", "2.root.json", "2.snapshot.json", "1.targets.json", "1.access.json", "2.acme~public.json",
    ]  # fmt: skip
    assert await trusted.target(MODEL, "main") == first and trusted.at_hand(MODEL, "main") == first
    assert not setting.paths()
    setting.clock.now += LIFETIME + 1
    assert trusted.at_hand(MODEL, "main") is None
    assert await trusted.target(MODEL, "main") == first
    assert setting.paths() == ["timestamp.json"] and trusted.fields() == {"Age": "0"}


async def test_who_knows_nothing_yet_gets_all_in_one_answer(setting: Setting) -> None:
    files = setting.repository.files
    setting.script.acts[:] = [chained({**files, "2.root.json": None}, {})]
    found = await setting.trusted().target(MODEL, "main")
    assert setting.paths() == ["timestamp.json"]
    setting.serve(files)
    assert await setting.trusted().target(MODEL, "main") == found


async def test_what_is_not_in_that_answer_is_asked_for_by_its_name(setting: Setting) -> None:
    files = setting.repository.files
    sent = {name: files[name] for name in ("timestamp.json", "2.snapshot.json")}
    setting.script.acts[:] = [chained(sent, files)]
    await setting.trusted().target(MODEL, "main")
    assert setting.paths() == ["timestamp.json", "2.root.json", "1.targets.json", "1.access.json", "2.acme~public.json"]


async def test_files_of_that_answer_are_checked_as_if_they_came_alone(setting: Setting) -> None:
    setting.sources.scripts.append(setting.other)
    files = dict(setting.repository.files)
    setting.other.acts[:] = [serving(dict(files))]
    for name in ("timestamp.json", "2.snapshot.json", "1.targets.json", "2.acme~public.json"):
        wrong = {**files, "2.root.json": None, name: files[name].replace(b'"sig":"', b'"sig":"00')}
        setting.script.acts[:] = [chained(wrong, files)]
        await setting.trusted().target(MODEL, "main")
        assert len(setting.sources.codes) == 1 and setting.sources.codes.pop() != "upstream_error", name
    for body in ({"timestamp.json": None}, {"../../etc": b""}, {"timestamp.json": b" " * (17 << 10)}):
        setting.script.acts[:] = [chained(body, files)]
        await setting.trusted().target(MODEL, "main")
        assert setting.sources.codes.pop() in ("upstream_error", "metadata_too_large") and not setting.sources.codes


async def test_many_askers_share_one_refresh(setting: Setting) -> None:
    trusted = setting.trusted()
    found = await asyncio.gather(*(trusted.target(MODEL, "main") for _ in range(50)))
    assert len(set(found)) == 1 and len(setting.paths()) == 6


async def test_what_is_published_is_asked_for_in_part(setting: Setting) -> None:
    trusted = setting.trusted()
    first = await trusted.target(MODEL, "main")
    setting.paths()
    setting.repository.publish(MODEL, "main", b"second")
    assert await trusted.target(MODEL, "main") == first, "it is fresh still"
    trusted.forget()
    assert trusted.at_hand(MODEL, "main") is None
    assert await trusted.target(MODEL, "main") != first
    assert setting.paths() == ["timestamp.json", "2.root.json", "3.snapshot.json", "3.acme~public.json"]


async def test_what_is_asked_for_is_confirmed_before_its_lifetime_ends(setting: Setting) -> None:
    trusted = setting.trusted()
    first = await trusted.target(MODEL, "main")
    setting.repository.publish(MODEL, "main", b"second")
    setting.clock.now += 0.7 * LIFETIME
    assert trusted.at_hand(MODEL, "main") == first and not trusted.asking
    setting.clock.now += 0.1 * LIFETIME
    assert trusted.at_hand(MODEL, "main") == first and trusted.asking, "nobody waits"
    await trusted.asking.once("timestamp", trusted._refresh)
    second = trusted.at_hand(MODEL, "main")
    assert second is not None and second != first


async def test_an_announcement_under_way_is_not_lost(setting: Setting) -> None:
    """What comes back may be what was before: it does not count as fresh."""
    trusted = setting.trusted()
    first = await trusted.target(MODEL, "main")
    old = dict(setting.repository.files)
    setting.clock.now += LIFETIME + 1
    released = asyncio.Event()

    async def held(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await released.wait()
        await serving(old)(script, asked, writer)

    setting.script.acts[:] = [held, serving(setting.repository.files)]
    asking = asyncio.create_task(trusted.target(MODEL, "main"))
    while not setting.script.asked or setting.script.asked[-1].path != "/trust/timestamp.json":
        await asyncio.sleep(0)
    setting.repository.publish(MODEL, "main", b"second")
    trusted.forget()
    released.set()
    assert await asking != first


async def test_names_that_are_not_there(setting: Setting) -> None:
    trusted = setting.trusted()
    for model, ref, code in ((MODEL, "v9", "unknown_revision"), ("acme/none", "main", "unknown_model")):
        with pytest.raises(NotFound) as raised:
            await trusted.target(model, ref)
        assert raised.value.error_code == code
    with pytest.raises(NotFound):
        await trusted.target("nobody/none", "main")
    assert await trusted.models() == [MODEL] and await trusted.is_public(MODEL)
    assert not await trusted.is_public("nobody/none") and list(await trusted.refs(MODEL)) == ["main"]
    assert trusted.access() == {"token_keys": [], "revoked": []}


@pytest.mark.parametrize("code", ["upstream_error", "no_nodes"])
async def test_who_knows_nothing_yet_hears_the_same_until_somebody_is_asked_again(setting: Setting, code: str) -> None:
    """Not that metadata has expired: there never was any."""
    setting.script.acts[:] = [unavailable]
    if code == "no_nodes":
        setting.sources.scripts.clear()
    trusted = setting.trusted()
    for _ in range(2):
        with pytest.raises(UpstreamError) as error:
            await trusted.is_public(MODEL)
        assert error.value.error_code == code


async def test_without_sources_it_goes_on_until_it_expires(setting: Setting) -> None:
    trusted = setting.trusted()
    first = await trusted.target(MODEL, "main")
    setting.script.acts[:] = [unavailable]
    setting.clock.now += 2 * 86_400
    assert await trusted.target(MODEL, "main") == first
    assert trusted.stale and "stale" in trusted.fields()["Cache-Status"]
    count = len(setting.script.asked)
    assert await trusted.target(MODEL, "main") == first and len(setting.script.asked) == count, (
        "not asked again at once"
    )
    setting.clock.now += 86_400
    assert trusted.at_hand(MODEL, "main") is None
    with pytest.raises(MetadataExpired):
        await trusted.target(MODEL, "main")
    setting.repository.now = setting.clock.time()
    setting.repository.sign_timestamp()
    setting.serve(setting.repository.files)
    setting.clock.now += LIFETIME
    assert await trusted.target(MODEL, "main") == first and not trusted.stale


@pytest.mark.parametrize("asker", [True, False])
async def test_a_source_that_lies_is_left_for_the_next(setting: Setting, asker: bool) -> None:
    """What was believed stays; alone, the liar is named, by a client and by who knows nothing better."""
    old = dict(setting.repository.files)
    setting.repository.publish(MODEL, "main", b"second")
    trusted = setting.trusted(asker=asker)
    second = await trusted.target(MODEL, "main")
    setting.serve(old)
    setting.other.acts[:] = [serving(setting.repository.files)]
    setting.sources.scripts.append(setting.other)
    setting.clock.now += LIFETIME + 1
    assert await trusted.target(MODEL, "main") == second and not trusted.stale
    assert setting.sources.codes == ["rollback_detected"]
    setting.sources.scripts.pop()
    setting.clock.now += LIFETIME + 1
    if asker:
        with pytest.raises(RollbackDetected):
            await trusted.target(MODEL, "main")
        return
    assert await trusted.target(MODEL, "main") == second
    assert (trusted.status()["stale"], trusted.status()["error"]) == (True, "rollback_detected")


async def test_a_liar_is_named_to_who_knows_nothing_yet(setting: Setting) -> None:
    files = setting.repository.files
    files["timestamp.json"] = files["timestamp.json"].replace(b'"sig":"', b'"sig":"00')
    with pytest.raises(SignatureInvalid):
        await setting.trusted().target(MODEL, "main")
    setting.script.acts[:] = [unavailable]
    with pytest.raises(UpstreamError) as raised:
        await setting.trusted().target(MODEL, "main")
    assert not isinstance(raised.value, TrustError)


@pytest.mark.parametrize(
    "name", ["timestamp.json", "2.root.json", "2.snapshot.json", "1.targets.json", "2.acme~public.json"]
)
async def test_metadata_without_end_is_left_at_its_limit(setting: Setting, name: str) -> None:
    """M1: reading stops at the first byte over the limit."""
    sent = 0

    async def endless(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        if asked.path != f"/trust/{name}":
            await serving(setting.repository.files)(script, asked, writer)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{")
        while not writer.is_closing():
            writer.write(b" " * 65_536)
            sent += 65_536
            await writer.drain()

    setting.script.acts[:] = [endless]
    with pytest.raises(MetadataTooLarge):
        await setting.trusted().target(MODEL, "main")
    assert sent < trust.LIMITS["targets"] + (32 << 20), "what the kernel's buffers hold is all that was sent beyond"


async def test_a_clock_that_is_wrong_is_named(setting: Setting) -> None:
    """F28: by the source's Date."""

    async def dated(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        data = setting.repository.files.get(asked.path.removeprefix("/trust/"))
        status = "200 OK" if data else "404 Not Found"
        head = f"HTTP/1.1 {status}\r\nDate: Fri, 15 Jan 2027 08:00:00 GMT\r\nContent-Length: {len(data or b'')}\r\n\r\n"
        writer.write(head.encode() + (data or b""))

    setting.script.acts[:] = [dated]
    for seconds in (5 * 86_400, -2 * 86_400, -365 * 86_400):
        setting.clock.since_1970 = NOW + seconds
        with pytest.raises(ClockSkew):
            await setting.trusted().target(MODEL, "main")
    setting.clock.since_1970 = NOW + 2 * 86_400
    await setting.trusted().target(MODEL, "main")


async def test_one_organisation_without_good_metadata_leaves_the_others_well(setting: Setting) -> None:
    repository = Repository(orgs=("acme", "other"))
    setting.repository = repository
    repository.publish(MODEL, "main", b"first")
    repository.publish("other/tiny", "main", b"theirs")
    setting.serve(repository.files)
    trusted = setting.trusted()
    theirs = await trusted.target("other/tiny", "main")
    await trusted.target(MODEL, "main")
    repository.sign_role(public_role("acme"), make_key(77))
    repository.sign_snapshot()
    trusted.forget()
    assert await trusted.target("other/tiny", "main") == theirs
    with pytest.raises(TrustError):
        await trusted.target(MODEL, "main")


async def test_rotation_is_followed_and_a_revoked_key_refused(setting: Setting) -> None:
    """F34."""
    trusted = setting.trusted()
    first = await trusted.target(MODEL, "main")
    setting.repository.rotate(root=[make_key(n) for n in (11, 12, 13)], targets=make_key(14), online=make_key(15))
    setting.clock.now += LIFETIME + 1
    assert await trusted.target(MODEL, "main") == first
    old = setting.repository.publisher_key
    setting.repository.rotate(publisher=make_key(16))
    setting.repository.set_ref(MODEL, "main", b"forged")
    setting.repository.sign_role(public_role("acme"), old)
    setting.repository.sign_snapshot()
    setting.clock.now += LIFETIME + 1
    with pytest.raises(KeyRevoked):
        await trusted.target(MODEL, "main")
    assert await trusted.is_public(MODEL), "who may see it is not in question: its revisions go on"
    assert not trusted.known_public("acme/other")
    setting.repository.sign_role(public_role("acme"), make_key(16))
    setting.repository.sign_snapshot()
    setting.clock.now += LIFETIME + 1
    assert (await trusted.target(MODEL, "main")).revision != first.revision


@pytest.mark.parametrize("revoked", [True, False])
async def test_a_role_that_cannot_be_had_holds_back_no_revocation(setting: Setting, revoked: bool) -> None:
    """A link that breaks in the middle of a refresh costs nothing; whoever lets all through but the role's new file
    does not keep a revoked key alive by that."""
    trusted = setting.trusted()
    first = await trusted.target(MODEL, "main")
    if revoked:
        setting.repository.rotate(publisher=make_key(16))
    setting.repository.publish(MODEL, "main", b"second")
    setting.serve({name: data for name, data in setting.repository.files.items() if "acme~" not in name})
    setting.clock.now += LIFETIME + 1
    if revoked:
        with pytest.raises(UpstreamError):
            await trusted.target(MODEL, "main")
    else:
        assert await trusted.target(MODEL, "main") == first
        assert trusted.status()["stale"]


async def test_what_was_verified_is_served_on(setting: Setting) -> None:
    trusted = setting.trusted()
    await trusted.target(MODEL, "main")
    setting.repository.publish(MODEL, "main", b"second")
    old = dict(setting.repository.files)
    trusted.forget()
    await trusted.target(MODEL, "main")
    setting.script.acts[:] = [unavailable]
    for path in (TrustPath("root", 1), TrustPath("snapshot", 2), TrustPath("snapshot", 3), TrustPath("targets", 1)):
        assert (await trusted.file(path)).body == old[path.file]
    assert (await trusted.file(TrustPath("timestamp", 0))).body == setting.repository.timestamp
    for path in (TrustPath("root", 2), TrustPath("snapshot", 9), TrustPath("nobody~public", 1)):
        with pytest.raises(NotFound):
            await trusted.file(path)


async def test_an_edge_behind_an_edge_without_origin_is_stale_too(setting: Setting) -> None:
    first = await setting.trusted().target(MODEL, "main")
    setting.script.asked.clear()

    async def stale(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        data = setting.repository.files.get(asked.path.removeprefix("/trust/"))
        if data is None:
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        head = f'HTTP/1.1 200 OK\r\nCache-Status: "e"; hit; detail=stale\r\nContent-Length: {len(data)}\r\n\r\n'
        writer.write(head.encode() + data)

    setting.script.acts[:] = [stale]
    trusted = setting.trusted()
    assert await trusted.target(MODEL, "main") == first and trusted.stale


# On disk


async def test_what_is_believed_survives_a_restart(setting: Setting) -> None:
    first = await setting.trusted(file=True).target(MODEL, "main")
    setting.script.acts[:] = [unavailable]
    again = setting.trusted(file=True)
    assert await again.target(MODEL, "main") == first and again.stale
    setting.serve(setting.repository.files)
    setting.paths()
    assert await setting.trusted(file=True).target(MODEL, "main") == first
    assert setting.paths() == ["timestamp.json"], "one conditional request"


async def test_a_rollback_is_seen_after_a_restart(setting: Setting) -> None:
    old = dict(setting.repository.files)
    setting.repository.publish(MODEL, "main", b"second")
    await setting.trusted(file=True).target(MODEL, "main")
    setting.serve(old)
    with pytest.raises(RollbackDetected):
        await setting.trusted(file=True, asker=True).target(MODEL, "main")


@pytest.mark.parametrize("data", [b"", b"\x80", b"rubbish", b"\x81\xa5roots\x90"])
async def test_a_broken_file_costs_a_refresh(setting: Setting, data: bytes) -> None:
    (setting.folder / "trust").write_bytes(data)
    await setting.trusted(file=True).target(MODEL, "main")
    assert TrustFile(setting.folder / "trust").load() is not None


async def test_another_networks_file_is_replaced(setting: Setting) -> None:
    other = Repository(root_keys=[make_key(n) for n in (41, 42, 43)])
    for _ in range(5):
        other.sign_timestamp()
    mine, setting.repository = setting.repository, other
    setting.serve(other.files)
    await setting.trusted(file=True).models()
    setting.repository = mine
    setting.serve(mine.files)
    await setting.trusted(file=True).target(MODEL, "main")
    kept = TrustFile(setting.folder / "trust").load()
    assert kept is not None and kept.roots == (mine.root,)


def _save(file: Path, states: list[bytes], times: int) -> None:
    """One process of several: saves states, in its own order, again and again."""
    for _ in range(times):
        for state in states:
            TrustFile(file).save(trust.Kept.decode(state))


async def test_processes_that_share_a_file_never_take_it_back(setting: Setting) -> None:
    """Each has saved its states in another order; what stays is the newest, whole."""
    states = []
    for _ in range(6):
        setting.repository.sign_timestamp()
        trusted = setting.trusted()
        await trusted.target(MODEL, "main")
        states.append(trusted._trust.kept().encode())
    file = setting.folder / "shared"
    spawn = multiprocessing.get_context("spawn")
    orders = [states, states[::-1], states[3:] + states[:3]]
    processes = [spawn.Process(target=_save, args=(file, order, 20)) for order in orders]
    for process in processes:
        process.start()
    seen = 0
    while any(process.is_alive() for process in processes):
        kept = TrustFile(file).load()
        if kept is not None:
            assert kept.order[1] >= seen and kept.encode() in states
            seen = kept.order[1]
        await asyncio.sleep(0)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    kept = TrustFile(file).load()
    assert kept is not None and kept.encode() == states[-1]


async def test_what_is_public_needs_no_confirmation_and_what_is_private_does(setting: Setting) -> None:
    setting.repository.publish("acme/secret", "main", b"hidden", private=True)
    trusted = setting.trusted()
    assert not trusted.known_public(MODEL), "nothing is known yet"
    assert await trusted.is_public(MODEL) and not await trusted.is_public("acme/secret")
    assert f"{setting.repository.versions['acme~private']}.acme~private.json" not in setting.paths()
    setting.clock.now += LIFETIME + 1
    setting.script.acts[:] = [unavailable]
    assert trusted.known_public(MODEL) and await trusted.is_public(MODEL)
    assert not trusted.known_public("acme/secret")
    while len(trusted.asking):  # it was sought beside
        await asyncio.sleep(0)
    assert "timestamp.json" in setting.paths() and trusted.stale
    setting.clock.now += 400 * 86_400
    assert await trusted.is_public(MODEL)
    with pytest.raises(TrustError):
        await trusted.is_public("acme/secret")
    with pytest.raises(TrustError):
        await trusted.access_list()


async def test_which_tokens_are_good_is_as_new_as_the_lifetime(setting: Setting) -> None:
    key = NodeKey.generate()
    token = issue(key, parse_scopes(["acme/*:read"]), token_id="t", now=NOW, lifetime=900)
    access = NOBODY.with_key(key.public, NOW, NOW)
    setting.repository.access = access.document()
    setting.repository.sign_access()
    setting.repository.sign_snapshot()
    trusted = setting.trusted()
    assert (await trusted.access_list()).verify(token, NOW).id == "t"
    setting.repository.access = access.with_revoked("t", NOW, NOW + 900).document()
    setting.repository.sign_access()
    setting.repository.sign_snapshot()
    assert (await trusted.access_list()).verify(token, NOW), "not asked for yet"
    setting.clock.now += LIFETIME + 1
    with pytest.raises(TokenRevoked):
        (await trusted.access_list()).verify(token, setting.clock.time())


# Expired, and accepted by name


DAYS = 86_400.0
UNTIL = "2027-01-31"


def accepting(setting: Setting, *texts: str, file: bool = True, root: bytes = b"") -> tuple[Trusted, list[str]]:
    """A process whose operator accepts these, and what it was told of that. An asker: what a client is."""
    told: list[str] = []
    made = Trusted(
        root or setting.repository.root, setting.sources, setting.clock, lifetime=0, name="test", asker=True, eager=(),
        file=TrustFile(setting.folder / "trust") if file else None,
        accepted=accept(texts, setting.clock.time(), "test"), accepting=lambda one: told.append(one.text),
    )  # fmt: skip
    setting.made.append(made)
    return made, told


async def test_what_has_expired_is_accepted_for_what_is_named_until_its_day(setting: Setting) -> None:
    setting.repository.publish("acme/other", "main", b"other")
    known = await setting.trusted(file=True).target(MODEL, "main")
    setting.script.acts[:] = [unavailable]
    setting.clock.now += 5 * DAYS
    text = f"{MODEL}@main until {UNTIL}"
    trusted, told = accepting(setting, text)
    assert await trusted.target(MODEL, "main") == known and told == [text], "after a restart, with nobody to ask"
    for model, ref in (("acme/other", "main"), (MODEL, "v2")):
        with pytest.raises(MetadataExpired):
            await trusted.target(model, ref)
    with pytest.raises(MetadataExpired):
        await trusted.access_list()
    assert trusted.status()["accepted_expired"] == [{"what": text, "in_force": True, "used": 1}]
    with pytest.raises(MetadataExpired):
        await setting.trusted(file=True).target(MODEL, "main")

    setting.clock.now += accept([text], setting.clock.time(), "")[0].until - setting.clock.time()
    with pytest.raises(MetadataExpired):
        await trusted.target(MODEL, "main")
    assert len(told) == 1


async def test_nothing_older_is_taken_because_expired_metadata_is_accepted(setting: Setting) -> None:
    old = dict(setting.repository.files)
    setting.repository.publish(MODEL, "main", b"second")
    newest = dict(setting.repository.files)
    second = await setting.trusted(file=True).target(MODEL, "main")
    setting.clock.now += 5 * DAYS
    trusted, _ = accepting(setting, f"{MODEL} until {UNTIL}")
    setting.serve(old)
    with pytest.raises(RollbackDetected):
        await trusted.target(MODEL, "main")
    setting.serve({**newest, "timestamp.json": newest["timestamp.json"].replace(b'"sig":"', b'"sig":"00')})
    with pytest.raises(TrustError):
        await trusted.target(MODEL, "main")
    fresh, _ = accepting(setting, f"{MODEL} until {UNTIL}")
    assert (await fresh.bring(old, MODEL, "main", keep=True)).target == second, "what is known counts"
    with pytest.raises(RollbackDetected):
        await fresh.bring(old, MODEL, "v9", keep=True)


async def test_a_new_client_may_accept_what_a_source_has_that_expired(setting: Setting) -> None:
    setting.clock.now += 5 * DAYS
    strict, _ = accepting(setting, f"acme/other until {UNTIL}", file=False)
    with pytest.raises(MetadataExpired):
        await strict.target(MODEL, "main")
    trusted, told = accepting(setting, f"{MODEL} until {UNTIL}", file=True)
    target = await trusted.target(MODEL, "main")
    assert len(told) == 1
    assert (await trusted.file(TrustPath("timestamp", 0))).body == setting.repository.timestamp, "it serves it on"
    setting.script.acts[:] = [unavailable]
    again, _ = accepting(setting, f"{MODEL} until {UNTIL}")
    assert await again.target(MODEL, "main") == target, "and keeps it"


async def test_a_clock_that_is_behind_is_not_accepted(setting: Setting) -> None:
    await setting.trusted(file=True).target(MODEL, "main")
    setting.script.acts[:] = [unavailable]
    setting.clock.now -= DAYS
    trusted, _ = accepting(setting, f"{MODEL} until {UNTIL}")
    with pytest.raises(ClockSkew):
        await trusted.target(MODEL, "main")


@pytest.mark.parametrize(
    "text", ["", "acme/tiny", "acme/tiny until", "tiny until 2027-01-31", "acme/tiny until 2027-04-30",
             "acme/tiny@@main until 2027-01-31", "acme/tiny until 2027-02-30", "acme/* until 2027-01-31"]
)  # fmt: skip
def test_what_is_accepted_is_said_by_name_and_not_far_ahead(text: str) -> None:
    with pytest.raises(ConfigError):
        accept([text], NOW, "edge.accept_expired")
