"""Switching in the local repository: files from a real origin, and a process that is killed at each step."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nearshard import Repository, SyncClient
from nearshard.activation import Activation, Incomplete
from nearshard.repository import Active
from nearshard.switches import Switches
from shared.digest import Digest
from shared.errors import NotFound
from shared.ids import commit_of
from tests.harness import Lab, Service, command, make_model, result

MODEL = "acme/tiny"

KILLED = """
import json, os, signal, sys
from pathlib import Path
from nearshard.activation import Activation
from nearshard.repository import Repository
from nearshard.switches import Switches
root, new = Path(sys.argv[1]), sys.argv[2]
activation, switches = Activation(Repository(root), "acme/tiny"), Switches(root, "acme/tiny")
link, note = switches.path("main"), root / "models/acme/tiny/switches/main.json"
watched, steps, die_at = False, 0, 0
def step(event, arguments):
    global steps
    if watched and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.symlink", "fcntl.flock"):
        steps += 1
        if steps == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(step)
for act in (lambda: activation.activate(new, "main"), lambda: activation.roll_back("main")):
    before, states, ended, die_at = (os.readlink(link), note.read_bytes()), [], 1, 0
    while ended:
        link.unlink()
        link.symlink_to(before[0])
        note.write_bytes(before[1])
        die_at += 1
        child = os.fork()
        if not child:
            watched = True
            act()
            os._exit(0)
        _, ended = os.waitpid(child, 0)
        now = switches.now("main")
        states.append([now.active, now.previous, now.left, link.resolve().name])
    print(json.dumps(states))
"""
"""Activates, then rolls back, each killed before its first step, its second one, and so on; what was active then."""


@dataclass
class Versions:
    """An origin with two revisions of a model, at refs of their own and, in turn, at ``main``."""

    lab: Lab
    origin: Service
    first: Digest
    second: Digest

    def get(self, home: Path, what: str = MODEL) -> Path | None:
        """Fetch; where programs find it, if it is active."""
        return SyncClient(self.origin.url, repository=home).get(what).active


@pytest.fixture(scope="module")
def versions(shared_lab: Lab) -> Versions:
    folder, revisions = shared_lab.folder / "model", []
    for seed in (1, 2):
        make_model(folder, seed=seed, width=64)
        revisions.append(Digest(shared_lab.publish(folder, MODEL, "--ref", f"v{seed}")))
    return Versions(shared_lab, shared_lab.origin(), *revisions)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository of a test."""
    where = tmp_path / "repository"
    monkeypatch.setenv("NEARSHARD_REPOSITORY", str(where))
    return where


def test_a_process_that_is_killed_at_any_step_leaves_the_old_or_the_new_revision(
    versions: Versions, home: Path
) -> None:
    """F4: with what was before it, so that a rollback that was cut off can be done again."""
    first, second = versions.first, versions.second
    for revision in (first, second):
        versions.get(home, f"{MODEL}@{revision}")
    Activation(Repository(home), MODEL).activate(first, "main")
    done = subprocess.run([sys.executable, "-c", KILLED, str(home), second], capture_output=True, text=True, check=True)
    activated, rolled_back = map(json.loads, done.stdout.splitlines())
    old = [first, None, None, commit_of(first)]
    new = [second, first, None, commit_of(second)]
    back = [first, second, second, commit_of(first)]
    for states, before, after in ((activated, old, new), (rolled_back, new, back)):
        switched = states.index(after)
        assert states == [before] * switched + [after] * (len(states) - switched)
        assert switched > 10 and len(states) - switched > 1, "it was killed before the switch and after it"


def test_fetching_a_ref_moves_its_path_when_all_is_there_that_was(versions: Versions, home: Path) -> None:
    def publish(seed: int) -> None:
        make_model(versions.lab.folder / "model", seed=seed, width=64)
        versions.lab.publish(versions.lab.folder / "model", MODEL, "--ref", "next")

    publish(1)
    path = home / "models" / MODEL / "refs" / "next"
    assert versions.get(home, f"{MODEL}:half@next") == versions.get(home, f"{MODEL}:embed@next") == path
    publish(2)
    assert versions.get(home, f"{MODEL}:half@next") is None, "a program may read the other task there"
    assert path.resolve().name == commit_of(versions.first)
    with pytest.raises(Incomplete):
        Activation(Repository(home), MODEL).activate(versions.second, "next")
    assert versions.get(home, f"{MODEL}:embed@next") == path
    assert path.resolve().name == commit_of(versions.second)
    assert Activation(Repository(home), MODEL).roll_back("next").active == versions.first
    assert versions.get(home, f"{MODEL}:half@next") is None, "what was rolled back from is not gone to by itself"
    publish(3)
    versions.get(home, f"{MODEL}:half@next")
    assert versions.get(home, f"{MODEL}:embed@next") == path
    assert Switches(home, MODEL).all()["next"].previous == versions.first


def test_by_the_command_with_nobody_to_ask(versions: Versions, home: Path) -> None:
    for ref in ("v1", "v2"):
        versions.get(home, f"{MODEL}@{ref}")
    assert command("rollback", MODEL, check=False).returncode == 8
    for ref in ("v1", "v2"):
        found = json.loads(command("activate", f"{MODEL}@{ref}", "--as", "main", "--json").stdout)
    assert (found["active"], found["previous"]) == (versions.second, versions.first)
    assert found["path"] in command("show", f"{MODEL}@v2").stdout and "main*" in command("ls").stdout
    with pytest.raises(Active):
        Repository(home).remove(MODEL, "v2")
    assert json.loads(command("rollback", MODEL, "--json").stdout)["active"] == versions.first
    Repository(home).remove(MODEL, "v2", force=True)
    with pytest.raises(NotFound):
        Activation(Repository(home), MODEL).roll_back("main")
    assert list(Switches(home, MODEL).all()) == ["main", "v1"]


def test_a_repository_that_stays_at_a_revision_asks_nobody_what_the_ref_means(versions: Versions, home: Path) -> None:
    assert versions.get(home, f"{MODEL}@v1")
    command("activate", f"{MODEL}@v1", "--as", "v2", "--stay")
    done = command("get", f"{MODEL}@v2", "--json", "--router", "http://127.0.0.1:9")
    assert result(done)["revision"] == versions.first
    command("activate", f"{MODEL}@v1", "--as", "v2")
    assert versions.get(home, f"{MODEL}@v2") and Switches(home, MODEL).all()["v2"].active == versions.second


@pytest.mark.parametrize("junk", [b"", b"\xff", b"{}", b'{"states": [{"active": 1}]}'])
def test_a_lost_note_costs_the_way_back_and_nothing_else(versions: Versions, home: Path, junk: bytes) -> None:
    versions.get(home, f"{MODEL}@v1")
    (home / "models" / MODEL / "switches" / "v1.json").write_bytes(junk)
    assert Switches(home, MODEL).all()["v1"].active == versions.first
    assert versions.get(home, f"{MODEL}@v1")
