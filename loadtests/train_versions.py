"""Versions really trained from a real model, for ``make bench-delta``; run in a virtual environment of its own.

The task: which library does a sentence come from? The sentences are those of the docstrings of the libraries in the
environment itself, whose versions ``requirements-train.txt`` fixes, without the library's name; so nothing has to be
downloaded for it, and one environment always gives the same text. Seeds and the number of threads are fixed too.

In ``OUT``, each version is ``<kind>/model.safetensors``, bases among them (``base``, their casts and so on), and
``versions.json`` says of each kind what it was made from and how.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import random
import re
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn.utils import parametrize
from transformers import BertConfig, BertModel

SEED, PROCESSES = 7, 2
"""Each version is trained by one thread, so that it comes out the same each time; two at once."""
LIBRARIES = ("networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers")
SENTENCES, HELD_OUT = 2000, 500
"""Sentences of each library at most; those of all that are kept for the accuracy."""
WORDS, TOKENS = 8, 24
"""The least words of a sentence; the most tokens that are looked at."""
BATCH, RATE, HEAD_RATE, DECAY = 16, 2e-5, 1e-3, 0.01
RANK, ALPHA, LORA_RATE = 8, 16, 5e-4
"""LoRA's rank and scale, and its rate of learning: its factors begin at zero and are few, so theirs is higher."""
FILE = "model.safetensors"

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Made:
    """A version: what it is compared with, and how it came about."""

    base: str
    title: str
    steps: int = 0
    accuracy: float = 0.0
    """On held-out sentences, 0 to 1; 0 where it was not looked at."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Examples:
    """Sentences as rows of token ids, and each one's library."""

    tokens: torch.Tensor
    labels: torch.Tensor


# The text


def sentences(library: str) -> list[str]:
    """Sentences of a library's docstrings, in an order that is random and always the same."""
    root = Path(sysconfig.get_paths()["purelib"]) / library
    chance = random.Random(SEED)
    files = sorted(file for file in root.rglob("*.py") if "tests" not in file.parts)
    chance.shuffle(files)
    found: dict[str, None] = {}
    for file in files:
        found |= dict.fromkeys(told_in(file.read_text(errors="replace"), library))
        if len(found) >= SENTENCES:
            break
    kept = list(found)[:SENTENCES]
    chance.shuffle(kept)
    return kept


def told_in(source: str, library: str) -> Iterator[str]:
    """The sentences of the docstrings of one file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's escapes
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except SyntaxError:  # written for a later Python
            return
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                sentence = " ".join(paragraph.split())
                if ">>>" not in sentence and len(re.findall(r"[a-z]{2,}", sentence)) >= WORDS:
                    yield re.sub(library, "", sentence, flags=re.IGNORECASE)


def examples(tokenizer: Tokenizer) -> tuple[Examples, Examples]:
    """What is trained on, and what is held out."""
    labelled = [(text, label) for label, library in enumerate(LIBRARIES) for text in sentences(library)]
    random.Random(SEED).shuffle(labelled)
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    tokens = torch.tensor([found.ids for found in tokenizer.encode_batch([text for text, _ in labelled])])
    labels = torch.tensor([label for _, label in labelled])
    return Examples(tokens[HELD_OUT:], labels[HELD_OUT:]), Examples(tokens[:HELD_OUT], labels[:HELD_OUT])


# The model


class Classifier(torch.nn.Module):
    """The model with a head: the mean of its last states, and a linear layer upon it."""

    def __init__(self, model: Path) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        config = BertConfig.from_pretrained(model, attn_implementation="sdpa")
        self.bert = BertModel(config)
        self.published = load_file(model / FILE)
        self.bert.load_state_dict({name: x for name, x in self.published.items() if not name.endswith("position_ids")})
        self.classifier = torch.nn.Linear(config.hidden_size, len(LIBRARIES))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scores, one row for each row of tokens."""
        seen = tokens != 0
        states = self.bert(tokens, attention_mask=seen).last_hidden_state
        return self.classifier((states * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True).to(states.dtype))

    def state(self, *, head: bool = False) -> State:
        """What is published: the model's tensors, those that it does not use as they were; and its head."""
        state = self.published | {name: x.detach().clone() for name, x in self.bert.state_dict().items()}
        if head:
            state |= {f"classifier.{name}": x.detach().clone() for name, x in self.classifier.state_dict().items()}
        return state


