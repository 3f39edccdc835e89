"""An origin whose store was restored from an older backup: the network knows more than it does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from shared.errors import EXIT_CONFIG, EXIT_INTEGRITY
from tests.harness import Lab, command, make_model


@pytest.mark.parametrize("gone_on", [False, True], ids=["restored", "restored and published on"])
def test_what_the_network_knows_is_brought_back(lab: Lab, tmp_path: Path, gone_on: bool) -> None:
    for number in (1, 2):
        make_model(tmp_path / f"v{number}", seed=number, width=128)
    lab.publish(tmp_path / "v1")
    backup = tmp_path / "backup"
    shutil.copytree(lab.store, backup)
    newest = lab.publish(tmp_path / "v2")
    origin = lab.origin()
    edge = lab.edge(origin)
    get = ["get", "acme/tiny", "--router", edge.url, "--trust-root", str(lab.trust_root), "-o", str(tmp_path / "got")]
    command(*get)
    origin.kill()
    shutil.rmtree(lab.store)
    shutil.copytree(backup, lab.store)
    if gone_on:  # what is signed on top of the older state, nobody who knows more believes
        make_model(tmp_path / "v3", seed=3, width=128)
        lab.publish(tmp_path / "v3")
    origin.start()
    other = [*get[:3], origin.url, *get[4:6], "-o", str(tmp_path / "other"), "--force"]
    refused = command(*other, check=False)
    assert refused.returncode == EXIT_INTEGRITY, refused.stderr

    words = ["--store", str(lab.store), "--trust-root", str(lab.trust_root), "--keys", str(lab.keys), "--json"]
    words += ["--token-file", str(lab.node_token)]  # who may read what private refs mean
    told = json.loads(command("trust", "restore", "--from", edge.url, *words).stdout)
    assert told["files"] > 0
    assert told["missing"] == [{"model": "acme/tiny", "revision": newest}]
    lab.publish(tmp_path / "v2")
    again = json.loads(command("trust", "restore", "--from", edge.url, *words).stdout)
    assert (again["files"], again["missing"]) == (0, [])
    command(*other)
    whole = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert whole == (tmp_path / "v2" / "model.safetensors").read_bytes()


def test_who_is_asked_is_believed_nothing(lab: Lab, tmp_path: Path) -> None:
    """Another network's origin is no source."""
    other = Lab(tmp_path / "other")
    try:
        words = ["--store", str(lab.store), "--trust-root", str(lab.trust_root), "--keys", str(lab.keys)]
        done = command("trust", "restore", "--from", other.origin().url, *words, check=False)
    finally:
        other.close()
    assert done.returncode == EXIT_CONFIG
    assert "nobody has metadata that is signed as it must be" in done.stderr
