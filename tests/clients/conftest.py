"""A network with a model that real clients of other hubs can use, and those clients."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.clients.venvs import environment, packages
from tests.harness import Lab, Service, make_model, wait_nodes

MODEL, SECRET = "demo/minilm", "demo/secret"
NEWEST, OLDER, MODELSCOPE = "huggingface_hub-2", "huggingface_hub-0.36", "modelscope"


@dataclass
class Program:
    """A client in its own environment, with a home of its own."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def command(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of its commands; its output as text, whatever came of it."""
        return subprocess.run(
            self.words(name, *words), env=self.environment(), capture_output=True, text=True, timeout=100, check=False
        )

    def words(self, name: str, *words: str) -> list[str]:
        """A command of its."""
        return [str(self.folder / "bin" / name), *words]

    def environment(self) -> dict[str, str]:
        """Nothing of the user's own."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, **self.env}

    def run(self, program: str, **told: object) -> Any:
        """Run a program of Python; ``told`` are its variables, and what it leaves in ``result`` is given."""
        known = [f"{name} = json.loads({json.dumps(value)!r})" for name, value in told.items()]
        text = "\n".join(["import json", *known, program, "print('\\n' + json.dumps(result))"])
        done = self.command("python", "-c", text)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Network:
    """A router before two edges of one region, and models at an origin."""

    lab: Lab
    origin: Service
    router: Service
    edges: list[Service]
    model: Path
    earlier: str
    commit: str

    def sent(self) -> int:
        """Bytes of bodies that the nodes have sent to anybody."""
        return sum(sum(edge.status()["sent_bytes"].values()) for edge in self.edges)

    def files(self) -> dict[str, bytes]:
        """Of the model, by path, as they were published."""
        found = {str(file.relative_to(self.model)): file for file in self.model.rglob("*") if file.is_file()}
        return {path: file.read_bytes() for path, file in found.items() if path != "nearshard.toml"}


def make_hub_model(folder: Path) -> None:
    """What transformers finds in a model: weights, a configuration, a tokenizer, and a name that needs escapes."""
    make_model(folder, width=1500)
    vocabulary = {"[UNK]": 0, "near": 1, "shard": 2}
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 3}))
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": None,
                "decoder": None,
                "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
            }
        )
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"})
    )
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "onnx" / "a b#c%+é.json").write_text("[1, 2, 3]")
    (folder / "empty.txt").touch()


@pytest.fixture(scope="module")
def net(shared_lab: Lab, redis_url: str, request: pytest.FixtureRequest) -> Iterator[Network]:
    """``main`` has moved once."""
    lab, model = shared_lab, shared_lab.folder / "model"
    make_hub_model(model)
    (model / "README.md").write_text("before")
    earlier = lab.publish(model, MODEL)
    (model / "README.md").write_text("now")
    revision = lab.publish(model, MODEL)
    lab.publish(model, SECRET, "--private")
    origin = lab.origin()
    prefix = f"{request.module.__name__}:"
    router = lab.router(origin, redis=redis_url, redis_prefix=prefix, default_region="north")
    edges = [lab.edge(origin, router=router, node=f"north-{n}", region="north") for n in (1, 2)]
    wait_nodes(router, 2)
    yield Network(lab, origin, router, edges, model, earlier[7:47], revision[7:47])


@pytest.fixture
def hub(tmp_path: Path) -> Callable[..., Program]:
    """A version of huggingface_hub, with or without hf_xet, that is led to a URL."""

    def make(name: str, url: str, *, xet: bool = False, **more: str) -> Program:
        lent: Mapping[str, str] = {"PYTHONPATH": str(packages(environment("hf_xet")))} if xet else {}
        home = tmp_path / "home"
        told = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return Program(environment(name), {**told, **lent, **more})

    return make
