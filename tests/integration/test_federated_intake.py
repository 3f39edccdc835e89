"""Parts of an update's body, on a disk that is slow at the wrong moment."""

from __future__ import annotations

import asyncio
import io
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp.test_utils import TestClient, TestServer

from origin.federated import intake
from origin.federated.intake import BATCH, Intake
from shared import log
from shared.digest import digest_of
from shared.federated import OFFSET_FIELD, PART_TYPE, Counted, Statement, authorization, upload_path
from shared.metrics import Metrics
from shared.web.middleware import make_app
from tests.clock import HandClock

TOKEN = "A" * 43
BODY = bytes(range(251)) * (3 * BATCH // 251)
STATEMENT = Statement(
    "berlin", "acme/tiny", 1, digest_of(b"base"), bytes(16), datetime(2026, 1, 1, tzinfo=UTC), 1, digest_of(BODY),
    len(BODY), ("int4",),
)  # fmt: skip


async def test_who_goes_on_while_the_last_part_is_being_written_is_told_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes were put after those that were on their way to the disk, though they begin where those do."""
    file = tmp_path / "body"
    file.touch()
    upload = intake._Upload(STATEMENT, 1, file, TOKEN, 0)
    clock, metrics = HandClock(), Metrics()
    taken = Intake(Mock(), Mock(uploads=4), tmp_path, Mock(), Mock(), Mock(), clock, metrics, Mock())
    taken._uploads[upload.key] = upload
    writing, go_on, asked = threading.Event(), threading.Event(), asyncio.Queue[None]()
    write, find = intake._append_to, taken._upload

    def slow(path: Path, offset: int, data: bytearray) -> None:
        if not writing.is_set():
            writing.set()
            assert go_on.wait(60)
        write(path, offset, data)

    def found(request: Any) -> Any:
        asked.put_nowait(None)
        return find(request)

    async def finish(_: Any) -> Counted:
        return Counted(clipped=False)

    monkeypatch.setattr(intake, "_append_to", slow)
    monkeypatch.setattr(taken, "_upload", found)
    monkeypatch.setattr(taken, "_finish", finish)
    app = make_app("nearshard-origin", clock, metrics, log.configure("error", "console", "origin"), otlp="")
    taken.add_routes(app)

    def fields(offset: int) -> dict[str, str]:
        return {
            "Authorization": authorization(TOKEN),
            "Content-Type": PART_TYPE,
            OFFSET_FIELD: str(offset),
            "Content-Length": str(len(BODY) - offset),
        }

    path = upload_path(STATEMENT.model, STATEMENT.digest)
    async with TestClient(TestServer(app)) as client:
        _, first = await asyncio.open_connection("127.0.0.1", client.port)
        head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "here", **fields(0)}.items())
        first.write(f"PATCH {path} HTTP/1.1\r\n{head}\r\n".encode() + BODY[:BATCH])
        assert await asyncio.to_thread(writing.wait, 30)
        await asyncio.wait_for(asked.get(), 30)
        second = asyncio.ensure_future(client.patch(path, data=io.BytesIO(BODY), headers=fields(0)))
        await asyncio.wait_for(asked.get(), 30)
        go_on.set()
        refused = await second
        first.close()
        assert refused.status == 409 and refused.headers[OFFSET_FIELD] == str(BATCH)
        async with client.head(path, headers={"Authorization": authorization(TOKEN)}) as answer:
            reached = int(answer.headers[OFFSET_FIELD])
        last = await client.patch(path, data=io.BytesIO(BODY[reached:]), headers=fields(reached))
        assert last.status == 200, await last.text()
    assert file.read_bytes() == BODY
