"""A mirror of another hub, over real processes: what is fetched, when, how often, and what is seen of it meanwhile."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nearshard import Client
from tests.harness import Lab, Service, get_json, make_model, wait_until
from tests.hub_script import asked_files, for_files, put_model, redirecting, with_token
from tests.scripted import Script, broken_off, flipped_at, held_after, serve_whole, source, unavailable

ONE, TWO = "1" * 40, "2" * 40
NAME = "acme/tiny"


def mirror(lab: Lab, hub: Script, *words: str) -> Service:
    """An origin that mirrors a hub's ``acme/*``, by a key that may sign for that."""
    key = lab.folder / "mirror-keys" / "mirror.pem"
    if not key.exists():
        lab.trust("add-publisher", "acme", "--key-file", str(key))
    return lab.origin(f"--mirror.upstream={hub.url}", '--mirror.allow=["acme/*"]', f"--mirror.key={key}", *words)


def get(url: str, **headers: str) -> tuple[int, bytes, Any]:
    """Status, body and fields of a GET."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), error.headers


async def blocking(call: Callable[..., Any], *words: Any) -> Any:
    """A call that blocks, while the scripted hub answers."""
    return await asyncio.to_thread(call, *words)


async def until_there(url: str) -> bytes:
    """The body at a URL, once it is not being fetched any more."""

    def ask() -> bytes | None:
        status, body, _ = get(url)
        assert status in (200, 503), body
        return body if status == 200 else None

    there: bytes = await blocking(wait_until, ask, f"{url} there")
    return there


async def test_a_model_that_is_not_here_is_fetched_once_for_all_who_ask(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script(acts=[for_files(held_after(1000))])) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)
        router = await blocking(lambda: lab.router(origin, ref_lifetime="0"))  # one that is behind would be refused
        edge = await blocking(lambda: lab.edge(origin, ref_lifetime="0"))
        url = f"{origin.url}/models/{NAME}/files/main/model.safetensors"
        asking = [asyncio.create_task(blocking(get, url)) for _ in range(20)]
        await hub.holding.wait()
        for status, body, fields in await asyncio.gather(*asking):
            told = json.loads(body)
            assert (status, told["code"]) == (503, "mirroring")
            assert told["total"] > told["done"] and int(fields["Retry-After"]) >= 1
        for service in (router, edge):
            assert (await blocking(get, f"{service.url}/shards/{NAME}"))[0] == 503
        assert NAME not in (await blocking(get_json, f"{origin.url}/models"))["models"]
        hub.release.set()
        assert await until_there(url) == (tmp_path / "model" / "model.safetensors").read_bytes()
        assert len([asked for asked in hub.asked if asked.path.startswith("/api/")]) == 1
        files = [(asked.path.rpartition("/")[2], asked.start) for asked in asked_files(hub)]
        assert len(files) == len(set(files)), "no byte is asked for twice"
        assert {name for name, _ in files} == {"tokenizer.json", "config.json", "model.safetensors"}
        listing = await blocking(get_json, f"{origin.url}/models/{NAME}")
        assert listing["refs"]["main"]["source"] == {"hub": hub.url, "model": NAME, "commit": ONE, "followed": True}
        assert not list((lab.folder / "mirror").iterdir()), "what was on its way is not kept twice"
        for service in (router, edge):
            async with Client(service.url) as client:
                await client.pull(NAME, output=tmp_path / service.module)
            assert (tmp_path / service.module / "tokenizer.json").read_bytes() == (
                tmp_path / "model" / "tokenizer.json"
            ).read_bytes()


@pytest.mark.long  # half a minute, until the origin says that it is on its way
async def test_our_client_waits_for_a_model_that_is_being_fetched(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script(acts=[for_files(held_after(1000))])) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)
        router = await blocking(lab.router, origin)
        waited = []

        def waiting(error: Any) -> None:
            waited.append(error.total)
            hub.release.set()

        async with Client(router.url, waiting=waiting) as client:
            await client.get(NAME, tmp_path / "out")
        assert waited
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
            tmp_path / "model" / "model.safetensors"
        ).read_bytes()


async def test_what_is_not_allowed_is_never_asked_for(lab: Lab, tmp_path: Path) -> None:
    async with source(Script()) as hub:
        origin = await blocking(mirror, lab, hub)
        for path in ("/models/other/tiny", "/shards/other/tiny", "/models/other/tiny/manifests/main"):
            assert (await blocking(get, origin.url + path))[0] == 404
        assert hub.asked == []
        for _ in range(3):
            assert (await blocking(get, f"{origin.url}/models/acme/nothing"))[0] == 404
        assert len(hub.asked) == 1, "what the hub has not is not asked for again at once"


async def test_what_was_published_here_is_never_asked_for(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script()) as hub:
        origin = await blocking(mirror, lab, hub)
        keys = [f"--keys={folder}" for folder in (lab.keys, lab.folder / "mirror-keys")]
        await blocking(lab.publish, tmp_path / "model", NAME, *keys)
        assert (await blocking(get, f"{origin.url}/models/{NAME}"))[0] == 200
        assert (await blocking(get, f"{origin.url}/models/{NAME}/manifests/v2"))[0] == 404
        assert hub.asked == []


async def test_wrong_bytes_are_refused_and_nothing_is_published(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script(acts=[for_files(flipped_at(5000))])) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)

        def refused() -> bool:
            status, body, _ = get(f"{origin.url}/models/{NAME}")
            return status == 502 and json.loads(body)["code"] == "integrity_error"

        await blocking(wait_until, refused, "a refusal")
        assert (await blocking(get_json, f"{origin.url}/models"))["models"] == []


async def test_a_hub_that_breaks_off_is_continued(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script(acts=[serve_whole, for_files(broken_off(1_500_000))])) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)
        got = await until_there(f"{origin.url}/models/{NAME}/files/main/model.safetensors")
        assert got == (tmp_path / "model" / "model.safetensors").read_bytes()
        starts = [asked.start for asked in asked_files(hub) if asked.path.endswith(".safetensors")]
        assert len(starts) > 1 and starts == [number * 1_500_000 for number in range(len(starts))]


async def test_an_origin_that_is_killed_shows_nothing_and_goes_on(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    async with source(Script(acts=[for_files(held_after(2 << 20))])) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)
        asking = asyncio.create_task(blocking(get, f"{origin.url}/models/{NAME}"))
        await hub.holding.wait()
        await asking
        part = next((lab.folder / "mirror").rglob("model.safetensors"))
        await blocking(wait_until, lambda: part.stat().st_size >= 1 << 20, "a part on disk")
        await blocking(origin.kill)
        hub.acts[:] = [serve_whole]
        kept = part.stat().st_size
        await blocking(origin.start)
        assert (await blocking(get_json, f"{origin.url}/models"))["models"] == []
        got = await until_there(f"{origin.url}/models/{NAME}/files/main/model.safetensors")
        assert len(got) == size
        last = [asked.start for asked in asked_files(hub) if asked.path.endswith(".safetensors")][-1]
        assert last == kept


async def test_a_ref_that_moves_is_followed_and_one_that_cannot_be_asked_for_is_stale(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script()) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub, "--mirror.lifetime=0.2")
        config = f"{origin.url}/models/{NAME}/files/main/config.json"
        assert await until_there(config) == b'{"layers": 3}'
        (tmp_path / "model" / "config.json").write_text('{"layers": 4}')
        put_model(hub, tmp_path / "model", NAME, TWO)
        await blocking(wait_until, lambda: get(config)[1] == b'{"layers": 4}', "the new revision")
        big = [asked for asked in asked_files(hub) if asked.path.endswith(".safetensors")]
        assert len(big) == 1, "what is here already is not fetched again"
        hub.acts[:] = [unavailable]
        await blocking(wait_until, lambda: "stale" in get(config)[2].get("Cache-Status", ""), "marked stale")
        status, body, _ = await blocking(get, config)
        assert (status, body) == (200, b'{"layers": 4}')
        hub.acts[:] = [serve_whole]
        await blocking(wait_until, lambda: "Cache-Status" not in get(config)[2], "confirmed again")


async def test_what_a_hub_restricts_is_for_those_with_a_token(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script(acts=[with_token("hf_secret")])) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE, gated="manual")
        file = lab.folder / "hub.token"
        file.write_text("hf_secret\n")
        file.chmod(0o600)
        origin = await blocking(mirror, lab, hub, f"--mirror.token-file={file}")
        url = f"{origin.url}/models/{NAME}/files/main/config.json"
        assert (await blocking(get, url))[0] == 404
        assert not asked_files(hub), "it is not fetched for who may not have it"
        bearer = {"Authorization": f"Bearer {lab.token('acme/*:read')}"}

        def there() -> bool:
            return get(url, **bearer)[0] == 200

        await blocking(wait_until, there, "there for who has a token")
        assert (await blocking(get, url))[0] == 404


async def test_bytes_may_be_at_another_host_which_is_not_told_the_token(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script()) as store, source(Script(acts=[redirecting(store)])) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        store.blobs.update(hub.blobs)
        file = lab.folder / "hub.token"
        file.write_text("hf_secret\n")
        file.chmod(0o600)
        origin = await blocking(mirror, lab, hub, f"--mirror.token-file={file}")
        await until_there(f"{origin.url}/models/{NAME}")
        assert all("authorization" in asked.headers for asked in hub.asked)
        assert store.asked and not any("authorization" in asked.headers for asked in store.asked)


async def test_a_commit_of_the_hub_has_a_ref_and_costs_nothing_where_it_is_here(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script()) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)
        await until_there(f"{origin.url}/models/{NAME}/manifests/main")
        files = len(asked_files(hub))
        await until_there(f"{origin.url}/models/{NAME}/manifests/commit-{ONE}")
        assert len(asked_files(hub)) == files
        refs = (await blocking(get_json, f"{origin.url}/models/{NAME}"))["refs"]
        assert refs["main"]["revision"] == refs[f"commit-{ONE}"]["revision"]


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a\\b", "con", ".."])
async def test_names_that_lead_out_of_the_folder_are_refused(lab: Lab, tmp_path: Path, name: str) -> None:
    async with source(Script()) as hub:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text("{}")
        put_model(hub, tmp_path / "model", NAME, ONE)
        path = f"/api/models/{NAME}/revision/main?blobs=true"
        hub.blobs[path] = hub.blobs[path].replace(b"config.json", json.dumps(name)[1:-1].encode())
        origin = await blocking(mirror, lab, hub)
        assert (await blocking(get, f"{origin.url}/models/{NAME}"))[0] == 502
        assert not asked_files(hub)


async def test_killed_at_any_point_a_model_is_wholly_there_or_not_at_all(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model", width=1024)
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    points = ("../mirror/*~*/model.safetensors", "blobs/*/*", "gc/notes/*", f"models/{NAME}/manifests/*")
    async with source(Script()) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)
        url = f"{origin.url}/models/{NAME}/files/main/model.safetensors"
        for point in points:

            def reached(point: str = point) -> bool:
                return next(lab.store.glob(point), None) is not None

            asking = asyncio.create_task(blocking(get, url))
            await blocking(wait_until, reached, point)
            await blocking(origin.kill)
            with suppress(OSError):
                await asking
            await blocking(origin.start)
            names = (await blocking(get_json, f"{origin.url}/models"))["models"]
            assert names in ([], [NAME])
            if names:
                assert (await blocking(get, url))[1] == data
        assert await until_there(url) == data
