"""Cutting: a file is tiled exactly, and no task is made to fetch what it does not use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from origin.cutting import SMALL, Cut, Members, cut_tensors, piece_length, public_names, task_tensors
from shared.errors import PublishError
from shared.layout import piece_count
from shared.manifest import MAX_PIECES, MIN_PIECE
from shared.tensorfile import TensorEntry, TensorHeader
from tests.unit.strategies import quick

ALL, EMBED = frozenset({"all"}), frozenset({"all", "embed"})


@dataclass
class Model:
    """A safetensors file to cut, and how."""

    header: TensorHeader
    users: Mapping[str, Members]
    target: int
    limit: int

    @cached_property
    def cuts(self) -> list[Cut]:
        """The shards of the file."""
        return list(cut_tensors(self.header, self.users, self.target, self.limit))

    @property
    def data_cuts(self) -> list[Cut]:
        """Those after the header."""
        return [cut for cut in self.cuts if cut.start >= self.header.data_start]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.header.data_start + sum(tensor.size for tensor in self.header.tensors)

    def cuts_of(self, tensor: TensorEntry) -> list[Cut]:
        """The shards that hold bytes of a tensor."""
        start = self.header.data_start
        return [
            cut
            for cut in self.cuts
            if cut.start < start + tensor.end and start + tensor.begin < cut.stop and tensor.size
        ]

    def tensors_in(self, cut: Cut) -> list[TensorEntry]:
        """The tensors that have bytes in a shard."""
        return [tensor for tensor in self.header.tensors if cut in self.cuts_of(tensor)]


def header_of(sizes: list[int] | Mapping[str, int], data_start: int = 100) -> TensorHeader:
    """A header of tensors of these sizes, one after the other."""
    named = sizes if isinstance(sizes, Mapping) else {f"t{number}": size for number, size in enumerate(sizes)}
    entries, position = [], 0
    for name, size in named.items():
        entries.append(TensorEntry(name, "U8", (size,), position, position + size))
        position += size
    return TensorHeader(data_start, {}, tuple(entries))


@st.composite
def drawn_models(draw: st.DrawFn) -> Model:
    """Tensors below, around and above every threshold, used by any tasks or by none."""
    target = draw(st.sampled_from([16, 32, 40]))
    limit = target * draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, target // SMALL + 1) | st.integers(0, 3 * limit), max_size=12))
    tasks = st.frozensets(st.sampled_from(["all", "embed", "rank"]))
    users = {f"t{number}": draw(tasks) for number in range(len(sizes)) if draw(st.booleans())}
    return Model(header_of(sizes, draw(st.integers(8, 50))), users, target, limit)


models = drawn_models()


@quick
@given(models)
def test_cuts_tile_the_file_exactly(model: Model) -> None:
    position = 0
    for cut in model.cuts:
        assert cut.start == position < cut.stop
        position = cut.stop
    assert position == model.size


@quick
@given(models)
def test_no_shard_of_tensor_data_is_over_the_limit(model: Model) -> None:
    assert all(cut.stop - cut.start <= model.limit for cut in model.data_cuts)


def test_a_header_over_the_limit_is_cut_too() -> None:
    model = Model(header_of([5], data_start=100), {}, 32, 32)
    assert all(cut.stop - cut.start <= 32 for cut in model.cuts)


@quick
@given(models)
def test_the_header_shares_its_shard_with_no_tensor(model: Model) -> None:
    head = [cut for cut in model.cuts if cut not in model.data_cuts]
    assert head[-1].stop == model.header.data_start
    assert not any(cut.tasks for cut in head)


@quick
@given(models)
def test_a_shard_is_used_whole_by_the_tasks_of_each_of_its_tensors(model: Model) -> None:
    """So no task pulls in a byte that it does not use, and no task misses one."""
    for tensor in model.header.tensors:
        for cut in model.cuts_of(tensor):
            assert cut.tasks == model.users.get(tensor.name, frozenset())


@quick
@given(models)
def test_only_small_tensors_share_a_shard_and_up_to_the_target(model: Model) -> None:
    for cut in model.data_cuts:
        inside = model.tensors_in(cut)
        assert inside
        if len(inside) > 1:
            assert cut.stop - cut.start <= model.target
            assert all(tensor.size < model.target // SMALL for tensor in inside)


@quick
@given(models)
def test_neighbours_that_could_share_a_shard_do(model: Model) -> None:
    for left, right in pairwise(model.data_cuts):
        tensors = [*model.tensors_in(left), *model.tensors_in(right)]
        if left.tasks == right.tasks and all(tensor.size < model.target // SMALL for tensor in tensors):
            first = model.tensors_in(right)[0]
            assert left.stop - left.start + first.size > model.target


@quick
@given(models)
def test_only_a_tensor_over_the_limit_is_cut_into_pieces(model: Model) -> None:
    for tensor in model.header.tensors:
        pieces = model.cuts_of(tensor)
        if tensor.size > model.limit:
            assert [cut.stop - cut.start for cut in pieces[:-1]] == [model.target] * (len(pieces) - 1)
        else:
            assert len(pieces) == (1 if tensor.size else 0)


@quick
@given(models, st.data())
def test_a_large_tensor_is_cut_alike_wherever_it_is(model: Model, data: st.DataObject) -> None:
    """So it keeps its shards in the next revision, whatever else changes."""
    large = [tensor for tensor in model.header.tensors if tensor.size >= model.target // SMALL]
    assume(large)
    tensor = data.draw(st.sampled_from(large))
    alone = Model(header_of({tensor.name: tensor.size}), model.users, model.target, model.limit)
    lengths = [cut.stop - cut.start for cut in model.cuts_of(tensor)]
    assert lengths == [cut.stop - cut.start for cut in alone.data_cuts]


def test_small_neighbours_of_the_same_tasks_are_packed() -> None:
    users = {"t0": ALL, "t1": ALL, "t2": EMBED, "t3": EMBED, "t4": ALL}
    cuts = Model(header_of([3, 3, 3, 3, 3]), users, 80, 200).cuts
    assert cuts == [
        Cut(0, 100, frozenset()), Cut(100, 106, ALL), Cut(106, 112, EMBED), Cut(112, 115, ALL),
    ]  # fmt: skip


def test_small_neighbours_are_packed_up_to_the_target() -> None:
    cuts = Model(header_of([3] * 20), {}, 32, 200).data_cuts
    assert [cut.stop - cut.start for cut in cuts] == [30, 30]


def test_a_file_of_no_tensors_is_its_header() -> None:
    assert Model(header_of([]), {}, 16, 200).cuts == [Cut(0, 100, frozenset())]


# Names


def test_names_that_are_unique_are_kept() -> None:
    headers = {"a/x.safetensors": header_of({"w": 1, "b": 1}), "y.safetensors": header_of({"v": 1})}
    assert public_names(headers) == {
        ("a/x.safetensors", "w"): "w",
        ("a/x.safetensors", "b"): "b",
        ("y.safetensors", "v"): "v",
    }


def test_where_names_clash_files_in_a_folder_have_it_in_front() -> None:
    headers = {
        "unet/x.safetensors": header_of({"w": 1, "b": 1}),
        "text/encoder/x.safetensors": header_of({"w": 1}),
        "x.safetensors": header_of({"w": 1}),
    }
    assert public_names(headers) == {
        ("unet/x.safetensors", "w"): "unet/w",
        ("unet/x.safetensors", "b"): "unet/b",
        ("text/encoder/x.safetensors", "w"): "text/encoder/w",
        ("x.safetensors", "w"): "w",
    }


@pytest.mark.parametrize(
    "headers",
    [
        {"x.safetensors": ["w"], "y.safetensors": ["w"]},
        {"unet/x.safetensors": ["w"], "unet/y.safetensors": ["w"]},
        {"x.safetensors": ["unet/w", "w"], "unet/y.safetensors": ["w"]},
    ],
)
def test_names_that_a_folder_cannot_tell_apart_are_refused(headers: Mapping[str, list[str]]) -> None:
    with pytest.raises(PublishError):
        public_names({file: header_of(dict.fromkeys(names, 1)) for file, names in headers.items()})


words = st.sampled_from(["w", "v", "a/w", "a/b/w", "b/w"])


@quick
@given(st.dictionaries(st.sampled_from(["x", "y", "a/x", "a/y", "a/b/x", "b/x"]), st.sets(words), max_size=4))
def test_public_names_tell_all_tensors_apart_or_are_refused(files: dict[str, set[str]]) -> None:
    headers = {file: header_of(dict.fromkeys(sorted(names), 1)) for file, names in files.items()}
    try:
        names = public_names(headers)
    except PublishError:
        return
    assert names.keys() == {(file, tensor) for file, tensors in files.items() for tensor in tensors}
    assert len(set(names.values())) == len(names)


def test_the_tensors_of_a_task_come_in_the_order_of_files_and_of_data() -> None:
    headers = {"y": header_of({"d": 1, "c": 1}), "x": header_of({"b": 1, "a": 1})}
    members = {"a": EMBED, "b": ALL, "c": EMBED, "d": EMBED}
    chosen = task_tensors("embed", headers, public_names(headers), members)
    assert [(file, name, tensor.name) for file, name, tensor in chosen] == [
        ("x", "a", "a"),
        ("y", "d", "d"),
        ("y", "c", "c"),
    ]


@pytest.mark.parametrize(
    ("sizes", "mebibytes"),
    [
        ([], 1),
        ([5], 1),
        ([MAX_PIECES * MIN_PIECE], 1),
        ([MAX_PIECES * MIN_PIECE + 1], 2),
        ([90_000_000] * 2, 1),
        ([5_000_000_000] * 3 + [15_000_000_000], 4),
        ([100_000_000_000] * 2, 32),
        ([4_300_000_000] * 163 + [700_000_000_000], 256),
    ],
)
def test_a_piece_is_as_short_as_the_manifest_has_room_for(sizes: list[int], mebibytes: int) -> None:
    assert piece_length(sizes) == mebibytes << 20


@quick
@given(st.lists(st.integers(0, 2**50), max_size=20))
def test_there_are_never_more_pieces_than_a_manifest_may_have(sizes: list[int]) -> None:
    length = piece_length(sizes)
    assert length >= MIN_PIECE and length & (length - 1) == 0
    assert sum(piece_count(size, length) for size in sizes) <= MAX_PIECES
    shorter = length // 2
    assert shorter < MIN_PIECE or sum(piece_count(size, shorter) for size in sizes) > MAX_PIECES
