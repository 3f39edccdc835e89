"""Another hub for a mirror to fetch from: a scripted source that answers as a Hugging Face hub does, and misbehaves on
order."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

from tests.scripted import Act, Asked, Script, serve_whole

SKIPPED = ("nearshard.toml",)


def put_model(script: Script, directory: Path, name: str, commit: str, *, ref: str = "main", **fields: object) -> None:
    """Have a hub's ``ref`` of a model, and its ``commit``, be the files of a directory. safetensors are in LFS."""
    siblings = []
    for file in sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in SKIPPED):
        path, data = file.relative_to(directory).as_posix(), file.read_bytes()
        sibling: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": "0" * 40}
        if path.endswith((".safetensors", ".bin")):
            sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            sibling["xetHash"] = "ab" * 32
        siblings.append(sibling)
        script.blobs[f"/{name}/resolve/{commit}/{path}"] = data
    document = {"id": name, "sha": commit, "siblings": siblings, **fields}
    for revision in (ref, commit):
        script.blobs[f"/api/models/{name}/revision/{revision}?blobs=true"] = json.dumps(document).encode()


def asked_files(script: Script) -> list[Asked]:
    """The requests for bytes of files."""
    return [asked for asked in script.asked if "/resolve/" in asked.path]


def for_files(act: Act) -> Act:
    """Do ``act`` to requests for large files, and answer all else."""

    async def chosen(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await (act if asked.path.endswith(".safetensors") else serve_whole)(script, asked, writer)

    return chosen


def with_token(token: str) -> Act:
    """A hub that shows what it has to whoever shows this token, and 401 to others."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if asked.headers.get("authorization") == f"Bearer {token}":
            await serve_whole(script, asked, writer)
        else:
            writer.write(b"HTTP/1.1 401 Unauthorized\r\nX-Error-Code: RepoNotFound\r\nContent-Length: 0\r\n\r\n")

    return act


def redirecting(other: Script) -> Act:
    """Bytes are at another host: as of hubs with a store of their own."""

    async def act(script: Script, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if "/resolve/" in asked.path:
            where = f"{other.url}{asked.path}"
            writer.write(f"HTTP/1.1 302 Found\r\nLocation: {where}\r\nContent-Length: 0\r\n\r\n".encode())
        else:
            await serve_whole(script, asked, writer)

    return act
