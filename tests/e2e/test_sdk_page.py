"""The examples of docs/sdk.md do what the page says, with a real network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nearshard.federated.site import enroll
from nearshard.federated.submitting import Submitted
from tests.harness import Lab, command, make_model

PAGE = Path(__file__).parents[2] / "docs" / "sdk.md"


def test_the_examples_of_the_page_run(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_model(tmp_path / "model")
    lab.publish(tmp_path / "model", "demo/minilm")
    origin = lab.origin()
    examples = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(examples) == 7
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEARSHARD_SITES", str(tmp_path / "sites"))
    (tmp_path / "sites.toml").write_text(enroll("berlin").line)
    words = ("--sites", str(tmp_path / "sites.toml"), "--store", str(lab.store), "--keys", str(lab.keys))
    command("federated", "open", "demo/minilm", *words, "--min-sites", "1", "--rule", "mean")
    names: dict[str, object] = {"router": lab.router(origin).url}
    for example in examples:
        exec(example, names)
    whole = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert whole[8:].startswith(bytes(names["header"])) and names["last"] == whole[-16:]  # type: ignore[call-overload]
    assert names["config"] == (tmp_path / "model" / "config.json").read_bytes()
    loaded = names["tensors"]
    assert isinstance(loaded, dict)
    assert (loaded["embeddings.weight"][1:] == tensors["embeddings.weight"][1:]).all()
    assert (tmp_path / "minilm" / "model.safetensors").read_bytes() == whole
    assert (tmp_path / "embed" / "tokenizer.json").exists()
    done = names["done"]
    assert isinstance(done, Submitted) and done.round == 1 and done.size < done.full / 20
