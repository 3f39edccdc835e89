"""huggingface_hub as it is, newest and 0.36, with and without hf_xet, and transformers: against real services."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, NEWEST, OLDER, SECRET, Network, Program, make_hub_model
from tests.harness import Lab, Service, wait_nodes, wait_until

pytestmark = pytest.mark.timeout(600)  # the first test of each client installs it
VERSIONS = [NEWEST, OLDER]
SITES = ["north", "south"]
MakeHub = Callable[..., Program]


def same_files(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether a folder has just these."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {path: data for path, data in found.items() if not path.startswith(".cache/")} == files


@pytest.mark.parametrize("xet", [True, False])
@pytest.mark.parametrize("version", VERSIONS)
def test_hf_download_gives_the_published_files(net: Network, hub: MakeHub, version: str, xet: bool) -> None:
    client = hub(version, net.router.url, xet=xet)
    has_xet = "import importlib.util; result = importlib.util.find_spec('hf_xet') is not None"
    assert client.run(has_xet) is xet
    done = client.command("hf", "download", MODEL)
    assert done.returncode == 0, done.stderr
    snapshots = Path(client.env["HF_HOME"]) / "hub" / "models--demo--minilm" / "snapshots"
    assert [folder.name for folder in snapshots.iterdir()] == [net.commit]
    assert same_files(snapshots / net.commit, net.files())


@pytest.mark.parametrize("tier", ["origin", "edge"])
def test_one_service_alone_is_a_hub_too(net: Network, hub: MakeHub, tmp_path: Path, tier: str) -> None:
    client = hub(NEWEST, (net.origin if tier == "origin" else net.edges[0]).url)
    done = client.command("hf", "download", MODEL, "--local-dir", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    assert same_files(tmp_path / "here", net.files())


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_there_already_is_not_sent_again(net: Network, hub: MakeHub, version: str) -> None:
    client = hub(version, net.router.url)
    program = """
from huggingface_hub import hf_hub_download, snapshot_download
result = [snapshot_download(model), snapshot_download(model, revision=commit)]
result.append(hf_hub_download(model, "model.safetensors"))
"""
    first = client.run(program, model=MODEL, commit=net.commit)
    before = net.sent()
    assert client.run(program, model=MODEL, commit=net.commit) == first
    assert net.sent() == before


@pytest.mark.parametrize("version", VERSIONS)
def test_files_are_had_by_branch_commit_and_folder(net: Network, hub: MakeHub, version: str) -> None:
    program = """
from huggingface_hub import hf_hub_download, snapshot_download
def read(path): return open(path, encoding="utf-8").read()
result = {
    "main": read(hf_hub_download(model, "README.md")),
    "earlier": read(hf_hub_download(model, "README.md", revision=earlier)),
    "odd": read(hf_hub_download(model, odd)),
    "folder": read(hf_hub_download(model, odd.partition("/")[2], subfolder="onnx", revision=commit)),
    "snapshot": snapshot_download(model, revision=earlier, allow_patterns=["*.md"]),
}
"""
    told = hub(version, net.router.url).run(
        program, model=MODEL, earlier=net.earlier, commit=net.commit, odd="onnx/a b#c%+é.json"
    )
    assert (told["main"], told["earlier"], told["odd"], told["folder"]) == ("now", "before", "[1, 2, 3]", "[1, 2, 3]")
    assert same_files(Path(told["snapshot"]), {"README.md": b"before"})


@pytest.mark.parametrize("version", VERSIONS)
def test_the_api_tells_of_files_and_refs(net: Network, hub: MakeHub, version: str) -> None:
    program = """
