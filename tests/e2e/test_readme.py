"""The commands of the README and of the tutorial's first step, in order, as somebody types them who has never seen the
project.

They are read from the pages (blocks that are marked `sh run`), so what is there works. What differs from such a user's:
the port, which may be taken on this machine, and the model, which is smaller.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness import make_model, wait_until
from tests.pages import ROOT, runnable

README, TUTORIAL = ROOT / "README.md", ROOT / "docs" / "tutorial.md"
ROUTER = "http://127.0.0.1:8700"
"""As the README has it."""
WORDS = ["nearshard up", "nearshard publish", "nearshard get", "nearshard ls", "curl", "aria2c", "HF_ENDPOINT="]
"""What its commands begin with, in order."""


INSTALLS = (". ", "python3 -m venv", "pip install")
"""What makes nearshard be there: it is, here."""


def commands(page: Path) -> list[str]:
    """The commands to type by hand."""
    return [line for block in runnable(page) for line in block if not line.startswith(INSTALLS)]


class NewUser:
    """Somebody with an empty home directory, who has a model and a shell."""

    def __init__(self, home: Path) -> None:
        self.home = home
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("XDG_", "NEARSHARD_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        self.env = {**kept, "HOME": str(home), "PATH": path}
        self.router = ROUTER

    def types(self, line: str) -> str:
        """Run a command to its end; what it printed."""
        words, env = ["sh", "-c", line.replace(ROUTER, self.router)], {**self.env, "NEARSHARD_ROUTER": self.router}
        done = subprocess.run(words, cwd=self.home, env=env, capture_output=True, text=True, timeout=90, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}{done.stdout}"
        return done.stdout

    def starts(self, line: str) -> subprocess.Popen[bytes]:
        """Run the network, on ports that are free, until it is ready."""
        ready = self.home / "ready.json"
        words = [*shlex.split(line), "--port", "0", "--ready-file", str(ready)]
        with (self.home / "up.log").open("wb") as log:
            network = subprocess.Popen(words, cwd=self.home, env=self.env, stderr=log, stdout=log)
        wait_until(lambda: ready.exists() or network.poll() is not None, "the network ready", 60)
        assert network.poll() is None, (self.home / "up.log").read_text()
        self.router = json.loads(ready.read_text())["router"]
        return network


@contextmanager
def new_user(home: Path, page: Path) -> Iterator[NewUser]:
    """One whose network runs, as the first command of a page starts it."""
    new = NewUser(home)
    network = new.starts(commands(page)[0])
    yield new
    network.send_signal(signal.SIGINT)
    assert network.wait(40) == 0


def test_the_readme_has_these_commands_in_this_order() -> None:
    assert [line[: len(words)] for line, words in zip(commands(README), WORDS, strict=True)] == WORDS


def test_a_new_user_gets_the_model_by_each_of_them(tmp_path: Path, need: Callable[[str], str]) -> None:
    need("curl"), need("aria2c")
    with new_user(tmp_path, README) as user:
        check_readme(user)


def check_readme(user: NewUser) -> None:
    """Each command of the README does what the page says."""
    _, publish, get, listing, curl, aria2, hub = commands(README)
    published = user.home / shlex.split(publish)[2]
    make_model(published)
    assert "demo/minilm" in user.types(publish)
    whole = (published / "model.safetensors").read_bytes()

    assert "demo/minilm sha256:" in user.types(get)
    (fetched,) = (user.home / "minilm").glob("*.safetensors")
    assert fetched.read_bytes() == whole
    assert "demo/minilm" in user.types(listing)

    user.types(curl)
    assert (user.home / "model.safetensors").read_bytes() == whole
    (user.home / "model.safetensors").unlink()

    before = set(user.home.iterdir())
    user.types(aria2)
    (got,) = set(user.home.iterdir()) - before
    assert got.read_bytes() == whole

    user.types(hub)
    (downloaded,) = (user.home / ".cache" / "huggingface" / "hub").glob("*/snapshots/*/model.safetensors")
    assert downloaded.read_bytes() == whole

    user.types(get.replace("demo/minilm", "demo/minilm:embed").replace("minilm/", "embed/"))
    assert (user.home / "embed" / "tokenizer.json").exists()

    doctor = user.types("nearshard doctor --json")
    assert {"reach"} <= {one["check"] for one in json.loads(doctor)["findings"] if one["status"] == "ok"}


def test_the_first_step_of_the_tutorial_runs(tmp_path: Path, need: Callable[[str], str]) -> None:
    need("curl")
    with new_user(tmp_path, TUTORIAL) as user:
        _, publish, cold, warm, headers = commands(TUTORIAL)
        make_model(user.home / shlex.split(publish)[2], width=64)
        user.types(publish)
        assert "fill-origin" in user.types(cold)
        said = user.types(warm)
        assert "hit-" in said and "fill-" not in said
        assert "hit-" in user.types(headers)