class Lora(torch.nn.Module):
    """A matrix with an update of low rank (Hu et al. 2021), which merging leaves in it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(RANK, weight.shape[1]) / RANK)
        self.up = torch.nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The matrix with the update."""
        return weight + (self.up @ self.down) * (ALPHA / RANK)


def share(step: int, steps: int, *, constant: bool) -> float:
    """Of the rate, at a step: it grows for the first tenth of the steps, then falls to nothing, as is usual."""
    warm = max(1, steps // 10)
    return 1.0 if constant else min((step + 1) / warm, (steps - step) / (steps - warm + 1))


def train(
    model: Classifier,
    data: Examples,
    steps: int,
    recipe: Recipe,
    seen: Callable[[int], None] = lambda step: None,
    *,
    constant: bool = False,
) -> None:
    """AdamW on whatever of the model is to be trained; the head learns faster. ``seen`` is called after each step."""
    body = [weight for weight in model.bert.parameters() if weight.requires_grad]
    groups = [{"params": list(model.classifier.parameters()), "lr": HEAD_RATE}]
    if body:
        groups.append({"params": body, "lr": LORA_RATE if recipe.lora else RATE})
    optimiser = torch.optim.AdamW(groups, weight_decay=recipe.decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(share, steps=steps, constant=constant))
    order = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)  # of dropout
    model.train()
    for step in range(1, steps + 1):
        rows = torch.randint(len(data.labels), (BATCH,), generator=order)
        loss = torch.nn.functional.cross_entropy(model(data.tokens[rows]).float(), data.labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        seen(step)


def accuracy(model: Classifier, data: Examples) -> float:
    """The share of sentences whose library it finds."""
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(tokens).argmax(1) == labels).sum())
            for tokens, labels in zip(data.tokens.split(100), data.labels.split(100), strict=True)
        )
    return right / len(data.labels)


# The versions


@dataclass(frozen=True)
class Recipe:
    """How a version is trained: the weights whose names match, or LoRA on the matrices whose names match."""

    title: str
    weights: str = ".*"
    lora: str = ""
    base: str = "base"
    decay: float = DECAY
    dtype: torch.dtype = torch.float32
    head: bool = False
    """Whether the versions have the head."""
    quick: bool = False
    """Whether it is one of the quick run's."""


RECIPES = {
    "all": Recipe("all weights, fp32", quick=True),
    "last-two": Recipe("last two layers, fp32", r"encoder\.layer\.[45]\."),
    "lora-attention": Recipe("LoRA on attention, merged, fp32", lora=r".*\.(query|value)"),
    "lora-all": Recipe("LoRA on all matrices, merged, fp32", lora=r"encoder\..*\.(query|key|value|dense)", quick=True),
    "head": Recipe("head only, fp32", "nothing", base="base-head", head=True, quick=True),
    "all-no-decay": Recipe("all weights, fp32, no weight decay", decay=0.0),
    "trained-bf16": Recipe("trained in bf16 throughout", base="base-bf16", dtype=torch.bfloat16),
}
CASTS: dict[str, tuple[str, Sequence[str]]] = {
    "bf16": ("cast to bf16", ("all", "last-two")),
    "fp16": ("cast to fp16", ("all",)),
    "int8": ("int8 quantised", ("all",)),
}
"""The title of each cast, and the versions that it is made of."""


