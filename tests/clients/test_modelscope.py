"""The client of ModelScope as it is, against real services."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.conftest import MODEL, MODELSCOPE, SECRET, Network, Program
from tests.clients.venvs import environment

pytestmark = pytest.mark.timeout(600)  # the first test installs it


@pytest.fixture
def client(net: Network, tmp_path: Path) -> Program:
    """Led to the router."""
    home = {"MODELSCOPE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}
    return Program(environment(MODELSCOPE), {"MODELSCOPE_ENDPOINT": net.router.url, **home})


def test_the_command_downloads_a_model(net: Network, client: Program, tmp_path: Path) -> None:
    here = tmp_path / "here"
    done = client.command("modelscope", "download", MODEL, "--local_dir", str(here))
    assert done.returncode == 0, done.stderr
    for path, data in net.files().items():
        assert (here / path).read_bytes() == data
    before = net.sent()
    assert client.command("modelscope", "download", MODEL, "--local_dir", str(here)).returncode == 0
    assert net.sent() == before


def test_files_are_had_by_revision(net: Network, client: Program) -> None:
    program = """
from modelscope import snapshot_download
from modelscope.hub.api import HubApi
from modelscope.hub.file_download import model_file_download
def read(path): return open(path, encoding="utf-8").read()
result = {
    "main": read(model_file_download(model, "README.md")),
    "named": read(model_file_download(model, "README.md", revision="main")),
    "earlier": read(model_file_download(model, "README.md", revision=earlier)),
    "odd": read(model_file_download(model, odd)),
    "some": snapshot_download(model, allow_patterns=["*.md"]),
    "files": [item["Path"] for item in HubApi().get_model_files(model)],
    "inside": [item["Path"] for item in HubApi().get_model_files(model, root="onnx")],
    "branches": sorted(HubApi().get_model_branches_and_tags(model)[0]),
}
"""
    odd = "onnx/a b#c%+é.json"
    told = client.run(program, model=MODEL, earlier=net.earlier, odd=odd)
    assert (told["main"], told["named"], told["earlier"], told["odd"]) == ("now", "now", "before", "[1, 2, 3]")
    assert (Path(told["some"]) / "README.md").read_text() == "now"
    assert sorted(told["files"]) == sorted([*net.files(), "onnx"])
    assert told["inside"] == ["onnx", odd]
    assert told["branches"] == ["main", "master"]


def test_what_is_not_there_or_not_for_everybody_is_not_found(net: Network, client: Program) -> None:
    program = """
from modelscope import snapshot_download
def told(*words, **more):
    try:
        return snapshot_download(*words, **more)
    except Exception as error:
        return str(error)
result = [told("demo/none"), told(secret), told(model, revision="v9"), told(secret, token=token)]
"""
    token = net.lab.token(f"{SECRET}:read")
    missing, hidden, ref, shown = client.run(program, model=MODEL, secret=SECRET, token=token)
    assert "unknown_model" in missing and "unknown_model" in hidden and "unknown_revision" in ref
    assert (Path(shown) / "README.md").read_text() == "now"
