"""Publishing real directories: what is cut, what is refused, and what a killed publish leaves."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save_file

from origin.commit import LocalSink
from origin.keyring import load_ring
from origin.publish import IN_FLIGHT, Published, publish
from origin.storage import Storage
from origin.trust_setup import delegate_any
from origin.trust_store import TrustStore
from shared.digest import digest_of, hex_of
from shared.errors import Conflict, NotFound, PublishError, TasksError, TensorFileError
from shared.layout import Slice
from shared.manifest import MIN_PIECE, Manifest
from tests.harness import command, make_model, make_trust

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A new store, with keys beside it."""
    make_trust(tmp_path / "store")
    return Storage(str(tmp_path / "store"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small model's directory."""
    make_model(tmp_path / "model", width=256)
    return tmp_path / "model"


async def put(storage: Storage, model: Path, ref: str = "main", **options: Any) -> tuple[Published, Manifest]:
    """Publish, and read the manifest back."""
    trust, ring = TrustStore(storage), load_ring([Path(storage.location).parent / "keys"])
    await delegate_any(trust, ring, "acme", NOW)
    done = await publish(LocalSink(trust, ring, lambda: NOW), model, "acme/tiny", ref, **options)
    return done, await storage.manifest("acme/tiny", done.revision)


@pytest.mark.parametrize("private", [True, False])
async def test_a_model_does_not_become_public_or_private_by_a_forgotten_word(
    storage: Storage, model: Path, private: bool
) -> None:
    done, manifest = await put(storage, model, private=private)
    with pytest.raises(Conflict) as caught:
        await put(storage, model, "v2", private=not private)
    assert caught.value.error_code == "other_visibility"
    assert not await storage.lacks(manifest.shards, "acme/tiny" if private else "")
    assert await storage.lacks(manifest.shards, "" if private else "acme/tiny") == list(manifest.shards)
    assert (await put(storage, model, "v2", private=private))[0].revision == done.revision


async def read(storage: Storage, slices: Iterable[Slice]) -> bytes:
    """Slices from the store, joined."""
    return b"".join([bytes(part) for s in slices async for part in storage.stream_blob(s.digest, s.offset, s.length)])


async def joined(storage: Storage, manifest: Manifest, task: str) -> bytes:
    """A task's bytes from the store."""
    slices = manifest.tasks[task].layout.slices
    return await read(storage, slices)


async def test_tasks_are_valid_safetensors_of_just_their_tensors(storage: Storage, model: Path) -> None:
    _, manifest = await put(storage, model)
    whole = load((model / "model.safetensors").read_bytes())
    for task, names in {"all": set(whole), "embed": {"embeddings.weight"}}.items():
        body = await joined(storage, manifest, task)
        assert hashlib.sha256(body).hexdigest() == manifest.tasks[task].layout.sha256
        tensors = load(body)
        assert set(tensors) == names
        assert all(np.array_equal(tensors[name], whole[name]) for name in names)
    assert manifest.tasks["all"].layout == manifest.files["model.safetensors"]


async def test_every_piece_of_files_and_tasks_is_hashed(storage: Storage, model: Path) -> None:
    make_model(model, width=1024)
    (model / "vocab.bin").write_bytes(random.Random(3).randbytes(3 * MIN_PIECE + 1))
    _, manifest = await put(storage, model)
    assert manifest.piece_length == MIN_PIECE
    layouts = {**manifest.files, **{name: task.layout for name, task in manifest.tasks.items()}}
    counts = {}
    for name, layout in layouts.items():
        body = await read(storage, layout.slices)
        parts = [body[start : start + MIN_PIECE] for start in range(0, len(body), MIN_PIECE)]
        assert layout.pieces == b"".join(hashlib.sha256(part).digest() for part in parts if len(parts) > 1), name
        counts[name] = len(layout.pieces) // 32
    assert counts["vocab.bin"] == 4 and counts["half"] == 12 and counts["config.json"] == 0


async def test_a_task_pulls_in_no_byte_that_it_does_not_use(storage: Storage, model: Path) -> None:
    _, manifest = await put(storage, model)
    for task in ("all", "embed", "half"):
        layout = manifest.tasks[task].layout
        assert sum(manifest.shards[digest] for digest in layout.shards()) == layout.size


async def test_shards_that_gc_swept_before_they_were_claimed_are_stored_again(storage: Storage, model: Path) -> None:
    """As gc may, where nothing refers to them yet: each time between storing and claiming."""
    trust, ring = TrustStore(storage), load_ring([Path(storage.location).parent / "keys"])
    await delegate_any(trust, ring, "acme", NOW)
    answers: list[bool] = []

    class Swept(LocalSink):
        async def put_manifest(self, manifest: Manifest) -> bool:
            if len(answers) < 2:
                assert not await storage.has_manifest(manifest.model, manifest.revision)
                shards = {hex_of(digest) for digest in manifest.shards}
                paths = [entry.path async for entry in storage.blobs() if entry.path[-64:] in shards]
                await storage.objects.delete(paths[:1])
            answers.append(await super().put_manifest(manifest))
            return answers[-1]

    done = await publish(Swept(trust, ring, lambda: NOW), model, "acme/tiny", "main")
    assert answers == [False, False, True] and done.changed and done.stored == 1
    assert not await storage.lacks((await storage.manifest("acme/tiny", done.revision)).stored)


def times(storage: Storage) -> dict[Path, int]:
    """When each object was written; notes for gc are no part of what is published."""
    root = Path(storage.location)
    return {path: path.stat().st_mtime_ns for part in ("blobs", "models") for path in (root / part).rglob("*")}


async def test_publishing_again_changes_nothing(storage: Storage, model: Path) -> None:
    first, _ = await put(storage, model)
    before = times(storage)
    again, _ = await put(storage, model)
    assert (first.changed, again.changed, again.stored) == (True, False, 0)
    assert again.revision == first.revision
    assert times(storage) == before


async def test_unchanged_tensors_keep_their_shards_in_the_next_revision(storage: Storage, model: Path) -> None:
    tensors = make_model(model, width=1024)
    first, old = await put(storage, model)
    changed = dict(tensors)
    changed["encoder.layer.1.weight"] = tensors["encoder.layer.1.weight"] + 1
    save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
    second, new = await put(storage, model, "v2")
    assert second.revision != first.revision
    fresh = sum(size for digest, size in new.shards.items() if digest not in old.shards)
    assert fresh == changed["encoder.layer.1.weight"].nbytes, "just the tensor that changed"


async def test_several_files_with_their_index_become_one_task(storage: Storage, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    parts = {f"model-0000{n}-of-00002.safetensors": {f"layer.{n}": rng.random((64, 64))} for n in (1, 2)}
    directory = tmp_path / "parts"
    directory.mkdir()
    for name, tensors in parts.items():
        save_file(tensors, directory / name)
    index = {name: file for file, tensors in parts.items() for name in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    _, manifest = await put(storage, directory)
    assert manifest.tasks["all"].filename == "model.safetensors"
    assert set(load(await joined(storage, manifest, "all"))) == {"layer.1", "layer.2"}
    assert "model.safetensors.index.json" in manifest.files
    assert manifest.tasks["all"].files == (), "one merged file needs no index"


async def test_parts_of_a_pipeline_may_use_the_same_names(storage: Storage, tmp_path: Path) -> None:
    for part in ("unet", "vae"):
        (tmp_path / "pipe" / part).mkdir(parents=True)
        save_file({"conv_in.weight": np.ones(4, np.float32)}, tmp_path / "pipe" / part / "model.safetensors")
    _, manifest = await put(storage, tmp_path / "pipe")
    assert set(load(await joined(storage, manifest, "all"))) == {"unet/conv_in.weight", "vae/conv_in.weight"}


async def test_one_weight_file_of_another_kind_is_the_task_all(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    body = random.Random(2).randbytes(12_000_000)
    (tmp_path / "g" / "model.gguf").write_bytes(body)
    done, manifest = await put(storage, tmp_path / "g")
    assert done.tasks == ("all",)
    assert await joined(storage, manifest, "all") == body
    (tmp_path / "g" / "model.gguf").write_bytes(body[:5_000_000] + b"inserted" + body[5_000_000:])
    again, _ = await put(storage, tmp_path / "g")
    assert again.stored_bytes < len(body) * 0.8, "an insertion does not shift what comes after it"


async def test_several_weight_files_can_be_tasks_by_name(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    for name in ("q4", "q8"):
        (tmp_path / "g" / f"{name}.gguf").write_bytes(name.encode() * 100)
    (tmp_path / "g" / "nearshard.toml").write_text('[tasks.small]\nfile = "q4.gguf"\n')
    done, manifest = await put(storage, tmp_path / "g")
    assert done.tasks == ("small",)
    assert await joined(storage, manifest, "small") == b"q4" * 100


async def test_a_hugging_face_cache_snapshot_is_published_through_its_links(storage: Storage, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"x": np.ones(3)}, blobs / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    _, manifest = await put(storage, snapshot)
    assert set(manifest.files) == {"model.safetensors"}


def header(document: object) -> bytes:
    """A safetensors header."""
    raw = json.dumps(document).encode() if not isinstance(document, bytes) else document
    return struct.pack("<Q", len(raw)) + raw


def tensor(begin: int, end: int, shape: list[int] | None = None) -> dict[str, object]:
    """One entry of a header."""
    return {"dtype": "U8", "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def overlapping(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(header({"a": tensor(0, 8), "b": tensor(4, 12)}) + bytes(12))


def bomb(folder: Path) -> None:
    entries = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(21_000))
    (folder / "model.safetensors").write_bytes(header(b"{" + entries + b"}"))


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def pickled(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def pickled_by_name(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"anything")


def zipped_pickle(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", "x")


def object_array(folder: Path) -> None:
    np.save(folder / "a.npy", np.array([{}], dtype=object), allow_pickle=True)


def link_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / "config2.json").symlink_to("../secret")


def broken_link(folder: Path) -> None:
    (folder / "config2.json").symlink_to("nowhere")


def fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def two_cases(folder: Path) -> None:
    (folder / "Config.json").write_text("{}")


def empty_glob(folder: Path) -> None:
    (folder / "nearshard.toml").write_text('[tasks.x]\ntensors = ["nothing.*"]\n')


def empty_file_glob(folder: Path) -> None:
    (folder / "nearshard.toml").write_text('[tasks.x]\ntensors = ["emb*"]\nfiles = ["nope.json"]\n')


def unknown_key(folder: Path) -> None:
    (folder / "nearshard.toml").write_text('[tasks.x]\ntensor = ["emb*"]\n')


def bad_toml(folder: Path) -> None:
    (folder / "nearshard.toml").write_text("[tasks")


def task_named_all(folder: Path) -> None:
    (folder / "nearshard.toml").write_text('[tasks.all]\ntensors = ["emb*"]\n')


@pytest.mark.parametrize(
    ("harm", "kind", "named"),
    [
        (truncated, TensorFileError, "model.safetensors"),
        (overlapping, TensorFileError, "model.safetensors"),
        (bomb, TensorFileError, "model.safetensors"),
        (huge_header, TensorFileError, "model.safetensors"),
        (pickled, PublishError, "pytorch_model.bin"),
        (pickled_by_name, PublishError, "weights.pt"),
        (zipped_pickle, PublishError, "pytorch_model.bin"),
        (object_array, PublishError, "a.npy"),
        (link_out, PublishError, "config2.json"),
        (broken_link, PublishError, "config2.json"),
        (fifo, PublishError, "pipe"),
        (two_cases, PublishError, "onfig.json"),
        (empty_glob, TasksError, "nothing.*"),
        (empty_file_glob, TasksError, "nope.json"),
        (unknown_key, TasksError, "tensor"),
        (bad_toml, TasksError, "nearshard.toml"),
        (task_named_all, TasksError, "all"),
    ],
)
async def test_bad_input_is_refused_by_name_and_nothing_is_published(
    storage: Storage, model: Path, harm: Callable[[Path], None], kind: type[PublishError], named: str
) -> None:
    harm(model)
    with pytest.raises(kind, match=named.replace("*", r"\*").replace(".", r"\.")):
        await put(storage, model)
    assert {path.name for path in Path(storage.location).iterdir()} <= {"trust", "tmp", ".lock"}
    done = command("publish", str(model), "acme/tiny", "--store", storage.location, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and named in done.stderr


async def test_what_is_refused_can_be_left_out(storage: Storage, model: Path) -> None:
    pickled(model)
    (model / "nearshard.toml").write_text('exclude = ["*.bin"]\n')
    _, manifest = await put(storage, model)
    assert "pytorch_model.bin" not in manifest.files


KILL_POINTS = [
    "origin.storage.Storage.ensure_blob",
    "origin.storage.Storage.sync",
    "origin.storage.Storage.put_manifest",
    "origin.storage.Storage.create",
    "origin.storage.Storage.replace",
    "os.replace",
]


@pytest.mark.parametrize("call", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("point", KILL_POINTS)
async def test_a_killed_publish_shows_nothing_and_a_repeat_completes_it(
    storage: Storage, model: Path, point: str, call: int
) -> None:
    """F2: SIGKILL as a step of publishing begins; wholly visible or absent afterwards."""
    first, _ = await put(storage, model)
    make_model(model, seed=99, width=256)
    script = (
        "import os, signal, sys, importlib\n"
        f"path, _, name = {point!r}.rpartition('.')\n"
        "module, _, kind = path.partition('.Storage')\n"
        "owner = importlib.import_module(module)\n"
        "owner = owner.Storage if '.Storage' in path else owner\n"
        "real, calls = getattr(owner, name), []\n"
        "def die(*words, **options):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {call}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*words, **options)\n"
        "setattr(owner, name, die)\n"
        "from origin.publish_command import main\n"
        f"sys.argv = ['publish', {str(model)!r}, 'acme/tiny', '--store', {storage.location!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    revision = await TrustStore(storage).resolve("acme/tiny", "main")
    if done.returncode == 0:  # this point is passed fewer times
        assert revision != first.revision
    else:
        assert revision == first.revision
    for name in await storage.revisions("acme/tiny"):
        manifest = await storage.manifest("acme/tiny", name)
        for digest, size in manifest.shards.items():
            assert await storage.blob_size(digest) == size, "a manifest never names what is missing"
    again, manifest = await put(storage, model)
    assert await TrustStore(storage).resolve("acme/tiny", "main") == again.revision == manifest.revision
    assert again.revision != first.revision


def test_memory_stays_small_whatever_the_size_of_the_model(tmp_path: Path) -> None:
    """600 MB of weights; the process that publishes them stays under 256 MiB."""
    make_trust(tmp_path / "s")
    directory = tmp_path / "big"
    directory.mkdir()
    size = 600_000_000
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header({"a": tensor(0, size // 2), "b": tensor(size // 2, size)}))
        start = file.tell()
        file.truncate(start + size)  # sparse, but no two shards alike
        for position in range(start, start + size, 1 << 20):
            file.seek(position)
            file.write(str(position).encode())
        file.truncate(start + size)
    with (directory / "other.gguf").open("wb") as file:
        file.write(random.Random(0).randbytes(40_000_000))
    script = (
        "import atexit, sys\nfrom pathlib import Path\nfrom origin.publish_command import main\n"
        "atexit.register(lambda: print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]))\n"
        f"sys.argv = ['publish', {str(directory)!r}, 'acme/big', '--store', {str(tmp_path / 's')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 256 * 1024


async def test_without_pieces_nothing_else_changes(storage: Storage, model: Path) -> None:
    make_model(model, width=1024)
    _, whole = await put(storage, model)
    done, manifest = await put(storage, model, "v2", pieces=False)
    assert done.stored == 0 and manifest.shards == whole.shards
    assert any(layout.pieces for layout in whole.files.values())
    assert not any(layout.pieces for layout in manifest.files.values())
    assert [layout.sha256 for layout in manifest.files.values()] == [layout.sha256 for layout in whole.files.values()]


async def test_shards_of_all_sizes_take_turns_in_the_room(storage: Storage, tmp_path: Path) -> None:
    """Many more bytes than there is room for, in tensors of very different sizes: all arrive as they are."""
    rng = np.random.default_rng(5)
    sizes = [int(n) for n in rng.integers(1, 9_000_000, 60)]
    (tmp_path / "model").mkdir()
    tensors = {f"t{n:02}": rng.integers(0, 256, size, dtype=np.uint8) for n, size in enumerate(sizes)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert sum(sizes) > 2 * IN_FLIGHT
    _, manifest = await put(storage, tmp_path / "model")
    body = await joined(storage, manifest, "all")
    assert body == (tmp_path / "model" / "model.safetensors").read_bytes()
    for digest, size in manifest.shards.items():
        assert digest_of(await read(storage, [Slice(digest, 0, size)])) == digest


async def test_an_unknown_model_has_no_ref(storage: Storage) -> None:
    with pytest.raises(NotFound):
        await TrustStore(storage).resolve("acme/none", "main")
