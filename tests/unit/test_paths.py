"""The read surface: which path asks for what, and that every path has one spelling."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.digest import Digest, digest_of
from shared.errors import BadId, ManifestInvalid, NotFound
from shared.ids import TaskId
from shared.manifest import MAX_PATH, check_path
from shared.paths import (
    BlobPath,
    FilePath,
    ManifestPath,
    ModelPath,
    ModelsPath,
    ReadPath,
    TaskPath,
    TrustPath,
    blob_path,
    decode_path,
    file_path,
    manifest_path,
    parse_path,
    task_path,
    trust_path,
)
from tests.unit.strategies import digests, models, quick, refs, task_ids

REVISION = digest_of(b"")


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("/shards/acme/minilm", TaskPath(TaskId("acme/minilm"))),
        ("/shards/acme/minilm:embed@v2?x=1", TaskPath(TaskId("acme/minilm", "embed", "v2"))),
        ("/shards/acme/minilm%3Aembed%40v2", TaskPath(TaskId("acme/minilm", "embed", "v2"))),
        (f"/blobs/{REVISION}", BlobPath(REVISION)),
        (f"/models/acme/tiny/blobs/{REVISION}", BlobPath(REVISION, "acme/tiny")),
        ("/trust/timestamp.json", TrustPath("timestamp", 0)),
        ("/trust/12.acme~private.json", TrustPath("acme~private", 12)),
        ("/models", ModelsPath()),
        ("/models/acme/minilm", ModelPath("acme/minilm")),
        ("/models/acme/minilm/manifests/main", ManifestPath("acme/minilm", "main")),
        (f"/models/acme/minilm/manifests/{REVISION}", ManifestPath("acme/minilm", REVISION)),
        ("/models/acme/minilm/files/main/config.json", FilePath("acme/minilm", "main", "config.json")),
        ("/models/acme/minilm/files/v2/unet/a%20b.bin", FilePath("acme/minilm", "v2", "unet/a b.bin")),
        ("/models/acme/minilm/files/main/%C3%A9", FilePath("acme/minilm", "main", "é")),
        ("/models/acme/minilm/files/main/100%2525", FilePath("acme/minilm", "main", "100%25")),  # decoded once
    ],
)
def test_a_path_says_what_it_asks_for(raw: str, path: ReadPath) -> None:
    assert parse_path(raw) == path


@quick
@given(task_ids)
def test_the_path_of_a_task_leads_to_it(task_id: TaskId) -> None:
    assert parse_path(task_path(task_id)) == TaskPath(task_id)


@quick
@given(digests)
def test_the_path_of_a_shard_leads_to_it(digest: Digest) -> None:
    assert parse_path(blob_path(digest)) == BlobPath(digest)


@quick
@given(digests, models)
def test_the_path_of_a_private_shard_names_its_model(digest: Digest, model: str) -> None:
    assert parse_path(blob_path(digest, model)) == BlobPath(digest, model)


@quick
@given(models, refs)
def test_the_path_of_a_manifest_leads_to_it(model: str, ref: str) -> None:
    assert parse_path(manifest_path(model, ref)) == ManifestPath(model, ref)


@quick
@given(models, refs, st.text(min_size=1) | st.text("a/.%é ~", min_size=1))
def test_the_path_of_any_file_that_a_manifest_can_hold_leads_to_it(model: str, ref: str, path: str) -> None:
    try:
        check_path(path)
    except ManifestInvalid:
        return
    assert parse_path(file_path(model, ref, path)) == FilePath(model, ref, path)


@pytest.mark.parametrize("letter", ["a", "é", "字"])
def test_the_longest_file_path_that_a_manifest_can_hold_can_be_asked_for(letter: str) -> None:
    path = letter * (MAX_PATH // len(letter.encode()))
    model = "a/" + "b" * 126
    assert parse_path(file_path(model, REVISION, check_path(path))) == FilePath(model, REVISION, path)


@pytest.mark.parametrize(
    "raw",
    [
        "/shards/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/shards/..%2f..%2fetc/passwd", "/shards/../../etc/passwd",
        "/shards/%2e%2e/%2e%2e/etc/passwd", "/shards/acme/./minilm", "/shards/acme/%2E", "/shards/acme%2fminilm",
        "/shards/acme%2Fminilm", "/shards/acme%5cminilm", "/shards/acme\\minilm",
        "/shards/acme/minilm%00", "/shards/acme/minilm%0d%0aX:1", "/shards/acme/minilm\r\n", "/shards/acme/minilm%0a",
        "/shards/acme/minilm%zz", "/shards/acme/minilm%", "/shards/acme/minilm%4", "/shards/acme/%ff",
        "/shards/acme/%c3", "/shards/acme/%c0%ae", "/shards/acme/%ed%a0%80", "/shards/acme/%7f",
        "/shards/acme/%e2%80%ae",
        "//shards/acme/minilm", "/shards//acme/minilm", "/shards/acme//minilm", "/shards/acme/minilm/", "//",
        "shards/acme/minilm", "http://other/shards/acme/minilm", "/shards/acme/é", "/shards/acme/mini lm",
        "/shards/acme/minilm#x", "/shards/acme/minilm\x00",
    ],
)  # fmt: skip
def test_a_path_that_is_not_canonical_is_a_bad_id(raw: str) -> None:
    for parse in (decode_path, parse_path):
        with pytest.raises(BadId):
            parse(raw)


@pytest.mark.parametrize("raw", ["", "?x"])
def test_no_path_at_all_is_refused(raw: str) -> None:
    with pytest.raises((BadId, NotFound)):
        parse_path(raw)


@pytest.mark.parametrize(
    "digest",
    [
        REVISION.upper(), f"sha256:{REVISION[7:].upper()}", REVISION[:-1], REVISION + "0", f"md5:{REVISION[7:]}",
        REVISION[7:], "a" * 10_240,
    ],
)  # fmt: skip
def test_a_shard_has_one_spelling(digest: str) -> None:
    for raw in (f"/blobs/{digest}", f"/models/acme/minilm/manifests/{digest}"):
        with pytest.raises(BadId):
            parse_path(raw)


@pytest.mark.parametrize("raw", ["/shards/a/" + "b" * 10_240, "/models/a/b/files/main/" + "c" * 10_240])
def test_a_path_has_an_end(raw: str) -> None:
    with pytest.raises(BadId):
        parse_path(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "/models/a/b/files/main/..%20", "/models/a/b/files/main/x%3Ay", "/models/a/b/files/main/con.txt",
        "/models/a/b/files/main/x.", "/models/a/b/files/main/x%22",
    ],
)  # fmt: skip
def test_a_file_path_that_no_manifest_can_hold_is_a_bad_id(raw: str) -> None:
    with pytest.raises(BadId):
        parse_path(raw)


@pytest.mark.parametrize(
    "raw",
    [
        "/x", "/shards", "/blobs", "/shards2/a/b", "/Shards/a/b", "/modelsx", f"/blobs/{REVISION}/x", "/models/a/b/c",
        "/models/a/b/manifests", "/models/a/b/manifests/main/x", "/models/a/b/files", "/models/a/b/files/main",
    ],
)  # fmt: skip
def test_a_path_outside_the_surface_is_not_found(raw: str) -> None:
    with pytest.raises(NotFound):
        parse_path(raw)


@pytest.mark.parametrize("raw", ["/shards/", "/blobs/"])
def test_an_empty_id_is_not_found(raw: str) -> None:
    with pytest.raises(NotFound):
        parse_path(raw)


def test_the_query_is_no_part_of_the_path() -> None:
    assert decode_path("/shards/a/b?x=/../%00%zz#") == "/shards/a/b"


SOUP = st.lists(
    st.sampled_from(
        [
            "/",
            "shards",
            "blobs",
            "models",
            "manifests",
            "files",
            "a",
            "b",
            ":",
            "@",
            REVISION,
            "%2f",
            "%41",
            "%6d",
            ".",
            "é",
        ]
    ),
    max_size=12,
).map("".join)


@quick
@given(
    st.text()
    | SOUP
    | SOUP.map("/shards/a/b".__add__)
    | SOUP.map("/models/a/b/files/main/".__add__)
    | SOUP.map("/trust/1.".__add__)
)
def test_any_text_is_a_path_a_bad_id_or_not_found_and_what_is_accepted_has_one_canonical_path(raw: str) -> None:
    try:
        path = parse_path(raw)
    except (BadId, NotFound):
        return
    assert parse_path(canonical(path)) == path


def canonical(path: ReadPath) -> str:
    """The one path that we ourselves would ask for it."""
    match path:
        case TaskPath(task_id):
            return task_path(task_id)
        case BlobPath(digest, model):
            return blob_path(digest, model)
        case ManifestPath(model, ref):
            return manifest_path(model, ref)
        case FilePath(model, ref, name):
            return file_path(model, ref, name)
        case ModelPath(model):
            return f"/models/{model}"
        case ModelsPath():
            return "/models"
        case TrustPath(role, version):
            return trust_path(role, version)