from huggingface_hub import HfApi, get_safetensors_metadata
api = HfApi()
info, refs = api.model_info(model, files_metadata=True), api.list_repo_refs(model, include_pull_requests=True)
metadata = get_safetensors_metadata(model).files_metadata["model.safetensors"]
result = {
    "info": [info.id, info.sha, info.private, info.gated],
    "files": {s.rfilename: [s.size, s.blob_id, s.lfs.sha256] for s in info.siblings},
    "list": api.list_repo_files(model),
    "tree": {f.path: [f.size, f.blob_id, f.lfs.sha256] for f in api.list_repo_tree(model, recursive=True)
             if hasattr(f, "blob_id")},
    "folders": [f.path for f in api.list_repo_tree(model) if not hasattr(f, "blob_id")],
    "inside": [f.path for f in api.list_repo_tree(model, "onnx", revision=info.sha, expand=True)],
    "paths": [f.path for f in api.get_paths_info(model, ["onnx", "README.md", "nope"])],
    "branches": [[b.name, b.ref, b.target_commit] for b in refs.branches],
    "exists": [api.repo_exists(model), api.file_exists(model, "README.md"), api.file_exists(model, "nope"),
               api.revision_exists(model, "v9"), api.repo_exists("demo/none")],
    "tensors": {name: [t.dtype, t.shape, t.data_offsets] for name, t in metadata.tensors.items()},
}
"""
    told = hub(version, net.router.url).run(program, model=MODEL)
    files = net.files()
    assert told["info"] == [MODEL, net.commit, False, False]
    assert told["files"] == told["tree"]
    assert {path: (size, sha256) for path, (size, _, sha256) in told["files"].items()} == {
        path: (len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items()
    }
    assert sorted(told["list"]) == sorted(files)
    assert (told["folders"], told["inside"]) == (["onnx"], ["onnx/a b#c%+é.json"])
    assert told["paths"] == ["README.md", "onnx"]
    assert told["branches"] == [["main", "refs/heads/main", net.commit]]
    assert told["exists"] == [True, True, False, False, False]
    (length,) = struct.unpack("<Q", files["model.safetensors"][:8])
    header = json.loads(files["model.safetensors"][8 : 8 + length])
    header.pop("__metadata__")
    assert told["tensors"] == {name: [t["dtype"], t["shape"], t["data_offsets"]] for name, t in header.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_file_system_reads_anywhere(net: Network, hub: MakeHub, version: str) -> None:
    program = """
import hashlib
from huggingface_hub import HfFileSystem
fs = HfFileSystem()
with fs.open(f"{model}/model.safetensors", block_size=1 << 20) as file:
    file.seek(5_000_000)
    middle = file.read(3_000_000)
    file.seek(-7, 2)
    last = file.read()
result = {
    "ls": sorted(fs.ls(model, detail=False)),
    "glob": fs.glob(f"{model}/**/*.json"),
    "middle": hashlib.sha256(middle).hexdigest(),
    "last": last.hex(),
    "text": fs.read_text(f"{model}@{earlier}/README.md"),
}
"""
    told = hub(version, net.router.url).run(program, model=MODEL, earlier=net.earlier)
    weights = net.files()["model.safetensors"]
    assert told["middle"] == hashlib.sha256(weights[5_000_000:8_000_000]).hexdigest()
    assert (told["last"], told["text"]) == (weights[-7:].hex(), "before")
    assert f"{MODEL}/onnx" in told["ls"] and f"{MODEL}/onnx/a b#c%+é.json" in told["glob"]


ERRORS = """
import huggingface_hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
def name(call, *words, **more):
    try:
        call(*words, **more)
    except Exception as error:
        return type(error).__name__
