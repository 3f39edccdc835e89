"""Log lines: no token is in one, whoever wrote it."""

from __future__ import annotations

import pytest

from shared.keys import NodeKey
from shared.log import redact
from shared.tokens import issue, parse_scopes

TOKEN = issue(NodeKey.generate(), parse_scopes(["*/*:read"]), token_id="t", now=1_800_000_000, lifetime=9)


@pytest.mark.parametrize(
    "line",
    [
        TOKEN,
        f"GET /shards/a/b?token={TOKEN} HTTP/1.1",
        f"http://node:8720/shards/a/b?region=x&token={TOKEN}&y=1 broke off",
        f'{{"Authorization": "Bearer {TOKEN}"}}',
        f"Traceback: {TOKEN!r}",
        f"/shards/a/b?token={TOKEN[:100]}",
        "/shards/a/b?token=0123456789abcdef",
    ],
)
def test_a_token_is_left_out_of_a_line(line: str) -> None:
    made = redact(None, "info", {"event": line, "url": line, "status": 200})
    assert made["status"] == 200
    for name in ("event", "url"):
        assert TOKEN[:100] not in made[name] and "0123456789abcdef" not in made[name]
        assert "[token]" in made[name]


def test_the_rest_of_a_line_is_left_alone() -> None:
    made = redact(None, "info", {"event": f"x?token={TOKEN}&y=1 end", "other": "a.b.c", "n": None})
    assert made == {"event": "x?token=[token]&y=1 end", "other": "a.b.c", "n": None}
