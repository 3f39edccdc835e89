"""``nearshard import``: from another network as a hub, through the real huggingface_hub; by its signatures; and what is
refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.errors import EXIT_AUTH, EXIT_NETWORK, EXIT_NOT_FOUND, EXIT_USAGE
from tests.harness import Lab, Service, command, get_json, make_model

NAME = "acme/tiny"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Service]:
    """The origin of another network, which has a model."""
    lab = Lab(_folder(tmp_path / "elsewhere"))
    make_model(tmp_path / "model")
    (tmp_path / "model" / "notes").mkdir()
    (tmp_path / "model" / "notes" / "a b+c.txt").write_text("odd")
    lab.publish(tmp_path / "model", NAME)
    yield lab.origin()
    lab.close()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Lab]:
    """This network."""
    lab = Lab(_folder(tmp_path / "here"))
    yield lab
    lab.close()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def hub(origin: Service, folder: Path) -> Any:
    """The environment of a user whose hub this is."""
    return {"HF_ENDPOINT": origin.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}


def imported(lab: Lab, *words: str, **env: Any) -> dict[str, object]:
    """What an import into a lab's store gives."""
    done = command("import", *words, "--store", str(lab.store), "--json", **env)
    document: dict[str, object] = json.loads(done.stdout)
    return document


def same_files(lab: Lab, model: str, directory: Path) -> None:
    """Whether a lab has the files of a directory, byte for byte."""
    out = lab.folder / "out"
    origin = lab.origin()
    command("pull", model, "--router", origin.url, "-o", str(out))
    for file in (path for path in directory.rglob("*") if path.is_file() and path.name != "nearshard.toml"):
        assert (out / file.relative_to(directory)).read_bytes() == file.read_bytes(), file


def test_a_model_of_a_hub(elsewhere: Service, here: Lab, tmp_path: Path) -> None:
    done = imported(here, f"hf://{NAME}", "acme/copy", **hub(elsewhere, tmp_path))
    assert (done["model"], done["ref"]) == ("acme/copy", "main")
    same_files(here, "acme/copy", tmp_path / "model")
    refs = get_json(f"{here.origin().url}/models/acme/copy")["refs"]
    sha = get_json(f"{elsewhere.url}/api/models/{NAME}")["sha"]
    assert refs["main"]["source"] == {"hub": elsewhere.url, "model": NAME, "commit": sha, "followed": False}
    assert not [path for path in (here.folder / "import").iterdir() if path.is_dir()], "nothing is kept twice"
    again = imported(here, f"{elsewhere.url}/{NAME}/tree/main", "acme/copy", **hub(elsewhere, tmp_path))
    assert not again["changed"], "a page of the hub names the same"


def test_a_model_of_another_network_by_its_signatures(elsewhere: Service, here: Lab, tmp_path: Path) -> None:
    done = imported(here, f"{elsewhere.url}/models/{NAME}")
    assert done["model"] == NAME
    same_files(here, NAME, tmp_path / "model")


def test_a_directory(here: Lab, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    assert imported(here, str(tmp_path / "model"), NAME)["changed"]


def test_what_is_refused_says_what_to_do(elsewhere: Service, here: Lab, tmp_path: Path) -> None:
    env = hub(elsewhere, tmp_path)
    for what, code, words in (
        ("ftp://host/model", EXIT_USAGE, "org/model"),
        ("https://host/model.tar.gz", EXIT_USAGE, "unpack"),
        ("hf://../../etc", EXIT_USAGE, "not a name"),
        ("hf://gpt2", EXIT_USAGE, "say what it is to be called"),
        (str(tmp_path / "nothing"), EXIT_USAGE, "not a directory"),
        ("hf://acme/nothing", EXIT_NOT_FOUND, "HF_TOKEN"),
        (f"hf://{NAME}@v9", EXIT_NOT_FOUND, "no such revision"),
    ):
        done = command("import", what, "--store", str(here.store), check=False, **env)
        assert done.returncode == code, (what, done.stderr)
        assert words in done.stderr, (what, done.stderr)


def test_a_hub_that_is_away_is_an_error_of_the_network(here: Lab, tmp_path: Path) -> None:
    env: Any = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    done = command("import", f"hf://{NAME}", "--store", str(here.store), check=False, **env)
    assert done.returncode == EXIT_NETWORK, done.stderr


def test_who_may_not_publish_fetches_nothing(elsewhere: Service, here: Lab, tmp_path: Path) -> None:
    here.trust("add-publisher", "acme", "--key-file", str(tmp_path / "theirs.pem"))
    done = command("import", f"hf://{NAME}", "--store", str(here.store), check=False, **hub(elsewhere, tmp_path))
    assert done.returncode == EXIT_AUTH, done.stderr
    assert not (here.folder / "import").exists()
