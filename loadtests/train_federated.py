"""What the sites of ``make bench-federated`` train, and how well it does; run in a virtual environment of its own.

The task: which part of which library does a sentence come from? There are as many classes as ``PARTS``; the sentences
are those of the docstrings in the environment itself, as in ``train_versions``, and no two are the same. Each class is
split over the sites by a draw from a Dirichlet distribution (Hsu et al. 2019), so sites see few of the classes, and
each others. What is held out is drawn from all.

Commands come as lines of JSON on stdin, and each is answered by a line on stdout once it is done:

- ``{"do": "begin", "out": FILE}``: the tensors that are trained, as they are before round 1.
- ``{"do": "train", "weights": FILE, "site": 0, "round": 1, "rate": 1.0, "flip": false, "out": FILE}``: the same tensors
  after a site's steps of a round; ``rate`` is the share of the rate of learning, ``flip`` gives it wrong labels.
- ``{"do": "evaluate", "weights": FILE, "rows": 500}``: which held-out sentences are right, as a string of 0 and 1, and
  the mean loss.

Seeds are fixed, and one thread computes, so an arm comes out the same each time on one kind of processor.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from loadtests.train_versions import ALPHA, FILE, RANK, Examples, State, told_in

PARTS = (
    "networkx/algorithms",
    "numpy/_core",
    "numpy/lib",
    "scipy/optimize",
    "scipy/signal",
    "scipy/sparse",
    "scipy/stats",
    "sklearn/linear_model",
    "sklearn/metrics",
    "sympy/core",
    "sympy/physics",
    "sympy/polys",
    "sympy/solvers",
    "torch/_dynamo",
    "torch/_inductor",
    "torch/ao",
    "torch/distributed",
    "torch/fx",
    "torch/nn",
    "transformers/models",
)
SEED, SITES, SKEW = 7, 10, 0.3
"""``SKEW`` is the parameter of the Dirichlet distribution: 0 is one site for each class, infinity all alike."""
SENTENCES, HELD_OUT = 1100, 2000
"""Sentences of each part at most; those of all that are held out."""
TOKENS, BATCH, STEPS = 16, 8, 3
"""The most tokens of a sentence that are looked at; sentences of a step; steps of a site in a round."""
RATE, LORA_RATE, HEAD_RATE = 1.5e-4, 1.5e-3, 2.0
"""AdamW's rates, without weight decay: it would move every weight, also of words that no site has. Of the head that of
plain gradient descent: AdamW's steps are as large for classes that a site has hardly any examples of as for the others,
and sites undo each other's."""
MATRICES = ("query", "key", "value", "dense")
ADAPTER = "adapter."
TEXT = "text.npz"


# The text


def sentences(part: str) -> list[str]:
    """Sentences of the docstrings of one part of a library, in an order that is random and always the same."""
    root = Path(sysconfig.get_paths()["purelib"])
    files = sorted(file for file in (root / part).rglob("*.py") if "tests" not in file.parts)
    random.Random(SEED).shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        found |= dict.fromkeys(told_in(file.read_text(errors="replace"), part.partition("/")[0]))
        if len(found) >= SENTENCES:
            break
    return list(found)[:SENTENCES]


def prepare(model: Path, out: Path) -> None:
    """Tokens and labels of all sentences, held out ones first, in ``out``; once, since reading libraries is slow."""
    known: dict[str, int] = {}
    for label, part in enumerate(PARTS):
        for sentence in sentences(part):
            known.setdefault(sentence, label)
    labelled = list(known.items())
    random.Random(SEED).shuffle(labelled)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    tokens = [found.ids for found in tokenizer.encode_batch([text for text, _ in labelled])]
    half = out.with_suffix(".half.npz")
    np.savez(half, tokens=np.array(tokens, np.int64), labels=np.array([label for _, label in labelled], np.int64))
    half.replace(out)


