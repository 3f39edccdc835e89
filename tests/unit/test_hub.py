"""What the clients of other hubs are told, held to what Git and Git LFS make of the same files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import hub
from shared.digest import digest_of, hex_of
from shared.errors import NotFound
from shared.layout import Layout, Slice
from shared.manifest import Manifest

DATA = {
    "config.json": b"{}",
    "empty": b"",
    "onnx/a b#c%.json": b"[1]",
    "onnx.txt": b"sorts before the folder for Git",
    "onnx/deep/model.onnx": bytes(range(256)),
    "ÿ/é.txt": b"not ASCII",
}


def layout(data: bytes) -> Layout:
    """Of a file that is one shard."""
    slices = (Slice(digest_of(data), 0, len(data)),) if data else ()
    return Layout(len(data), hex_of(digest_of(data)), slices)


MANIFEST = Manifest(
    "acme/tiny",
    {digest_of(data): len(data) for data in DATA.values() if data},
    {path: layout(data) for path, data in DATA.items()},
    {},
)
SECOND = digest_of(b"second")


def test_object_ids_are_those_that_git_gives(tmp_path: Path, need: Callable[[str], str]) -> None:
    """A real repository with the pointers in it: the oid of each file and folder, and the pointers' sizes."""
    git = need("git")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

    def run(*words: str) -> str:
        done = subprocess.run([git, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    run("init", "--quiet")
    for path, data in DATA.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(hub.pointer(layout(data)))
    run("add", ".")
    shown: dict[str, tuple[str, int | None]] = {}
    for line in run("ls-tree", "-r", "-t", "-l", "-z", run("write-tree").strip()).split("\0")[:-1]:
        fields, path = line.split("\t")
        _, _, oid, size = fields.split()
        shown[path] = oid, None if size == "-" else int(size)
    told = hub.tree(MANIFEST, "", recursive=True)
    assert {item["path"]: (item["oid"], item.get("lfs", {}).get("pointerSize")) for item in told} == shown


def test_a_pointer_is_as_git_lfs_writes_it() -> None:
    """The example of its specification."""
    sha256 = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
    assert hub.pointer(Layout(12345, sha256, ())) == (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + sha256.encode() + b"\nsize 12345\n"
    )


def test_a_folder_has_one_level_or_all() -> None:
    def paths(folder: str, *, recursive: bool) -> list[str]:
        return [item["path"] for item in hub.tree(MANIFEST, folder, recursive=recursive)]

    assert paths("", recursive=False) == ["config.json", "empty", "onnx", "onnx.txt", "ÿ"]
    assert paths("onnx", recursive=False) == ["onnx/a b#c%.json", "onnx/deep"]
    assert paths("onnx", recursive=True) == ["onnx/a b#c%.json", "onnx/deep", "onnx/deep/model.onnx"]
    assert set(DATA) < set(paths("", recursive=True))
    for missing in ("onn", "config.json", "onnx/deep/model.onnx", "x/y"):
        with pytest.raises(NotFound) as raised:
            paths(missing, recursive=False)
        assert raised.value.error_code == "unknown_file"


def test_files_say_their_size_and_hash_everywhere_alike() -> None:
    info = hub.model_info(MANIFEST, blobs=True, private=False)
    assert info["sha"] == MANIFEST.revision[7:47] and info["id"] == "acme/tiny"
    tree = {item["path"]: item for item in hub.tree(MANIFEST, "", recursive=True) if item["type"] == "file"}
    assert [sibling["rfilename"] for sibling in info["siblings"]] == list(DATA)
    files = hub.modelscope_files(MANIFEST, "", recursive=True)["Files"]
    scope = {item["Path"]: item for item in files if item["Type"] == "blob"}
    for sibling in info["siblings"]:
        path = sibling["rfilename"]
        item, sha256 = tree[path], hex_of(digest_of(DATA[path]))
        assert sibling["size"] == item["size"] == scope[path]["Size"] == len(DATA[path])
        assert sibling["lfs"]["sha256"] == item["lfs"]["oid"] == scope[path]["Sha256"] == sha256
        assert sibling["blobId"] == item["oid"]
        assert sibling["lfs"]["pointerSize"] == item["lfs"]["pointerSize"] == len(hub.pointer(layout(DATA[path])))
    assert "size" not in hub.model_info(MANIFEST, blobs=False, private=True)["siblings"][0]


def test_paths_that_are_not_there_are_left_out() -> None:
    told = hub.paths_info(MANIFEST, ["config.json", "nope", "onnx/", "../etc/passwd"])
    assert [(item["path"], item["type"]) for item in told] == [("config.json", "file"), ("onnx", "directory")]


def test_refs_are_branches_at_commits() -> None:
    told = hub.refs_info({"main": MANIFEST.revision, "v2": SECOND}, pull_requests=False)
    assert told["branches"] == [
        {"name": "main", "ref": "refs/heads/main", "targetCommit": MANIFEST.commit},
        {"name": "v2", "ref": "refs/heads/v2", "targetCommit": SECOND[7:47]},
    ]
    assert "pullRequests" not in told
    assert hub.refs_info({}, pull_requests=True)["pullRequests"] == []


def test_the_default_of_modelscope_is_ours_unless_a_ref_is_called_so() -> None:
    assert hub.modelscope_ref("master", {"main": SECOND}) == "main"
    assert hub.modelscope_ref("master", {"main": SECOND, "master": SECOND}) == "master"
    assert hub.modelscope_ref("v2", {"main": SECOND}) == "v2"
    named = hub.modelscope_revisions({"main": SECOND})["RevisionMap"]["Branches"]
    assert [branch["Revision"] for branch in named] == ["main", "master"]


@pytest.mark.parametrize("text", ["gpt2", "a/b/c", "", "a/../b", "org/"])
def test_what_cannot_be_a_model_is_a_model_that_is_not_there(text: str) -> None:
    with pytest.raises(NotFound) as raised:
        hub.model_named(text)
    assert raised.value.error_code == "unknown_model"


@pytest.mark.parametrize("text", ["refs/pr/1", "Main", "ab" * 32, "sha256:12", "", "../x", "AB" * 20])
def test_what_cannot_be_a_ref_is_a_revision_that_is_not_there(text: str) -> None:
    with pytest.raises(NotFound) as raised:
        hub.ref_named(text)
    assert raised.value.error_code == "unknown_revision"
    assert [hub.ref_named(ref) for ref in ("main", "ab" * 20, SECOND)] == ["main", "ab" * 20, SECOND]


def test_capital_letters_of_other_hubs_are_small_ones_here() -> None:
    assert hub.model_named("Qwen/Qwen3-8B") == "qwen/qwen3-8b"
