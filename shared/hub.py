"""What the clients of other hubs are told of a model: the JSON documents of the Hugging Face Hub and of ModelScope.

They know a revision as a commit, the first 40 hex digits of its digest (``shared.ids.commit_of``). All files are shown
as the Hub shows what is in Git LFS, since that is the form that has a SHA-256; and object ids are those that Git would
give the same files there. Nothing is ever said of Xet: whoever hears of it goes to the Hub's own servers for the bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared.digest import Digest
from shared.errors import BadId, NotFound
from shared.ids import DEFAULT_REF, commit_of, is_commit, parse_model, parse_ref_or_revision
from shared.layout import Layout

Json = dict[str, Any]

COMMIT = "X-Repo-Commit"
ERROR_CODES: Mapping[str, str] = {
    "unknown_model": "RepoNotFound",
    "unknown_revision": "RevisionNotFound",
    "unknown_file": "EntryNotFound",
}
"""What the Hub calls errors of ours."""
MODELSCOPE_REF = "master"
"""What a client of ModelScope asks for where its user names nothing."""


class Listed(Protocol):
    """A revision, as far as its files are listed."""

    @property
    def model(self) -> str:
        """Its name."""
        ...

    @property
    def commit(self) -> str:
        """What clients know it as."""
        ...

    @property
    def files(self) -> Mapping[str, Layout]:
        """Its files by path."""
        ...


@dataclass(frozen=True)
class Shown:
    """``Listed``."""

    model: str
    commit: str
    files: Mapping[str, Layout]


def model_named(text: str) -> str:
    """The model that a client names: elsewhere names have capital letters, here they are the same without.

    Raises NotFound: they know no other answer to a name that cannot be."""
    try:
        return parse_model(text.lower())
    except BadId:
        raise NotFound("not a name of a model", code="unknown_model") from None


def ref_named(text: str) -> str:
    """The ref, revision or commit that a client names. Raises NotFound."""
    try:
        return text if is_commit(text) else parse_ref_or_revision(text)
    except BadId:
        raise NotFound("not a ref, revision or commit", code="unknown_revision") from None


def modelscope_ref(ref: str, refs: Mapping[str, Digest]) -> str:
    """What a client of ModelScope means: its default is our default, where no ref is really called that."""
    return DEFAULT_REF if ref == MODELSCOPE_REF and ref not in refs else ref


# Files and folders


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a folder of a revision."""

    path: str
    oid: str
    """What Git would name it by: 40 hex digits."""
    layout: Layout | None
    """Of a file."""

    def depth(self, folder: str) -> int:
        """How many levels below a folder of the model it is; 0 where it is not below. The empty one is the model."""
        if folder and not self.path.startswith(folder + "/"):
            return 0
        return self.path.count("/", len(folder) + 1 if folder else 0) + 1


def pointer(layout: Layout) -> bytes:
    """What Git LFS would commit in a file's place; that of an empty file is empty."""
    if not layout.size:
        return b""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{layout.sha256}\nsize {layout.size}\n".encode()


def git_oid(kind: str, body: bytes) -> str:
    """The id of a Git object."""
    return hashlib.sha1(f"{kind} {len(body)}\0".encode() + body, usedforsecurity=False).hexdigest()


def entries(manifest: Listed) -> list[Entry]:
    """All files and folders of a revision, by path, each folder before what is in it."""
    root: dict[str, Any] = {}
    for path, layout in manifest.files.items():
        *folders, name = path.split("/")
        folder = root
        for part in folders:
            folder = folder.setdefault(part, {})
        folder[name] = layout
    found: list[Entry] = []
    _add_folder(found, "", root)
    return sorted(found, key=lambda entry: entry.path.split("/"))


def _add_folder(found: list[Entry], prefix: str, folder: dict[str, Any]) -> str:
    """List what is in a folder; the folder's own object id."""
    lines = []
    for name, item in folder.items():
        if isinstance(item, Layout):
            oid = git_oid("blob", pointer(item))
            found.append(Entry(prefix + name, oid, item))
            lines.append((name, "100644", name, oid))
        else:
            oid = _add_folder(found, f"{prefix}{name}/", item)
            found.append(Entry(prefix + name, oid, None))
            lines.append((f"{name}/", "40000", name, oid))  # Git sorts a folder as if its name ended so
    lines.sort(key=lambda line: line[0].encode())
    return git_oid("tree", b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for _, mode, name, oid in lines))


