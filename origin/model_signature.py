"""What a publisher signed with OpenSSF model-signing, checked before it is published. The library is an extra."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from origin.model_dir import SourceFile
from shared.errors import ConfigError, ModelSignatureInvalid

if TYPE_CHECKING:
    from model_signing import hashing

BUNDLE_FILE = "model.sig"
"""In the model directory; the tool's default."""


def check_signature(
    directory: Path, sources: Sequence[SourceFile], bundle: Path, *, key: Path | None, certificates: Path | None
) -> None:
    """Check that all of ``sources``, as they are, and nothing else is signed: by ``key`` (public, PEM), or with a
    certificate that ``certificates`` (PEM) vouch for. The bundle is one of the sources and needs no signature.

    Raises ModelSignatureInvalid, and ConfigError where there is not one good key or the library is not there.
    """
    if (key is None) == (certificates is None):
        raise ConfigError("what the model is signed with is a key or certificates: give one")
    try:
        from model_signing import verifying
    except ImportError as error:
        raise ConfigError(
            f"checking a model's signature needs pip install 'nearshard[model-signing]' ({error})"
        ) from error
    verifier = verifying.Config()
    try:
        if key:
            verifier.use_elliptic_key_verifier(public_key=key)
        elif certificates:
            verifier.use_certificate_verifier(certificate_chain=[certificates])
    except Exception as error:  # the library lets through what its own libraries raise, here and below
        raise ConfigError(f"{key or certificates}: not what a model's signature is checked with: {error}") from error

    paths = {source.path for source in sources}
    name = Path(os.path.relpath(bundle, directory)).as_posix()
    if not bundle.is_file():
        raise ModelSignatureInvalid(f"{bundle}: no such file, so the model is not signed")
    if name not in paths:
        raise ModelSignatureInvalid(f"{bundle}: is not published with the model, so nobody else could check it")
    try:
        how, signed = _read(bundle)
        if loose := sorted(paths - signed - {name}):
            raise ValueError(f"not signed: {', '.join(loose)}")
        ignored = [name, *_left_out(directory, paths)]
        verifier.set_hashing_config(_hashing(how).set_ignored_paths(paths=ignored, ignore_git_paths=False))
        with redirect_stdout(sys.stderr):  # it prints its warnings
            verifier.verify(directory, bundle)
    except Exception as error:
        reason = str(error) or "not a signature of this key"
        raise ModelSignatureInvalid(f"{bundle} does not fit what would be published: {reason}") from error


def _read(bundle: Path) -> tuple[dict[str, Any], set[str]]:
    """How the files were hashed, and which: as a bundle says, before its signature is checked.

    The files matter because the library leaves out, unsaid, what the signer had it leave out: .gitattributes is
    one of them by default.
    """
    document = json.loads(bundle.read_bytes())
    predicate = json.loads(base64.b64decode(document["dsseEnvelope"]["payload"], validate=True))["predicate"]
    how = predicate["serialization"]
    names = [resource["name"] for resource in predicate["resources"]]
    return how, {name.rsplit(":", 2)[0] if how["method"] == "shards" else name for name in names}


def _hashing(how: dict[str, Any]) -> hashing.Config:
    """The library's settings to hash again as the signer did. Links: ``read_model_dir`` has refused the bad ones."""
    from model_signing import hashing

    config = hashing.Config().set_allow_symlinks(True)
    if how["method"] == "shards":
        size = int(how["shard_size"])  # the library writes it as a float, and cannot count with one
        return config.use_shard_serialization(hashing_algorithm=how["hash_type"], shard_size=size)
    return config.use_file_serialization(hashing_algorithm=how["hash_type"])


def _left_out(directory: Path, paths: set[str]) -> Iterator[str]:
    """What of a directory is not published: files, and folders of which nothing is."""
    folders = {parent for path in paths for parent in Path(path).parents}
    for folder, subfolders, names in os.walk(directory):
        here = Path(folder).relative_to(directory)
        yield from (path for name in names if (path := (here / name).as_posix()) not in paths)
        yield from ((here / name).as_posix() for name in subfolders if here / name not in folders)
        subfolders[:] = [name for name in subfolders if here / name in folders]