result = {
    "model": name(hf_hub_download, "demo/none", "config.json"),
    "bare": name(hf_hub_download, "gpt2", "config.json"),
    "private": name(hf_hub_download, secret, "config.json"),
    "ref": name(hf_hub_download, model, "config.json", revision="v9"),
    "commit": name(hf_hub_download, model, "config.json", revision="ab" * 20),
    "file": name(hf_hub_download, model, "nope.json"),
    "folder": name(lambda: list(HfApi().list_repo_tree(model, "nope"))),
    "info": name(HfApi().model_info, "demo/none"),
    "dataset": name(HfApi().dataset_info, model),
    "snapshot": name(snapshot_download, "demo/none"),
    "snapshot of a ref": name(snapshot_download, model, revision="v9"),
}
"""


@pytest.mark.parametrize(("version", "entry"), [(NEWEST, "RemoteEntryNotFoundError"), (OLDER, "EntryNotFoundError")])
def test_errors_are_those_that_a_program_catches(net: Network, hub: MakeHub, version: str, entry: str) -> None:
    client = hub(version, net.router.url)
    told = client.run(ERRORS, model=MODEL, secret=SECRET)
    repository, revision = "RepositoryNotFoundError", "RevisionNotFoundError"
    assert told == {
        "model": repository, "bare": repository, "private": repository, "ref": revision, "commit": revision,
        "file": entry, "folder": entry, "info": repository, "dataset": repository, "snapshot": repository,
        "snapshot of a ref": revision,
    }  # fmt: skip
    marker = f"models--demo--minilm/.no_exist/{net.commit}/nope.json"
    assert (Path(client.env["HF_HOME"]) / "hub" / marker).exists(), "it need not ask for this file again"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_private_model_is_downloaded_with_a_token_of_ours(net: Network, hub: MakeHub, version: str) -> None:
    token = net.lab.token(f"{SECRET}:read")
    done = hub(version, net.router.url, HF_TOKEN=token).command("hf", "download", SECRET)
    assert done.returncode == 0, done.stderr
    again = hub(version, net.router.url, HF_TOKEN=net.lab.token("demo/other:read")).command(
        "hf", "download", SECRET, "--local-dir", "/nonexistent"
    )
    assert again.returncode != 0 and token not in again.stderr
    expired = net.lab.token(f"{SECRET}:read", ttl=60, ago=500)
    program = "from huggingface_hub import HfApi\ntry: HfApi().model_info(m)\nexcept Exception as e: result = str(e)"
    assert "expired" in hub(version, net.router.url, HF_TOKEN=expired).run(program, m=SECRET)


@pytest.mark.parametrize("version", VERSIONS)
def test_whoever_is_logged_in_at_the_hub_has_public_models_all_the_same(
    net: Network, hub: MakeHub, version: str
) -> None:
    client = hub(version, net.router.url, HF_TOKEN="hf_AbCdEfGhIjKlMnOpQrStUvWxYz")
    assert client.command("hf", "download", MODEL, "README.md").returncode == 0


def test_transformers_loads_a_configuration_and_a_tokenizer(net: Network, hub: MakeHub) -> None:
    program = """
from transformers import AutoConfig, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(model)
result = [AutoConfig.from_pretrained(model).hidden_size, tokenizer("near shard far")["input_ids"]]
"""
    assert hub(NEWEST, net.router.url).run(program, model=MODEL) == [48, [1, 2, 0]]


@dataclass
class TwoSites:
    """A region with one node, which clients are sent to, and another one with the next."""

    router: Service
    near: Service
    data: bytes
    """Of ``model.safetensors``."""


@pytest.fixture
def sites(lab: Lab, tmp_path: Path, redis_url: str) -> TwoSites:
    """The link of each is slow enough to do something meanwhile."""
    make_hub_model(tmp_path / "model")
    lab.publish(tmp_path / "model", MODEL)
    origin = lab.origin()
    prefix = f"{tmp_path.name}:"
    router = lab.router(origin, redis=redis_url, redis_prefix=prefix, default_region="north")
    near, _ = (lab.edge(origin, router=router, node=region, region=region, link_rate="6MB") for region in SITES)
    wait_nodes(router, 2)
    return TwoSites(router, near, (tmp_path / "model" / "model.safetensors").read_bytes())


@pytest.mark.parametrize("version", [NEWEST, pytest.param(OLDER, marks=pytest.mark.long)])
def test_an_edge_that_dies_in_the_middle(sites: TwoSites, hub: MakeHub, version: str, tmp_path: Path) -> None:
    """The newest client asks the router again, which sends it to another node. 0.36 takes the end of a connection for
    the end of the download, and goes on with what it has when it is run again."""
    client = hub(version, sites.router.url)
    words = client.words("hf", "download", MODEL, "model.safetensors", "--local-dir", str(tmp_path / "here"))
    with subprocess.Popen(words, env=client.environment(), text=True, stderr=subprocess.PIPE) as running:
        try:
            wait_until(lambda: sum(sites.near.status()["sent_bytes"].values()) > 12 << 20, "a third of it sent", 60)
            assert running.poll() is None
            sites.near.kill()
            _, said = running.communicate(timeout=90)
        finally:
            running.kill()
    if version == OLDER:
        assert running.returncode != 0, said
        again = subprocess.run(words, env=client.environment(), capture_output=True, timeout=90, check=False)
        assert again.returncode == 0, again.stderr
    else:
        assert running.returncode == 0, said
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == sites.data


@pytest.mark.parametrize("version", [NEWEST, pytest.param(OLDER, marks=pytest.mark.long)])
def test_an_edge_that_is_gone_is_passed_over(sites: TwoSites, hub: MakeHub, version: str, tmp_path: Path) -> None:
    """The router does not know it yet: the client asks again."""
    sites.near.kill()
    words = ("download", MODEL, "model.safetensors", "--local-dir", str(tmp_path / "here"))
    done = hub(version, sites.router.url).command("hf", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == sites.data
