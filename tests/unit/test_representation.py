"""Representations: what is sent of a manifest, under which type and for how long."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator

import pytest

from shared.digest import digest_of
from shared.errors import NotFound
from shared.ids import TaskId
from shared.layout import Layout, Slice
from shared.manifest import Manifest, Task
from shared.paths import FilePath, TaskPath
from shared.representation import BINARY, IMMUTABLE, REVALIDATE, disposition, of_blob, of_path

SHARD = digest_of(b"shard")
SHA = "00" * 32
MODEL = "acme/minilm"


def manifest(path: str = "config.json", filename: str = "model.safetensors") -> Manifest:
    """A model of one file and one task."""
    file = Layout(10, SHA, (Slice(SHARD, 0, 10),))
    return Manifest(MODEL, {SHARD: 20}, {path: file}, {"all": Task("all", Layout(0, SHA, ()), filename)})


def test_a_shard_is_immutable_and_its_own_name() -> None:
    shown = of_blob(SHARD, 20)
    assert shown.layout == Layout(20, SHARD[7:], (Slice(SHARD, 0, 20),))
    assert (shown.content_type, shown.cache_control, shown.revision) == (BINARY, IMMUTABLE, None)
    assert "Nearshard-Revision" not in shown.headers()


def test_a_file_is_its_layout_under_its_last_name() -> None:
    model = manifest("text/config.json")
    shown = of_path(FilePath(MODEL, "main", "text/config.json"), model)
    assert (shown.layout, shown.filename, shown.revision) == (
        model.files["text/config.json"],
        "config.json",
        model.revision,
    )


def test_a_task_is_its_layout_under_the_name_of_its_body() -> None:
    model = manifest(filename="weights.gguf")
    shown = of_path(TaskPath(TaskId(MODEL)), model)
    assert (shown.layout, shown.filename, shown.content_type) == (model.tasks["all"].layout, "weights.gguf", BINARY)


@pytest.mark.parametrize(("ref", "lifetime"), [("main", REVALIDATE), (SHARD, IMMUTABLE)])
def test_what_is_named_by_revision_lives_forever_and_what_is_named_by_ref_is_revalidated(
    ref: str, lifetime: str
) -> None:
    assert of_path(FilePath(MODEL, ref, "config.json"), manifest()).cache_control == lifetime
    assert of_path(TaskPath(TaskId(MODEL, "all", ref)), manifest()).cache_control == lifetime


def test_the_fields_of_every_answer_name_version_digest_and_lifetime() -> None:
    model = manifest()
    assert of_path(FilePath(MODEL, "main", "config.json"), model).headers() == {
        "ETag": f'"{SHA}"',
        "Cache-Control": REVALIDATE,
        "Repr-Digest": "sha-256=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:",
        "Digest": "SHA-256=AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "Accept-Ranges": "bytes",
        "Nearshard-Revision": model.revision,
    }


@pytest.mark.parametrize("path", [FilePath(MODEL, "main", "other"), TaskPath(TaskId(MODEL, "other"))])
def test_what_the_manifest_does_not_have_is_not_found(path: FilePath | TaskPath) -> None:
    with pytest.raises(NotFound):
        of_path(path, manifest())


TYPES = [
    ("config.json", "application/json"),
    ("vocab.txt", "text/plain"),
    ("README.md", "text/markdown"),
    ("model.safetensors", BINARY),
    ("model.gguf", BINARY),
    ("weights", BINARY),
    ("index.html", BINARY),
    ("page.xhtml", BINARY),
    ("logo.svg", BINARY),
    ("code.js", BINARY),
    ("code.py", BINARY),
    ("style.css", BINARY),
    ("config.json.gz", BINARY),
    ("vocab.txt.xz", BINARY),
]


@pytest.mark.parametrize(("name", "content_type"), TYPES)
def test_only_what_is_plain_text_has_a_type_of_its_own(name: str, content_type: str) -> None:
    assert of_path(FilePath(MODEL, "main", name), manifest(name)).content_type == content_type


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without files such as /etc/mime.types."""
    with monkeypatch.context() as patch:
        patch.setattr(mimetypes, "knownfiles", [])
        mimetypes.init()
        yield
    mimetypes.init()


@pytest.mark.parametrize(("name", "content_type"), TYPES)
def test_a_type_does_not_depend_on_the_machine(bare_machine: None, name: str, content_type: str) -> None:
    test_only_what_is_plain_text_has_a_type_of_its_own(name, content_type)


@pytest.mark.parametrize(
    ("filename", "field"),
    [
        ("model.gguf", 'attachment; filename="model.gguf"'),
        ("a b.gguf", 'attachment; filename="a b.gguf"'),
        ('a"b\\.gguf', "attachment; filename=\"ab.gguf\"; filename*=UTF-8''a%22b%5C.gguf"),
        ("modèle.gguf", "attachment; filename=\"modle.gguf\"; filename*=UTF-8''mod%C3%A8le.gguf"),
    ],
)
def test_a_name_is_said_in_ascii_and_where_that_is_not_all_of_it_in_utf_8(filename: str, field: str) -> None:
    """RFC 6266 §4.3, Appendix D."""
    assert disposition(filename) == field
