"""The gate in front of the read surface, on a real socket: who is let through, and what those see who are not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared import log, plan
from shared.digest import Digest, digest_of
from shared.errors import KeyRevoked, NotFound, UpstreamError
from shared.keys import NodeKey
from shared.layout import Layout, Slice
from shared.manifest import Manifest, Task
from shared.metrics import Metrics
from shared.paths import BlobPath, FilePath, ModelPath, ModelsPath, TaskPath, TrustPath
from shared.rollout import NOBODY, Subject
from shared.tokens import AccessList, Right, Scope, TokenKey, issue, key_id, parse_scopes
from shared.web.access import Gate
from shared.web.middleware import make_app
from shared.web.reads import Listing, Resolved, add_routes
from shared.web.server import Runner
from tests.clock import HandClock

NOW = 1_800_000_000.0
KEY = NodeKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = NodeKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
EMPTY = Layout(0, hashlib.sha256(b"").hexdigest(), ())
SECRET, PUBLIC = "acme/secret", "acme/public"
DIGEST = digest_of(b"shard")
EVERY = ["/models/{}", "/models/{}/manifests/main", "/models/{}/manifests/" + digest_of(b"x"), "/shards/{}",
         "/shards/{}:nope@v9", "/models/{}/files/main/config.json", "/models/{}/blobs/" + DIGEST]  # fmt: skip


@dataclass
class Tier:
    """Has every model that it is asked for, and notes each time that it is asked."""

    asked: list[str] = field(default_factory=list)

    def who(self, request: web.Request) -> Subject:
        return NOBODY

    async def resolve(self, model: str, ref: str, who: Subject) -> Resolved:
        self.asked.append(model)
        if ref == "v9":
            raise NotFound("no", code="unknown_revision")
        return Resolved(Manifest(model, {}, {}, {"all": Task("all", EMPTY, "model.safetensors")}))

    async def refs(self, model: str) -> Mapping[str, Digest]:
        self.asked.append(model)
        return {}

    async def listing(self, path: ModelPath | ModelsPath) -> Listing:
        if isinstance(path, ModelsPath):
            return Listing(json.dumps({"models": [PUBLIC, SECRET, "other/secret"]}).encode())
        self.asked.append(path.model)
        return Listing(b"{}")

    async def trust(self, path: TrustPath) -> Listing:
        self.asked.append(path.role)
        return Listing(b"{}")

    def sources(self, request: web.Request, path: TaskPath) -> plan.Sources:
        return lambda _: ["http://node"]

    def bases(self, request: web.Request, path: TaskPath | FilePath) -> Sequence[str]:
        return ["http://node"]

    async def bytes(self, request: web.Request, path: TaskPath | BlobPath | FilePath) -> web.StreamResponse:
        self.asked.append(path.model)
        return web.Response(body=b"bytes", headers={"Cache-Control": "public", "Vary": "Accept"})

    async def status(self) -> Mapping[str, Any]:
        return {}

    def not_ready(self) -> str:
        return ""


@dataclass
class Network:
    """What the metadata says, and a service that goes by it."""

    access: AccessList
    tier: Tier
    clock: HandClock
    url: str = ""
    public: set[str] = field(default_factory=lambda: {PUBLIC})
    error: UpstreamError | None = None
    """Why it is not known what the metadata says."""

    async def is_public(self, model: str) -> bool:
        if self.error:
            raise self.error
        return model in self.public

    def known_public(self, model: str) -> bool:
        return model in self.public

    async def access_list(self) -> AccessList:
        if self.error:
            raise self.error
        return self.access

    async def get(self, path: str, token: str = "", **headers: str) -> tuple[int, Mapping[str, str], bytes]:
        """One request."""
        fields = {**({"Authorization": f"Bearer {token}"} if token else {}), **headers}
        async with aiohttp.ClientSession() as session, session.get(self.url + path, headers=fields) as answer:
            return answer.status, answer.headers, await answer.read()

    async def code(self, path: str, token: str = "", **headers: str) -> tuple[int, str]:
        """Status, and the code of the problem."""
        status, fields, body = await self.get(path, token, **headers)
        assert fields["Cache-Control"].endswith("no-store")
        return status, json.loads(body)["code"]


def token(*scopes: str, key: NodeKey = KEY, at: float = NOW, name: str = "t") -> str:
    """A token of 15 minutes."""
    return issue(key, parse_scopes(scopes or ["*/*:read"]), token_id=name, now=at, lifetime=900)


@pytest.fixture
async def net() -> AsyncIterator[Network]:
    """A service with one public model, which has every other one too."""
    async with serving() as made:
        yield made


@asynccontextmanager
async def serving(*, sends_on: bool = False) -> AsyncIterator[Network]:
    """One such service, or a router before it."""
    made = Network(AccessList([TokenKey(key_id(KEY.public), KEY.public)], {}), Tier(), HandClock(NOW))
    app = make_app("test", made.clock, Metrics(), log.get("test"))
    add_routes(app, made.tier, Gate(made, made.clock, sends_on=sends_on), Metrics())
    runner = Runner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


def same(answer: tuple[int, Mapping[str, str], bytes]) -> tuple[int, dict[str, str], dict[str, Any]]:
    """An answer but for what differs in any two: the request's id and the time."""
    status, fields, body = answer
    document = json.loads(body)
    del document["request_id"]
    return status, {n: v for n, v in fields.items() if n.lower() not in ("x-request-id", "date")}, document


