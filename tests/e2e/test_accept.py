"""Which networks a user trusts: noted by fingerprint, and nothing is fetched by ref without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearshard import networks
from shared.digest import digest_of, hex_of
from shared.errors import EXIT_CONFIG, EXIT_INTEGRITY, EXIT_USAGE, ConfigError
from tests.harness import Lab, command, make_model


@pytest.fixture(autouse=True)
def _own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_a_network_is_accepted_by_its_fingerprint(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(lab.folder / "model")
    revision = lab.publish(lab.folder / "model")
    origin = lab.origin()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "stranger"))
    where = ["--router", origin.url]
    unknown = command("get", "acme/tiny:embed", "-o", str(tmp_path / "a"), *where, check=False)
    assert unknown.returncode == EXIT_CONFIG and f"nearshard trust accept {origin.url}" in unknown.stderr
    command("get", f"acme/tiny:embed@{revision}", "-o", str(tmp_path / "b"), *where)
    wrong = command("trust", "accept", origin.url, "--fingerprint", "ab" * 32, check=False)
    assert wrong.returncode == EXIT_INTEGRITY
    unasked = command("trust", "accept", origin.url, check=False)
    assert unasked.returncode == EXIT_USAGE and "--fingerprint" in unasked.stderr
    fingerprint = hex_of(digest_of(lab.trust_root.read_bytes()))
    assert fingerprint in command("trust", "accept", origin.url, "--fingerprint", fingerprint).stdout
    command("get", "acme/tiny:embed", "-o", str(tmp_path / "c"), *where)


def test_a_url_is_of_one_network(tmp_path: Path) -> None:
    first, second = b"first root", b"second root"
    networks.note(["http://a", "http://b"], first)
    networks.note(["http://b", 'http://c"\\'], second)
    assert networks.find_root(["http://a"]).read_bytes() == first
    assert networks.find_root(["http://b"]).read_bytes() == second
    assert networks.find_root(['http://c"\\']).read_bytes() == second
    for urls in (["http://d"], ["http://a", "http://b"]):
        with pytest.raises(ConfigError):
            networks.find_root(urls)
    networks.note(["http://a"], second)
    assert networks.find_root(["http://a", "http://b"]).read_bytes() == second


@pytest.mark.parametrize("text", ["x", "[[network]]", "[[network]]\nroot = 1\nurls = []", "network = 1"])
def test_a_file_that_is_wrong_is_named(tmp_path: Path, text: str) -> None:
    networks.config_dir().mkdir(parents=True)
    (networks.config_dir() / "networks.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"networks\.toml"):
        networks.find_root(["http://a"])