@dataclass(frozen=True)
class Workshop:
    """Where versions are made."""

    model: Path
    out: Path
    steps: int
    early: int
    """Steps after which the version with all weights is kept once more."""
    known: Examples
    held_out: Examples
    constant: bool = False
    """Whether the rate of learning stays as it is."""

    def train(self, kind: str) -> dict[str, Made]:
        """Train a version and keep it. Gives what was kept, by its kind."""
        torch.set_num_threads(1)
        recipe, began, kept = RECIPES[kind], time.monotonic(), dict[str, Made]()
        model = Classifier(self.model).to(recipe.dtype)
        adapted = adapt(model, recipe)

        def keep(kind: str, title: str, steps: int) -> None:
            write(self.out / kind, model.state(head=recipe.head))
            made = Made(recipe.base, title, steps, accuracy(model, self.held_out), time.monotonic() - began)
            print(f"{kind}: {made}", flush=True)
            kept[kind] = made

        def seen(step: int) -> None:
            if kind == "all" and step == self.early:
                keep(f"all-{step}", f"{recipe.title}, {step} steps on", step)
                model.train()

        if recipe.head:
            write(self.out / recipe.base, model.state(head=True))
        train(model, self.known, self.steps, recipe, seen, constant=self.constant)
        for layer in adapted:
            parametrize.remove_parametrizations(layer, "weight")
        keep(kind, recipe.title, self.steps)
        return kept

    def cast(self, name: str, made: Mapping[str, Made]) -> dict[str, Made]:
        """Versions that were made, and their base, in another form. Gives what was kept, by its kind."""
        title, kinds = CASTS[name]
        found = {kind: made[kind] for kind in kinds if kind in made}
        for kind in ("base", *found):
            write(self.out / f"{kind}-{name}", FORMS[name](load_file(self.out / kind / FILE)))
        return {
            f"{kind}-{name}": Made(f"{version.base}-{name}", version.title.replace("fp32", title), version.steps)
            for kind, version in found.items()
        }


def adapt(model: Classifier, recipe: Recipe) -> list[torch.nn.Module]:
    """Let the recipe's weights learn and no others; the layers that got LoRA."""
    for name, weight in model.bert.named_parameters():
        weight.requires_grad = not recipe.lora and bool(re.match(recipe.weights, name))
    layers = [layer for name, layer in model.bert.named_modules() if recipe.lora and re.fullmatch(recipe.lora, name)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", Lora(layer.weight))
    return layers


def write(folder: Path, state: State) -> None:
    """A version, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f"{FILE}.half"
    save_file({name: x.contiguous() for name, x in state.items()}, half, {"format": "pt"})
    half.chmod(0o644)
    half.replace(folder / FILE)


def floats(dtype: torch.dtype) -> Callable[[State], State]:
    """Every float as another one."""
    return lambda state: {name: x.to(dtype) if x.is_floating_point() else x for name, x in state.items()}


def quantised(state: State) -> State:
    """Matrices as int8 with a scale for each row, as quantisers without calibration have them."""
    made: State = {}
    for name, x in state.items():
        if x.is_floating_point() and x.dim() == 2:
            scale = x.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            made[name], made[f"{name}_scale"] = (x / scale).round().to(torch.int8), scale
        else:
            made[name] = x
    return made


FORMS = {"bf16": floats(torch.bfloat16), "fp16": floats(torch.float16), "int8": quantised}


def main() -> None:
    """Make all versions, or the quick ones."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.train_versions", description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="the directory of all-MiniLM-L6-v2")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--constant", action="store_true", help="no warm-up, and the same rate to the end")
    parser.add_argument("--quick", action="store_true", help="some kinds, after a few steps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there must be no thread that a fork could lose
    known, held_out = examples(Tokenizer.from_file(str(options.model / "tokenizer.json")))
    steps, early = (12, 4) if options.quick else (options.steps, 50)
    if options.quick:
        held_out = Examples(held_out.tokens[:100], held_out.labels[:100])
    workshop = Workshop(options.model, options.out, steps, early, known, held_out, options.constant)
    write(options.out / "base", load_file(options.model / FILE))
    kinds = [kind for kind, recipe in RECIPES.items() if recipe.quick or not options.quick]
    made: dict[str, Made] = {}
    casts = ["bf16", "int8"] if options.quick else [*CASTS]
    for cast in casts:
        workshop.cast(cast, {})  # of the base: some are trained from there
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork")) as pool:
        for kept in pool.map(workshop.train, kinds):
            made |= kept
    for cast in casts:
        made |= workshop.cast(cast, made)
    table = {kind: asdict(version) for kind, version in made.items()}
    (options.out / "versions.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
