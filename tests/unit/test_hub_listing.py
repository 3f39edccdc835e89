"""What another hub says of a model, and what is taken of it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from origin.hub_listing import (
    EXCLUDED,
    HubFile,
    bytes_path,
    check_bytes,
    info_path,
    is_repo,
    is_revision_name,
    parse_revision,
    without,
)
from shared.errors import IntegrityError, UpstreamError

SHA256 = hashlib.sha256(b"x").hexdigest()


def listing(*paths: str, **fields: Any) -> bytes:
    """A hub's answer with these files."""
    siblings = [{"rfilename": path, "size": 1} for path in paths]
    return json.dumps({"id": "Acme/Tiny", "sha": "1" * 40, "siblings": siblings, **fields}).encode()


def test_files_sizes_and_the_digests_that_there_are() -> None:
    lfs = {"rfilename": "a b/model.safetensors", "size": 130, "lfs": {"sha256": SHA256, "size": 7, "pointerSize": 130}}
    found = parse_revision(listing(siblings=[lfs, {"rfilename": "config.json", "size": 3}]))
    assert found.files == (HubFile("a b/model.safetensors", 7, SHA256), HubFile("config.json", 3))
    assert (found.size, found.restricted) == (10, False)
    assert bytes_path(found, "a b/model.safetensors") == f"/Acme/Tiny/resolve/{'1' * 40}/a%20b/model.safetensors"
    assert info_path("acme/tiny", "refs/pr/1").endswith("/revision/refs%2Fpr%2F1?blobs=true")


@pytest.mark.parametrize("fields", [{"private": True}, {"gated": "manual"}, {"gated": "auto"}])
def test_what_is_not_for_everybody_there(fields: dict[str, Any]) -> None:
    assert parse_revision(listing("config.json", **fields)).restricted


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b"null", listing("../x"), listing("/x"), listing("a//b"), listing("x", "X"),
        listing("x", sha="main"), listing("x", id="../x"), listing("x", id=7), listing(siblings=None),
        listing(siblings=[{"rfilename": "x"}]), listing(siblings=[{"rfilename": "x", "size": -1}]),
        listing(siblings=[{"rfilename": "x", "size": True}]),
        listing(siblings=[{"rfilename": "x", "size": 1, "lfs": {"sha256": "zz", "size": 1}}]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_an_error_of_the_hub(data: bytes) -> None:
    with pytest.raises(UpstreamError):
        parse_revision(data)


def test_pickles_are_left_out() -> None:
    found = parse_revision(listing("model.safetensors", "pytorch_model.bin", "x/pytorch_model-1.bin", "o.pt"))
    assert [file.path for file in without(found, EXCLUDED).files] == ["model.safetensors"]
    with pytest.raises(UpstreamError, match="pickles"):
        without(parse_revision(listing("pytorch_model.bin")), EXCLUDED)


def test_bytes_are_those_that_were_named() -> None:
    check_bytes(HubFile("x", 1, SHA256), 1, SHA256)
    check_bytes(HubFile("x", 1), 1, "00" * 32)
    for file, size, digest in ((HubFile("x", 1, SHA256), 1, "00" * 32), (HubFile("x", 2), 1, SHA256)):
        with pytest.raises(IntegrityError):
            check_bytes(file, size, digest)


def test_names() -> None:
    assert is_repo("gpt2") and is_repo("Qwen/Qwen3-8B") and is_revision_name("refs/pr/1") and is_revision_name("v1.0")
    assert not any(map(is_repo, ("", "a/b/c", "../x", "a b", "a/", "/a", "a?b")))
    assert not any(map(is_revision_name, ("", "../x", "a b", "a?b", "a//b", "/a")))
