"""Bundles as a test wants them: of a model of one file, by metadata that the test signs."""

from __future__ import annotations

import hashlib

from shared.bundle import END, Index, entry_name, head, padding
from shared.digest import digest_of
from shared.layout import Layout, Slice
from shared.manifest import Delta, Manifest
from tests.metadata import Repository


def one_file(model: str, *shards: bytes, deltas: tuple[Delta, ...] = (), others: tuple[bytes, ...] = ()) -> Manifest:
    """A model of one file, ``w.bin``, of these shards."""
    whole = b"".join(shards)
    slices = tuple(Slice(digest_of(data), 0, len(data)) for data in shards)
    layout = Layout(len(whole), hashlib.sha256(whole).hexdigest(), slices)
    sizes = {digest_of(data): len(data) for data in shards}
    return Manifest(
        model, sizes, {"w.bin": layout}, {}, deltas=deltas, others={digest_of(data): len(data) for data in others}
    )


def bundle_of(metadata: Repository, manifest: Manifest, *blobs: bytes) -> bytes:
    """A bundle of a public model whose ``main`` is this manifest, with all metadata that is there."""
    files = {name: data for name, data in metadata.files.items() if not name.endswith("private.json")}
    parts = [("trust", data) for data in dict.fromkeys(files.values())]
    parts += [("manifests", manifest.encoded), *(("blobs", data) for data in blobs)]
    named = [(entry_name(kind, digest_of(data)), data) for kind, data in parts]
    trust = {name: digest_of(data) for name, data in files.items()}
    entries = tuple((name, len(data)) for name, data in named)
    index = Index(manifest.model, "main", manifest.revision, trust, entries)
    body = b"".join(head(name, len(data)) + data + padding(len(data)) for name, data in named)
    return index.encode() + body + END
