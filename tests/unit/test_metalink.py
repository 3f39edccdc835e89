"""Metalinks: what is built is well-formed whatever the names, and says all that a downloader needs."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ManifestInvalid
from shared.layout import Layout, piece_count
from shared.manifest import MIN_PIECE, check_path
from shared.metalink import build
from tests.unit.strategies import hashes, quick, texts

NAMESPACE = "{urn:ietf:params:xml:ns:metalink}"
SHA = "ab" * 32


@dataclass(frozen=True)
class Read:
    """What a downloader takes from a metalink."""

    name: str
    size: int
    sha256: str
    piece_length: int
    pieces: tuple[str, ...]
    urls: tuple[tuple[int, str], ...]


def read(document: bytes) -> Read:
    """Parse by RFC 5854 §4; the only declaration is the XML one, so nothing in it can be expanded or fetched."""
    assert document.startswith(b'<?xml version="1.0" encoding="UTF-8"?>\n') and b"<!" not in document
    root = ET.fromstring(document)
    assert root.tag == f"{NAMESPACE}metalink"
    (file,) = root
    assert file.tag == f"{NAMESPACE}file"
    pieces = file.find(f"{NAMESPACE}pieces")
    (whole,) = file.findall(f"{NAMESPACE}hash")
    assert whole.get("type") == "sha-256" and (pieces is None or pieces.get("type") == "sha-256")
    return Read(
        file.get("name", ""),
        int(file.findtext(f"{NAMESPACE}size", "")),
        whole.text or "",
        int(pieces.get("length", "")) if pieces is not None else 0,
        tuple(piece.text or "" for piece in (pieces if pieces is not None else ())),
        tuple((int(url.get("priority", "")), url.text or "") for url in file.findall(f"{NAMESPACE}url")),
    )


def test_a_metalink_word_for_word() -> None:
    layout = Layout(MIN_PIECE + 1, SHA, (), bytes(32) + b"\xff" * 32)
    built = build("weights/a&b.gguf", layout, MIN_PIECE, ["http://n1:8720/shards/a/b@v", "http://o/?a&b"])
    assert built.decode() == (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<metalink xmlns="urn:ietf:params:xml:ns:metalink">\n'
        '<file name="a&amp;b.gguf">\n'
        "<size>1048577</size>\n"
        f'<hash type="sha-256">{SHA}</hash>\n'
        '<pieces length="1048576" type="sha-256">\n'
        f"<hash>{'00' * 32}</hash>\n"
        f"<hash>{'ff' * 32}</hash>\n"
        "</pieces>\n"
        '<url priority="1">http://n1:8720/shards/a/b@v</url>\n'
        '<url priority="2">http://o/?a&amp;b</url>\n'
        "</file>\n"
        "</metalink>\n"
    )


def is_path(text: str) -> bool:
    """Whether a manifest would let it be a file."""
    try:
        return bool(check_path(text))
    except ManifestInvalid:
        return False


paths = (texts | st.text("a<>&\"']]>/.é字", max_size=12)).filter(is_path)
urls = st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20), max_size=4)
lengths = st.sampled_from([MIN_PIECE, 4 * MIN_PIECE])


@quick
@given(paths, st.integers(0, 20 * MIN_PIECE), hashes, lengths, urls)
def test_what_is_built_is_what_is_read(path: str, size: int, sha256: str, length: int, named: list[str]) -> None:
    pieces = [bytes([n]) * 32 for n in range(piece_count(size, length))]
    layout = Layout(size, sha256, (), b"".join(pieces))
    found = read(build(path, layout, length, named))
    assert found == Read(
        PurePosixPath(path).name,
        size,
        sha256,
        length if pieces else 0,
        tuple(piece.hex() for piece in pieces),
        tuple(enumerate(named, 1)),
    )
    assert build(path, layout, length, named) == build(path, layout, length, list(named))


@pytest.mark.parametrize("path", ["d/model.gguf", "a/b/c/model.gguf"])
def test_a_name_leads_into_no_folder(path: str) -> None:
    assert read(build(path, Layout(1, SHA, ()), MIN_PIECE, [])).name == "model.gguf"
