"""A mirror, seen by the hub's own client: single files are passed on while they are stored; and a second network of
nearshard as the hub."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.e2e.test_mirror import NAME, ONE, TWO, blocking, get, mirror, until_there
from tests.harness import Lab, get_json, make_model, wait_until
from tests.hub_script import asked_files, for_files, put_model
from tests.scripted import Script, broken_off, flipped_at, held_after, serve_whole, source, unavailable

DOWNLOAD = (
    "import sys; from huggingface_hub import snapshot_download;"
    "print(snapshot_download(sys.argv[1], revision=sys.argv[2] or None))"
)


def download(endpoint: str, home: Path, name: str = NAME, revision: str = "") -> Path:
    """A model by the hub's own client, in a process of its own; the folder of its snapshot."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", DOWNLOAD, name, revision], capture_output=True, text=True, env=env, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def same(folder: Path, model: Path) -> None:
    """Whether a snapshot has the files of a model, byte for byte."""
    for file in (path for path in model.iterdir() if path.name != "nearshard.toml"):
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


async def test_files_are_passed_on_while_they_are_stored(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    async with source(Script(acts=[for_files(held_after(len(data) - 1000))])) as hub, aiohttp.ClientSession() as http:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)
        router = await blocking(lab.router, origin)
        for service in (origin, router):
            async with http.get(f"{service.url}/api/models/{NAME}") as answer:
                info = await answer.json()
                assert (answer.status, info["sha"]) == (200, ONE)
                assert {entry["rfilename"] for entry in info["siblings"]} == {
                    "config.json", "model.safetensors", "tokenizer.json",
                }  # fmt: skip
            async with http.get(f"{service.url}/api/models/{NAME}/tree/{ONE}?recursive=true") as answer:
                assert "xet" not in (await answer.text()).lower()
            async with http.head(f"{service.url}/{NAME}/resolve/{ONE}/model.safetensors") as answer:
                assert answer.headers["ETag"] == f'"{hashlib.sha256(data).hexdigest()}"'
                assert (answer.headers["X-Repo-Commit"], answer.headers["Content-Length"]) == (ONE, str(len(data)))
                assert not [name for name in answer.headers if "xet" in name.lower()]
            async with http.get(f"{service.url}/{NAME}/resolve/{ONE}/config.json") as answer:
                assert await answer.read() == b'{"layers": 3}'
            async with http.get(f"{service.url}/{NAME}/resolve/{ONE}/no.such") as answer:
                assert (answer.status, answer.headers["X-Error-Code"]) == (404, "EntryNotFound")
        url = f"{router.url}/{NAME}/resolve/main/model.safetensors"
        async with http.get(url) as one, http.get(url, headers={"Range": "bytes=100-"}) as two:
            assert len(await one.content.readexactly(1 << 20)) == 1 << 20, "bytes come before all is here"
            assert len(await two.content.readexactly(1 << 20)) == 1 << 20
            assert NAME not in (await blocking(get_json, f"{origin.url}/models"))["models"]
            hub.release.set()
            assert len(await one.content.read()) and (await two.content.read())[-1] == data[-1]
        await until_there(f"{origin.url}/models/{NAME}")
        files = [(asked.path, asked.start) for asked in asked_files(hub)]
        assert len(files) == len(set(files)), "no byte is asked for twice"
        for service in (origin, router):  # a client that began before goes on after

            def known(service: Any = service) -> bool:
                return bool(get_json(f"{service.url}/api/models/{NAME}/revision/{ONE}")["sha"] == ONE)

            await blocking(wait_until, known, "the commit at the router")
            async with http.head(f"{service.url}/{NAME}/resolve/{ONE}/config.json") as answer:
                assert (answer.status, answer.headers["X-Repo-Commit"]) == (200, ONE)


async def test_the_last_byte_waits_for_the_digest(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    async with source(Script(acts=[for_files(flipped_at(5000))])) as hub, aiohttp.ClientSession() as http:
        put_model(hub, tmp_path / "model", NAME, ONE)
        origin = await blocking(mirror, lab, hub)
        url = f"{origin.url}/{NAME}/resolve/main/model.safetensors"
        got = b""
        with pytest.raises(aiohttp.ClientPayloadError):
            async with http.get(url) as answer:
                if answer.status != 200:  # it was found to be wrong before anybody read it
                    raise aiohttp.ClientPayloadError
                async for chunk in answer.content.iter_any():
                    got += chunk
        assert len(got) < len(data)
        assert (await blocking(get_json, f"{origin.url}/models"))["models"] == []


@pytest.mark.parametrize("held", [True, False])
async def test_the_hubs_client_downloads_through_a_router_of_a_mirror(lab: Lab, tmp_path: Path, held: bool) -> None:
    make_model(tmp_path / "model")
    act = broken_off(1_500_000) if held else serve_whole
    async with source(Script(acts=[for_files(act)])) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        hub.blobs.update({path.replace(NAME, "Acme/Tiny"): data for path, data in hub.blobs.items()})
        origin = await blocking(mirror, lab, hub)
        router = await blocking(lab.router, origin)
        folder = await blocking(download, router.url, tmp_path / "hf", "Acme/Tiny")
        same(folder, tmp_path / "model")
        assert folder.name == ONE, "it is known by the hub's own commit"


async def test_a_second_network_is_the_hub(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    other: Lab = await blocking(Lab, tmp_path / "elsewhere")
    try:
        sha = (await blocking(other.publish, tmp_path / "model", NAME))[7:47]
        upstream = await blocking(other.origin)
        hub = await blocking(other.router, upstream)
        await blocking(partial(other.edge, upstream, router=hub))
        origin = await blocking(mirror, lab, Script(url=hub.url), "--mirror.lifetime=0.5")
        router = await blocking(lab.router, origin)
        asking = [asyncio.create_task(blocking(download, router.url, tmp_path / f"hf{n}")) for n in range(3)]
        for folder in await asyncio.gather(*asking):
            same(folder, tmp_path / "model")
            assert folder.name == sha
        await until_there(f"{origin.url}/models/{NAME}")
        await blocking(other.close)
        same(await blocking(download, router.url, tmp_path / "away"), tmp_path / "model")
        manifest = f"{origin.url}/models/{NAME}/manifests/main"
        await blocking(wait_until, lambda: "stale" in get(manifest)[2].get("Cache-Status", ""), "marked stale")
        info = await blocking(get_json, f"{origin.url}/models/{NAME}")
        assert info["refs"]["main"]["source"] == {"hub": hub.url, "model": NAME, "commit": sha, "followed": True}
        assert json.dumps(info).count("xet") == 0
    finally:
        await blocking(other.close)


async def test_a_commit_that_a_user_pins(lab: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    async with source(Script()) as hub:
        put_model(hub, tmp_path / "model", NAME, ONE)
        (tmp_path / "model" / "config.json").write_text('{"layers": 4}')
        put_model(hub, tmp_path / "model", NAME, TWO)
        origin = await blocking(mirror, lab, hub)
        old = await blocking(download, origin.url, tmp_path / "one", NAME, ONE)
        assert (old.name, (old / "config.json").read_text()) == (ONE, '{"layers": 3}')
        new = await blocking(download, origin.url, tmp_path / "two")
        assert (new.name, (new / "config.json").read_text()) == (TWO, '{"layers": 4}')
        hub.acts[:] = [unavailable]
        again = await blocking(download, origin.url, tmp_path / "three", NAME, ONE)
        assert (again / "config.json").read_text() == '{"layers": 3}'