def below(manifest: Listed, folder: str, *, recursive: bool) -> Iterator[Entry]:
    """What is in a folder: one level, or all of them. Raises NotFound (``unknown_file``) where there is no such one."""
    listed = entries(manifest)
    if folder and not any(entry.path == folder and entry.layout is None for entry in listed):
        raise NotFound(f"{manifest.model} has no such folder", code="unknown_file")
    return (entry for entry in listed if (depth := entry.depth(folder)) and (recursive or depth == 1))


# The Hugging Face Hub


def model_info(manifest: Listed, *, blobs: bool, private: bool) -> Json:
    """``/api/models/<model>``. ``blobs``: with sizes and hashes of the files."""
    siblings: list[Json] = []
    for path, layout in manifest.files.items():
        sibling: Json = {"rfilename": path}
        if blobs:
            body = pointer(layout)
            lfs = {"sha256": layout.sha256, "size": layout.size, "pointerSize": len(body)}
            sibling |= {"size": layout.size, "blobId": git_oid("blob", body), "lfs": lfs}
        siblings.append(sibling)
    return {
        "id": manifest.model,
        "modelId": manifest.model,
        "sha": manifest.commit,
        "private": private,
        "gated": False,
        "disabled": False,
        "siblings": siblings,
    }


def _shown(entry: Entry) -> Json:
    if entry.layout is None:
        return {"type": "directory", "path": entry.path, "oid": entry.oid, "size": 0}
    size = entry.layout.size
    lfs = {"oid": entry.layout.sha256, "size": size, "pointerSize": len(pointer(entry.layout))}
    return {"type": "file", "path": entry.path, "oid": entry.oid, "size": size, "lfs": lfs}


def tree(manifest: Listed, folder: str, *, recursive: bool) -> list[Json]:
    """``/tree/<rev>/<folder>``, in one page. Raises NotFound."""
    return [_shown(entry) for entry in below(manifest, folder, recursive=recursive)]


def paths_info(manifest: Listed, paths: Sequence[str]) -> list[Json]:
    """``/paths-info/<rev>``: what there is of these, in the order of the tree."""
    wanted = {path.rstrip("/") for path in paths}
    return [_shown(entry) for entry in entries(manifest) if entry.path in wanted]


def refs_info(refs: Mapping[str, Digest], *, pull_requests: bool) -> Json:
    """``/refs``: each of ours is a branch, since it can be moved."""
    branches = [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit_of(revision)}
        for name, revision in refs.items()
    ]
    return {"branches": branches, "tags": [], "converts": [], **({"pullRequests": []} if pull_requests else {})}


# ModelScope


def modelscope(data: Json, request_id: str) -> Json:
    """What every answer of ModelScope is wrapped in."""
    return {"Code": 200, "Success": True, "Message": "", "RequestId": request_id, "Data": data}


def modelscope_files(manifest: Listed, folder: str, *, recursive: bool) -> Json:
    """``/repo/files``. Raises NotFound."""
    listed = []
    for entry in below(manifest, folder, recursive=recursive):
        shown: Json = {"Path": entry.path, "Name": entry.path.rpartition("/")[2], "Revision": manifest.commit}
        if entry.layout is None:
            shown |= {"Type": "tree", "Size": 0}
        else:
            shown |= {"Type": "blob", "Size": entry.layout.size, "Sha256": entry.layout.sha256, "IsLFS": True}
        listed.append(shown)
    return {"Files": listed}


def modelscope_revisions(refs: Mapping[str, Digest]) -> Json:
    """``/revisions``: the branches, and the one that is asked for by default."""
    named = dict(refs)
    if DEFAULT_REF in refs:
        named.setdefault(MODELSCOPE_REF, refs[DEFAULT_REF])
    branches = [{"Revision": name, "CommitId": commit_of(revision)} for name, revision in named.items()]
    return {"RevisionMap": {"Branches": branches, "Tags": []}}
