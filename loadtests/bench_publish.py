"""Publishing beside ``sha256sum`` of the same files, one core each: ``make bench-publish``.

2 GB of safetensors in the shapes of TinyLlama, from the page cache to a directory, in alternating rounds on one core.
Seconds of the processor are told beside those of the clock, since other programs may have been in the way. The goal is
0.7 of sha256sum's speed. Where that is linked to OpenSSL, it has the SHA-256 that Python has, and then the goal cannot
be met: a shard and its file have different hashes, so each byte is hashed twice, and a third time for pieces.
"""

from __future__ import annotations

import argparse
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from loadtests.report import console, note, processor, version
from loadtests.services import workspace
from shared.tensorfile import TensorEntry, make_header

MEMORY = 256 << 20
GOAL = 0.7
HIDDEN, KEYS, INNER, WORDS = 2048, 256, 5632, 32_000
ENDS = {"embed_tokens": WORDS * HIDDEN, "lm_head": WORDS * HIDDEN}
LAYER = {
    **{
        f"self_attn.{name}_proj": HIDDEN * size for name, size in zip("qkvo", (HIDDEN, KEYS, KEYS, HIDDEN), strict=True)
    },
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), HIDDEN * INNER),
    **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), HIDDEN),
}
"""Numbers of 16 bits in the tensors of TinyLlama, which has 22 layers."""


@dataclass(frozen=True)
class Run:
    """One program's run: seconds by the clock, seconds of the processor, bytes resident at its peak."""

    wall: float
    cpu: float
    rss: int


def make_files(folder: Path, size: int, count: int) -> list[Path]:
    """Safetensors files of about ``size`` bytes together, of random bytes."""
    files = []
    for number in range(1, count + 1):
        tensors, position, shapes = [], 0, ENDS
        while position < size // count:
            for name, numbers in shapes.items():
                entry = TensorEntry(f"{number}.{position}.{name}", "BF16", (numbers,), position, position + numbers * 2)
                tensors.append((entry.name, entry))
                position = entry.end
            shapes = LAYER
        path = folder / f"model-{number:05}-of-{count:05}.safetensors"
        with path.open("wb") as file:
            file.write(make_header(tensors, {"format": "pt"}))
            for start in range(0, position, 16 << 20):
                file.write(os.urandom(min(16 << 20, position - start)))
        files.append(path)
    return files


def run(core: int, *words: str) -> Run:
    """A program on one core, to its end."""
    begun = time.perf_counter()
    process = subprocess.Popen(["taskset", "-c", str(core), *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words[0]} ended with {process.returncode}")
    return Run(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def median(runs: list[Run]) -> Run:
    """Of each figure; the worst of memory."""
    wall, cpu = (statistics.median(getattr(run, name) for run in runs) for name in ("wall", "cpu"))
    return Run(wall, cpu, max(run.rss for run in runs))


def main() -> None:
    """Make the files, run all in turn, say what came out."""
    parser = argparse.ArgumentParser(prog="make bench-publish", description=__doc__)
    parser.add_argument("--size", type=int, default=2_000_000_000, help="bytes of the model")
    parser.add_argument("--files", type=int, default=1, help="files that it is in; one is the task `all` as it stands")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where files and store are; a temporary folder by default")
    args = parser.parse_args()
    with workspace("bench-publish", args.folder) as directory:
        model, store, keys, empty = (directory / part for part in ("model", "store", "keys", "empty"))
        model.mkdir()
        note(f"making {args.size / 1e9:.1f} GB")
        files = make_files(model, args.size, args.files)
        size = sum(file.stat().st_size for file in files)
        nearshard = [sys.executable, "-m", "nearshard"]
        begin = ["trust", "init", "--store", str(empty), "--keys", str(keys), "--org", "acme"]
        subprocess.run([*nearshard, *begin], stdout=subprocess.DEVNULL, check=True)
        publish = [*nearshard, "publish", str(model), "acme/bench", "--store", str(store), "--keys", str(keys)]
        programs = {
            "sha256sum": ["sha256sum", *map(str, files)],
            "publish": publish,
            "publish --no-pieces": [*publish, "--no-pieces"],
        }
        runs: dict[str, list[Run]] = {program: [] for program in programs}
        for _ in range(args.rounds):
            for program, words in programs.items():
                shutil.copytree(empty, store)
                runs[program].append(run(args.core, *words))
                shutil.rmtree(store)
                os.sync()  # what one wrote is not to be written in another's time
                note(f"{program}: {runs[program][-1]}")
    show(size, {program: median(found) for program, found in runs.items()})


def show(size: int, runs: dict[str, Run]) -> None:
    """The table."""
    table = Table("", "MB/s", "of sha256sum's", "MB per s of processor", "of sha256sum's", "peak memory", "met")
    base = runs["sha256sum"]
    for program, run in runs.items():
        ratio = base.cpu / run.cpu
        met = "" if run is base else "yes" if ratio >= GOAL and run.rss < MEMORY else "no"
        table.add_row(
            program,
            f"{size / 1e6 / run.wall:.0f}",
            f"{base.wall / run.wall:.2f}",
            f"{size / 1e6 / run.cpu:.0f}",
            f"{ratio:.2f}",
            f"{run.rss / 1e6:.0f} MB",
            met,
        )
    out = console()
    out.print(table)
    libraries = subprocess.run(["ldd", shutil.which("sha256sum") or ""], capture_output=True, text=True).stdout
    kind = "OpenSSL" if "libcrypto" in libraries else "its own SHA-256"
    out.print(
        f"{processor()}; {'SHA' if 'sha_ni' in Path('/proc/cpuinfo').read_text() else 'no SHA'} instructions; "
        f"coreutils {version('sha256sum', '--version')} with {kind}; "
        f"{ssl.OPENSSL_VERSION}; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
