"""Which proxy leads where: by a setting, and by the environment where that is asked for."""

from __future__ import annotations

import os

import pytest

from shared.errors import ConfigError
from shared.proxy import choose_proxy

VARIABLES = [name for name in os.environ if name.lower().endswith("_proxy")]


@pytest.fixture(autouse=True)
def _none_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name)


def test_without_being_asked_no_variable_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    assert choose_proxy("")("http://a:1") is None


def test_one_proxy_is_for_all() -> None:
    choose = choose_proxy("socks5h://user:word@proxy:1080/")
    assert choose("http://a:1") == choose("https://[::1]:2/x") == "socks5h://user:word@proxy:1080"


def test_the_environment_chooses_by_scheme_and_excepts_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HTTP_PROXY": "http://upper:1",
        "http_proxy": "lower:2",
        "ALL_PROXY": "socks5://all:3",
        "NO_PROXY": "example.org, 10.0.0.1,::1,one:8700",
    }.items():
        monkeypatch.setenv(name, value)
    choose = choose_proxy("env")
    assert choose("http://a") == "http://lower:2"
    assert choose("https://a") == "socks5://all:3"
    excepted = ["https://example.org", "http://EDGE.example.org:1/x", "http://10.0.0.1:8720", "http://[::1]:1"]
    assert {choose(url) for url in [*excepted, "http://one:8700"]} == {None}
    assert choose("http://one:8701") and choose("http://anexample.org") and choose("http://10.0.0.10")
    monkeypatch.setenv("NO_PROXY", "*")
    assert choose_proxy("env")("http://a") is None


@pytest.mark.parametrize(
    "setting",
    ["proxy:3128", "ftp://proxy:1", "http://", "http://proxy", "http://proxy:x", "http://proxy:99999",
     "http://proxy:1/path", "http://proxy:1?x", "https://proxy:1", "socks4://proxy:1", "environment"],
)  # fmt: skip
def test_what_is_no_proxy_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match="a proxy is http://"):
        choose_proxy(setting)


def test_a_bad_variable_is_named_and_its_password_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "ftp://user:secret@proxy:1")
    with pytest.raises(ConfigError, match="HTTPS_PROXY") as caught:
        choose_proxy("env")
    assert "secret" not in str(caught.value)