@pytest.mark.parametrize("path", EVERY)
async def test_without_the_right_a_private_model_is_one_that_does_not_exist(net: Network, path: str) -> None:
    """T3: the same answer, and nothing was looked up for it."""
    for shown in ("", token("other/*:read"), token("acme/public:read")):
        hidden = same(await net.get(path.format(SECRET), shown))
        assert hidden == same(await net.get(path.format("acme/nothing"), shown))
        assert hidden[0] == 404 and hidden[2]["code"] == "unknown_model"
    assert net.tier.asked == []


@pytest.mark.parametrize("path", EVERY)
@pytest.mark.parametrize("scope", ["acme/secret:read", "acme/*:read", "*/*:read"])
async def test_with_the_right_it_is_there_and_for_nobody_elses_cache(net: Network, path: str, scope: str) -> None:
    for way in ("field", "query"):
        asked = path.format(SECRET) + (f"?token={token(scope)}" if way == "query" else "")
        _, fields, _ = await net.get(asked, token(scope) if way == "field" else "")
        assert net.tier.asked.pop() == SECRET and not net.tier.asked
        assert fields["Cache-Control"] == "private, no-store" and fields["Referrer-Policy"] == "no-referrer"
        assert "Authorization" in fields["Vary"]


async def test_a_token_that_is_not_good_is_refused_whatever_is_asked_for(net: Network) -> None:
    """H16."""
    net.access = net.access.with_revoked("gone", NOW, NOW + 900)
    bad = {
        "token_expired": token(at=NOW - 2_000),
        "token_invalid": token(key=OTHER),
        "token_revoked": token(name="gone"),
        "token_early": token(at=NOW + 2_000),
    }
    for path in (*(path.format(model) for path in EVERY for model in (SECRET, PUBLIC)), "/models", f"/blobs/{DIGEST}"):
        for code, shown in bad.items():
            assert await net.code(path, shown) == (401, code)
            assert await net.code(f"{path}?token={shown}") == (401, code)
    status, fields, _ = await net.get("/models", bad["token_expired"])
    assert (status, fields["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')
    assert net.tier.asked == []


@pytest.mark.parametrize("path", [path for path in EVERY if path.startswith(("/shards/", "/models/{}/files/"))])
async def test_who_only_sends_on_may_do_so_while_nobody_knows_who_may_see_it(path: str) -> None:
    """There is a gate where the client is sent. A token goes with it, and into nobody's cache."""
    async with serving(sends_on=True) as net:
        net.error = UpstreamError("away")
        for shown in ("", token(), "nonsense"):
            status, fields, body = await net.get(path.format(SECRET), shown)
            assert (status, body) == (200, b"bytes"), "what stands for the redirect"
            assert fields["Cache-Control"] == ("private, no-store" if shown else "public")
            status, _, body = await net.get(path.format(SECRET), shown, Accept="application/vnd.nearshard.plan+json")
            assert (status, body) == (200, b"bytes") or json.loads(body)["code"] == "upstream_error"
        net.error = KeyRevoked("signed by somebody else")
        assert await net.code(path.format(SECRET)) == (502, "key_revoked")


@pytest.mark.parametrize("path", EVERY)
async def test_who_answers_itself_must_know_who_may_see_it(net: Network, path: str) -> None:
    net.error = UpstreamError("away")
    assert await net.code(path.format(SECRET)) == (502, "upstream_error")
    assert net.tier.asked == []


async def test_a_token_grows_old_and_is_called_back_between_two_requests(net: Network) -> None:
    shown = token()
    assert (await net.get(f"/models/{SECRET}", shown))[0] == 200
    net.access = net.access.with_revoked("t", NOW, NOW + 900)
    assert await net.code(f"/models/{SECRET}", shown) == (401, "token_revoked")
    assert (await net.get(f"/models/{SECRET}", token(name="u")))[0] == 200
    net.clock.now += 961
    assert await net.code(f"/models/{SECRET}", token(name="u")) == (401, "token_expired")


async def test_what_is_public_is_for_all(net: Network) -> None:
    for shown in ("", token("other/*:read")):
        for path in EVERY[:6]:
            _, fields, _ = await net.get(path.format(PUBLIC), shown)
            assert net.tier.asked.pop() == PUBLIC
            assert "private, no-store" not in fields["Cache-Control"]


async def test_a_listing_names_what_the_asker_may_see(net: Network) -> None:
    for shown, names in {
        "": [PUBLIC],
        token("acme/*:read"): [PUBLIC, SECRET],
        token("other/*:read"): [PUBLIC, "other/secret"],
        token(): [PUBLIC, SECRET, "other/secret"],
    }.items():
        status, fields, body = await net.get("/models", shown)
        assert (status, json.loads(body)["models"]) == (200, names)
        assert fields["Vary"] == "Authorization"
        assert fields["Cache-Control"].startswith("private" if shown else "public")
        assert (await net.get("/models", shown, **{"If-None-Match": fields["ETag"]}))[0] == 304


async def test_what_an_organisation_keeps_private_is_signed_for_in_a_file_for_those_with_a_token(net: Network) -> None:
    path = "/trust/3.acme~private.json"
    assert await net.code(path) == (401, "token_missing")
    assert (await net.get(path))[1]["WWW-Authenticate"] == "Bearer"
    assert await net.code(path, token("other/*:read")) == (403, "forbidden")
    assert net.tier.asked == []
    for scope in ("acme/*:read", "acme/secret:read", "*/*:read"):
        status, fields, _ = await net.get(path, token(scope))
        assert (status, fields["Cache-Control"]) == (200, "private, no-store")
    for public in ("acme~public", "targets", "access", "root"):
        assert (await net.get(f"/trust/3.{public}.json"))[0] == 200


async def test_a_public_model_has_no_shards_of_its_own(net: Network) -> None:
    assert await net.code(f"/models/{PUBLIC}/blobs/{DIGEST}", token()) == (404, "unknown_blob")
    assert net.tier.asked == []


async def test_a_right_to_publish_is_none_to_read(net: Network) -> None:
    shown = issue(KEY, [Scope("*", "*", right) for right in Right if right is not Right.READ], token_id="p", now=NOW,
                  lifetime=9)  # fmt: skip
    assert await net.code(f"/models/{SECRET}", shown) == (404, "unknown_model")


@pytest.mark.parametrize(
    ("fields", "query", "status"),
    [
        ({"Authorization": "Bearer {t}"}, "?token={t}", 200),  # curl may send both after a redirect
        ({"Authorization": "bearer  {t}"}, "", 200),
        ({"Authorization": "Bearer {t}"}, "?token={u}", 400),
        ({}, "?token={t}&token={u}", 400),
        ({"Authorization": "Basic {t}"}, "", 404),
        ({"Authorization": "Bearer"}, "", 404),
        ({}, "?token=", 404),
        ({"Authorization": "Bearer x"}, "", 401),
        ({"Authorization": "Bearer {t}x"}, "", 401),
        ({}, "?token=%00", 401),
        ({}, "?Token={t}", 404),
        ({"Cookie": "token={t}"}, "", 404),
    ],
)
async def test_how_a_token_may_be_shown(net: Network, fields: dict[str, str], query: str, status: int) -> None:
    made = {"t": token(name="one"), "u": token(name="two")}
    shown = {name: value.format(**made) for name, value in fields.items()}
    assert (await net.get(f"/models/{SECRET}{query.format(**made)}", **shown))[0] == status


async def test_a_url_with_a_token_is_told_to_no_other_site(net: Network) -> None:
    assert (await net.get(f"/models/{PUBLIC}?token={token()}"))[1]["Referrer-Policy"] == "no-referrer"
    assert "Referrer-Policy" not in (await net.get(f"/models/{PUBLIC}"))[1]


async def test_a_plan_of_a_private_model_names_private_urls(net: Network) -> None:
    for accept in (plan.JSON, plan.MSGPACK):
        status, fields, _ = await net.get(f"/shards/{SECRET}", token(), Accept=accept)
        assert (status, fields["Cache-Control"]) == (200, "private, no-store")
    built = plan.build(_one_shard(), _one_shard().tasks["all"], lambda _: ["http://node"], private=True)
    assert built["shards"][0]["urls"] == [f"http://node/models/{SECRET}/blobs/{DIGEST}"]


def _one_shard() -> Manifest:
    layout = Layout(5, hashlib.sha256(b"shard").hexdigest(), (Slice(DIGEST, 0, 5),))
    return Manifest(SECRET, {DIGEST: 5}, {}, {"all": Task("all", layout, "model.safetensors")})
