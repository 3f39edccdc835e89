"""Fixtures for all tests."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.harness import Lab, valkey
from tests.s3_server import BUCKET, environment, s3_server

# Machines are shared and busy: how long an example takes by the clock says nothing.
settings.register_profile("nearshard", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nearshard")


@pytest.fixture(scope="session", autouse=True)
def _cache_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands keep for the next one is kept for this run of the tests, away from the user's; and what no
    deployment has (``tests/without``) is not there for what they start."""
    for kind in ("CACHE", "CONFIG", "DATA"):
        os.environ[f"XDG_{kind}_HOME"] = str(tmp_path_factory.mktemp(f"{kind.lower()}-home"))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent / "without"), os.environ.get("PYTHONPATH", "")]
    )


@pytest.fixture(autouse=True)
def _own_repository(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what one test fetched would be there for the next, and nothing would go over the network."""
    monkeypatch.setenv("NEARSHARD_REPOSITORY", str(tmp_path_factory.mktemp("repository")))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    """A place for services of one test."""
    made = Lab(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Valkey server, shared by the tests that give it keys of their own."""
    with valkey() as url:
        yield url


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real S3-speaking server with a bucket, shared by the tests that take prefixes of their own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place of its own in that server, as a store's URL; the environment leads there."""
    for name, value in environment(s3_url).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}"


@pytest.fixture(scope="session")
def need() -> Callable[[str], str]:
    """The path of a program that a test needs: skipped by name where it is not there, a failure in CI."""

    def find(program: str) -> str:
        path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        if path is None and os.environ.get("CI") == "true":
            pytest.fail(f"{program} is not installed, and CI must have it")
        if path is None:
            pytest.skip(f"{program} is not installed")
        return path

    return find


@pytest.fixture(scope="module")
def shared_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A place for services that all tests of a module use and none changes."""
    made = Lab(tmp_path_factory.mktemp("lab"))
    yield made
    made.close()
