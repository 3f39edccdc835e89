"""The load tests: what is asked for, when there are how many people, and which options cannot be run with."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from loadtests.load import arguments
from loadtests.scenarios import REGIONS, SCENARIOS, BadOption, Popularity, Scenario, check_url, parse_region


def test_popularity_is_zipfs_and_comes_from_the_seed() -> None:
    things = ["first", "second", "third", "fourth"]
    popular, again = Popularity(things, Random(3)), Popularity(things, Random(3))
    chosen = [popular.choose() for _ in range(8000)]
    assert chosen[:100] == [again.choose() for _ in range(100)]
    counted = Counter(chosen)
    for rank, thing in enumerate(things, 1):
        assert counted[thing] * rank == pytest.approx(counted["first"], rel=0.15)


def test_people_come_and_go_in_straight_lines() -> None:
    scenario = Scenario("", ((0.0, 0.1), (0.5, 1.0), (0.75, 1.0), (1.0, 0.0)))
    course = [scenario.users_at(tenth / 10, 100) for tenth in range(11)]
    assert course == [10, 28, 46, 64, 82, 100, 100, 100, 80, 40, 1]  # somebody is always there


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_stay_within_their_bounds_and_mend_what_they_cut(name: str) -> None:
    scenario = SCENARIOS[name]
    assert [at for at, _ in scenario.users] == sorted(at for at, _ in scenario.users)
    assert all(1 <= scenario.users_at(part / 50, 24) <= 24 for part in range(51))
    assert all(0 < event.at < 1 for event in scenario.events)
    assert {event.region for event in scenario.events} <= {"", *(region.name for region in REGIONS)}
    cuts, mends = ([event.at for event in scenario.events if event.kind == kind] for kind in ("cut", "mend"))
    assert all(cut < mend for cut, mend in zip(cuts, mends, strict=True))


def test_a_region_is_named_with_its_link() -> None:
    region = parse_region("lagos:180:10:0.01:2")
    assert (region.name, region.rtt_ms, region.mbit, region.loss, region.weight) == ("lagos", 180, 10, 0.01, 2)
    for wrong in ("lagos", "lagos:180", "la gos:1:1", "x:0:10", "x:10:0", "x:nan:10", "x:10:10:2", "x:1:1:0:0", ":1:1"):
        with pytest.raises(BadOption):
            parse_region(wrong)


def test_only_this_machine_is_loaded_unless_that_was_asked_for() -> None:
    assert check_url("http://127.0.0.1:8700/", beyond_loopback=False) == "http://127.0.0.1:8700"
    assert check_url("https://models.example", beyond_loopback=True) == "https://models.example"
    with pytest.raises(BadOption, match="--beyond-loopback"):
        check_url("http://models.example", beyond_loopback=False)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--concurrency", "0"], "give a number from 1 to 1000"),
        (["--concurrency", "-1"], "give a number from 1 to 1000"),
        (["--concurrency", "100000"], "give a number from 1 to 1000"),
        (["--concurrency", "nan"], "give a number from 1 to 1000"),
        (["--concurrency", "1.5"], "whole number"),
        (["--seconds", "1e9"], "give a number from 1 to 3600"),
        (["--url", "file:///etc/passwd"], "http://host:port"),
        (["--url", "ftp://127.0.0.1"], "http://host:port"),
        (["--url", "http://127.0.0.1:x"], "http://host:port"),
        (["--url", "http://u:p@127.0.0.1"], "no user"),
        (["--url", "http://10.0.0.1"], "--beyond-loopback"),
        (["--url", "https://127.0.0.1", "--region", "a:1:1"], "http:// URL"),
        (["--region", "a:1:1", "--region", "a:2:2"], "same name"),
        (["--report", "/no/such/folder/x.html"], "does not exist"),
        (["--task", "a/b"], "goes with --url"),
        (["--scenario", "flood"], "invalid choice"),
    ],
)
def test_what_cannot_be_run_with_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