def split(labels: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[torch.Tensor]:
    """The rows of each site."""
    chance = np.random.default_rng(SEED)
    rows: list[list[int]] = [[] for _ in range(SITES)]
    for label in range(len(PARTS)):
        of_class = chance.permutation(np.flatnonzero(labels == label))
        ends = (np.cumsum(chance.dirichlet([SKEW] * SITES)) * len(of_class)).astype(int)[:-1]
        for site, part in enumerate(np.split(of_class, ends)):
            rows[site] += part.tolist()
    return [torch.tensor(sorted(site)) for site in rows]


# The model


class Adapted(torch.nn.Module):
    """A linear layer with an update of low rank beside it (Hu et al. 2021), which alone learns."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.lora_A = torch.nn.Parameter(torch.randn(RANK, layer.in_features) / RANK)
        self.lora_B = torch.nn.Parameter(torch.zeros(layer.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output and the update's."""
        return self.layer(x) + x @ self.lora_A.T @ (self.lora_B.T * (ALPHA / RANK))


class Classifier(torch.nn.Module):
    """The model with a head: the mean of its last states, and a linear layer upon it."""

    def __init__(self, model: Path, layers: int, *, lora: bool) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        config = BertConfig.from_pretrained(model, attn_implementation="sdpa")
        config.num_hidden_layers = layers
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        self.bert = BertModel(config, add_pooling_layer=False)
        self.published = {name: x for name, x in load_file(model / FILE).items() if x.is_floating_point()}
        self.bert.load_state_dict(self.published, strict=False)
        self.classifier = torch.nn.Linear(config.hidden_size, len(PARTS))
        torch.nn.init.zeros_(self.classifier.weight)
        torch.nn.init.zeros_(self.classifier.bias)
        self.lora = lora
        if lora:
            self.bert.requires_grad_(False)
            for name, layer in list(self.bert.encoder.named_modules()):
                if name.rpartition(".")[2] in MATRICES:
                    self.bert.encoder.set_submodule(name, Adapted(layer))
        self.rows = torch.arange(len(self.table))
        """The words that ``word_embeddings`` has now."""

    @property
    def table(self) -> torch.Tensor:
        """The published embeddings of words."""
        return self.published["embeddings.word_embeddings.weight"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores, one row for each row of tokens, which are numbers of published words."""
        seen = tokens != 0
        states = self.bert(torch.searchsorted(self.rows, tokens), attention_mask=seen).last_hidden_state
        return self.classifier((states * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True).to(states.dtype))

    def trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What learns, by its name in a state; of the embeddings of words it is those in use."""
        for name, weight in self.named_parameters():
            if weight.requires_grad:
                yield ADAPTER + name if self.lora and name.startswith("bert.") else name.removeprefix("bert."), weight

    def take(self, state: State, tokens: torch.Tensor) -> None:
        """Go on from a state. Only the words in ``tokens`` are needed: nothing would move the others."""
        if not self.lora:
            self.rows = torch.unique(torch.cat((tokens.flatten(), torch.tensor([0]))))
            words = state["embeddings.word_embeddings.weight"][self.rows]
            self.bert.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(words, freeze=False)
        with torch.no_grad():
            for name, weight in self.trained():
                if not name.startswith("embeddings.word_embeddings"):
                    weight.copy_(state[name])

    def state(self, before: State) -> State:
        """What it is now: of words and layers that are not in use, what they were."""
        after = dict(before)
        for name, weight in self.trained():
            if name == "embeddings.word_embeddings.weight":
                after[name] = before[name].index_copy(0, self.rows, weight.detach())
            else:
                after[name] = weight.detach()
        return after

    def first(self) -> State:
        """The state before round 1."""
        own = {name: weight.detach() for name, weight in self.trained()}
        return own if self.lora else self.published | own


@dataclass(frozen=True)
class Bench:
    """The sites' data and the model, which the commands are about."""

    model: Classifier
    known: Examples
    held_out: Examples
    sites: list[torch.Tensor]

    def begin(self, out: str) -> dict[str, object]:
        """Write the first state."""
        write(self.model.first(), out)
        return {"sites": [len(rows) for rows in self.sites]}

    def train(
        self, weights: str, site: int, round: int, out: str, rate: float = 1.0, flip: bool = False
    ) -> dict[str, object]:
        """A site's steps of one round."""
        before = load_file(weights)
        order = torch.Generator().manual_seed(SEED + 1000 * round + site)
        chosen = torch.randint(len(self.sites[site]), (STEPS, BATCH), generator=order)
        tokens, labels = self.known.tokens[self.sites[site][chosen]], self.known.labels[self.sites[site][chosen]]
        if flip:
            labels = len(PARTS) - 1 - labels
        self.model.take(before, tokens)
        head = list(self.model.classifier.parameters())
        body = [weight for name, weight in self.model.trained() if not name.startswith("classifier.")]
        own = (LORA_RATE if self.model.lora else RATE) * rate
        optimisers = (
            torch.optim.AdamW(body, lr=own, weight_decay=0.0, fused=True),
            torch.optim.SGD(head, lr=HEAD_RATE * rate),
        )
        for step in range(STEPS):
            loss = torch.nn.functional.cross_entropy(self.model(tokens[step]), labels[step])
            self.model.zero_grad()
            loss.backward()
            for optimiser in optimisers:
                optimiser.step()
        write(self.model.state(before), out)
        return {"loss": float(loss.detach()), "examples": len(self.sites[site])}

    def evaluate(self, weights: str, rows: int) -> dict[str, object]:
        """Which held-out sentences are right, and the mean loss."""
        tokens, labels = self.held_out.tokens[:rows], self.held_out.labels[:rows]
        self.model.take(load_file(weights), tokens)
        with torch.no_grad():
            scores = torch.cat([self.model(part) for part in tokens.split(50)])
        right = (scores.argmax(1) == labels).tolist()
        loss = torch.nn.functional.cross_entropy(scores, labels)
        return {"right": "".join("1" if yes else "0" for yes in right), "loss": float(loss)}


def write(state: State, out: str) -> None:
    """Tensors as a file."""
    save_file({name: x.contiguous() for name, x in state.items()}, out)


def main() -> None:
    """Do what stdin says until it ends."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.train_federated", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="the directory of all-MiniLM-L6-v2")
    parser.add_argument("text", type=Path, help="where the tokens are kept; made if it is not there")
    parser.add_argument("--lora", action="store_true", help="adapters and the head learn, nothing else")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder that are used, from the first on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.text.exists():
        prepare(options.model, options.text)
    text = np.load(options.text)
    tokens, labels = torch.from_numpy(text["tokens"]), torch.from_numpy(text["labels"])
    bench = Bench(
        Classifier(options.model, options.layers, lora=options.lora),
        Examples(tokens[HELD_OUT:], labels[HELD_OUT:]),
        Examples(tokens[:HELD_OUT], labels[:HELD_OUT]),
        split(text["labels"][HELD_OUT:]),
    )
    commands: dict[str, Callable[..., dict[str, object]]] = {
        "begin": bench.begin,
        "train": bench.train,
        "evaluate": bench.evaluate,
    }
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(commands[asked.pop("do")](**asked)), flush=True)


if __name__ == "__main__":
    main()
