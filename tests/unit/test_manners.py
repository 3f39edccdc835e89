"""A client's manners as they are said, and what is shown of a transfer."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nearshard.manners import LEAST_RATE, Manners, parse_manners
from nearshard.progress import Events
from nearshard.room import check_room
from shared.errors import ConfigError, DiskFull, NotFound, RequestError
from shared.link import LinkPolicy
from tests.clock import HandClock


def test_manners_are_said_as_people_say_them() -> None:
    manners = parse_manners(limit_rate="2M", windows={"08:00-18:00": "500k"}, metered=True)
    assert manners.policy == LinkPolicy(2_000_000, {"08:00-18:00": 500_000}, metered=True)
    assert parse_manners().policy == Manners().policy == LinkPolicy()


@pytest.mark.parametrize(
    "said",
    [{"limit_rate": "fast"}, {"limit_rate": -1}, {"limit_rate": LEAST_RATE - 1}, {"windows": {"8-18": "1M"}},
     {"windows": {"08:00-18:00": ""}}, {"windows": {"08:00-18:00": "1k"}}],
)  # fmt: skip
def test_manners_that_cannot_be_kept_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        parse_manners(**said)


def test_a_proxy_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_manners(proxy="proxy:3128")


@pytest.mark.parametrize(
    ("said", "connections"),
    [({}, 8), ({"metered": True}, 1), ({"limit_rate": LEAST_RATE}, 1), ({"limit_rate": 3 * LEAST_RATE}, 3),
     ({"limit_rate": "1G"}, 8), ({"windows": {"08:00-18:00": 2 * LEAST_RATE, "18:00-20:00": 0}}, 2)],
)  # fmt: skip
def test_so_few_connections_that_each_has_a_rate_that_nodes_bear(said: dict[str, Any], connections: int) -> None:
    assert parse_manners(**said).connections(8) == connections
    assert parse_manners(**said).connections(None) == (connections if connections < 8 else None)


def test_what_does_not_fit_is_said_with_both_numbers(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    most = disk.f_bavail * disk.f_frsize
    check_room({tmp_path / "not" / "there" / "yet": 1, tmp_path / "b": most // 4})
    with pytest.raises(DiskFull, match=f"{2 * most} bytes are needed and [0-9]+ are free") as caught:
        check_room({tmp_path / "not" / "there" / "a": most, tmp_path / "b": most})
    assert (caught.value.exit_code, caught.value.public["needed"]) == (7, 2 * most)
    assert not list(tmp_path.iterdir())


class Lines(list[dict[str, Any]]):
    """What events wrote."""

    def write(self, line: str) -> None:
        """One line."""
        assert line.endswith("\n") and line.count("\n") == 1
        self.append(json.loads(line))


def test_events_are_lines_and_progress_comes_once_a_second() -> None:
    clock, lines = HandClock(), Lines()
    events = Events(lines.write, clock)
    events.begin("acme/tiny:half")
    for second in range(31):
        for part in range(10):
            events.progress(second * 1000 + part, 100_000)
        clock.now += 1.0
    events.done({"moved": 30_000})
    first, *progress, last = lines
    assert first == {"event": "begin", "what": "acme/tiny:half"}
    assert last == {"event": "done", "moved": 30_000}
    assert len(progress) == 31
    assert progress[0] == {"event": "progress", "had": 0, "total": 100_000, "rate": 0, "seconds_left": None}
    assert progress[-1] == {"event": "progress", "had": 30_000, "total": 100_000, "rate": 1000, "seconds_left": 70.0}


def test_a_rate_is_of_the_last_seconds_and_never_below_nothing() -> None:
    clock, lines = HandClock(), Lines()
    events = Events(lines.write, clock)
    for had in [0, 50_000, *[51_000] * 30, 1000]:
        events.progress(had, 100_000)
        clock.now += 1.0
    assert lines[-2]["rate"] == 0 and lines[-2]["seconds_left"] is None, "it stands still"
    assert lines[-1]["rate"] == 0, "a shard was wrong and is fetched again"


def test_an_error_is_the_last_event() -> None:
    lines = Lines()
    Events(lines.write, HandClock()).failed(NotFound("no task x", code="unknown_task", public={"tasks": ["all"]}))
    assert lines == [
        {"event": "error", "code": "unknown_task", "exit_code": 8, "message": "no task x", "tasks": ["all"]}
    ]
