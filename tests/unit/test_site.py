"""A site's side of federated rounds, without a network: what is read, made and kept."""

from __future__ import annotations

import io
import stat
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from nearshard.federated.making import Made, Manner, choose_codecs, make_update
from nearshard.federated.site import KEY, enroll, find_site
from nearshard.federated.state import FEEDBACK, UPDATE, Kept, Pending, SiteBusy, State
from nearshard.federated.values import check_covers, of_file, of_path, of_state_dict
from origin.federated.sites import parse_sites
from shared.digest import digest_of
from shared.errors import ConfigError, NonFinite, RequestError
from shared.updates.codecs import codec
from shared.updates.document import open_update, write_update
from shared.updates.feedback import Feedback
from shared.updates.segments import Segment
from tests.cut_off import killed_at

Floats = NDArray[np.float32]
SHAPES = {"w": (40, 64), "b": (64,)}
BASE = digest_of(b"base")


def arrays(seed: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Floats]:
    """Tensors of a training."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def made_of(state: State, base: Mapping[str, Any], trained: Mapping[str, Any], **words: Any) -> Made:
    """An update of these, in int4 unless said otherwise."""
    given = {"codecs": {"*": "int4"}, "feedback": True, "shapes": SHAPES, **words}
    return make_update(state, base=of_state_dict(base), trained=of_state_dict(trained), **given)


def pending(made: Made, number: int = 1) -> Pending:
    """What is noted of it before it is sent."""
    written = made.written
    return Pending(number, BASE, 5, written.digest, written.size, made.codecs, made.update, made.feedback)


def read(state: State, name: str) -> dict[str, Floats]:
    """The tensors of an update in the folder, as the origin decodes them."""
    file = state.path(name)
    with file.open("rb") as opened:
        update = open_update(opened, file.stat().st_size)
        return {
            name: np.concatenate([update.read(name, n).reshape(-1) for n in range(len(head.segments))]).reshape(
                head.shape
            )
            for name, head in update.tensors.items()
        }


def feedback(state: State) -> dict[str, Floats]:
    """What was left out so far."""
    return {
        key.removeprefix("left/"): values.run(0, int(np.prod(values.shape))).reshape(values.shape)
        for key, values in of_file(state.path(state.kept.feedback)).items()
    }


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "site" / "demo" / "model")


def test_a_site_has_one_key_that_only_its_owner_may_read(tmp_path: Path) -> None:
    site = enroll("berlin", tmp_path)
    assert stat.S_IMODE((site.folder / KEY).stat().st_mode) == 0o600
    assert enroll("berlin", tmp_path).key.public == site.key.public == find_site(None, tmp_path).key.public
    other = enroll("lab.2", tmp_path)
    assert parse_sites(site.line + other.line, "sites") == {s.name: s.key.public.hex() for s in (site, other)}
    for name, said in ((None, "berlin, lab.2"), ("paris", "federated enroll paris")):
        with pytest.raises(ConfigError, match=said):
            find_site(name, tmp_path)
    (site.folder / KEY).chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        find_site("berlin", tmp_path)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_tensors_are_read_as_float32_by_runs(dtype: Any, tmp_path: Path) -> None:
    values = arrays(1)["w"].astype(dtype)
    (tmp_path / "deep").mkdir()
    save_file({"w": values, "count": np.arange(3)}, tmp_path / "deep" / "model.safetensors")
    for found in (of_path(tmp_path), of_state_dict({"w": values, "count": np.arange(3)})):
        assert found.keys() == {"w"} and found["w"].shape == (40, 64)
        run = found["w"].run(100, 200)
        assert run.dtype == np.float32 and (run == values.reshape(-1)[100:300].astype(np.float32)).all()


class Tensor:
    """What is used of a torch.Tensor, which is not installed here."""

    def __init__(self, values: NDArray[Any]) -> None:
        self.values = values
        self.shape = values.shape

    def is_floating_point(self) -> bool:
        return self.values.dtype.kind == "f"

    def __getitem__(self, where: slice) -> Tensor:
        return Tensor(self.values[where])

    def detach(self) -> Tensor:
        return self

    cpu = detach

    def reshape(self, size: int) -> Tensor:
        return Tensor(self.values.reshape(size))

    def float(self) -> Tensor:
        return Tensor(self.values.astype(np.float32))

    def numpy(self) -> NDArray[Any]:
        return self.values


def test_torch_tensors_are_taken_without_torch() -> None:
    found = of_state_dict({"w": Tensor(arrays(1)["w"].astype(np.float16)), "count": Tensor(np.arange(3))})
    assert "torch" not in sys.modules
    assert (found["w"].run(7, 9) == arrays(1)["w"].astype(np.float16).reshape(-1)[7:16].astype(np.float32)).all()


def test_what_was_trained_must_be_the_model(tmp_path: Path) -> None:
    for trained, said in (
        ({"w": arrays(1)["w"]}, "lacks 'b'"),
        ({**arrays(1), "b": np.ones(3, np.float32)}, "'b' was"),
    ):
        with pytest.raises(RequestError, match=said) as raised:
            check_covers(of_state_dict(trained), SHAPES)
        assert raised.value.error_code == "schema_mismatch"
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RequestError, match="safetensors"):
            of_path(path)
    with pytest.raises(RequestError, match="does not accept the codec sign, but int4, top:"):
        choose_codecs(Manner("sign"), ("int4", "top:*"))


def test_the_default_codec_is_the_first_that_the_round_accepts() -> None:
    adapters = "*lora_*"
    assert choose_codecs(Manner(), ("*",)) == {adapters: "int4", "*": "sign"}
    assert choose_codecs(Manner(), ("step:0.*", "int*")) == {adapters: "int4", "*": "step:0.5"}
    assert choose_codecs(Manner(feedback=False), ("bf16", "top:*")) == {"*": "bf16"}
    with pytest.raises(RequestError, match="does not accept the codec int4"):
        choose_codecs(Manner(), ("top:*",))


def test_what_codecs_leave_out_is_in_the_next_update(state: State) -> None:
    """Over rounds, what was decoded and what is kept back add up to all that was trained."""
    base, sent, wanted = arrays(0), arrays(0), arrays(0)
    with state.locked():
        for number in range(1, 6):
            trained = arrays(number)
            made = made_of(state, base, trained)
            state.begin(pending(made, number))
            for name, values in read(state, made.update).items():
                sent[name] += values
                wanted[name] += base[name] - trained[name]
            state.counted()
            assert state.kept.pending is None and state.kept.last == number
    for name, left in feedback(state).items():
        np.testing.assert_allclose(sent[name] + left, wanted[name], atol=1e-4)
        assert np.abs(left).max() > 0.01
    assert sorted(file.name[:7] for file in state.folder.iterdir()) == ["feedbac", "lock", "state.j"]


def test_what_is_not_counted_leaves_feedback_as_it_was(state: State) -> None:
    with state.locked():
        state.begin(pending(made_of(state, arrays(0), arrays(1))))
        state.counted()
        before = feedback(state)
        state.begin(pending(made_of(state, arrays(0), arrays(2)), 2))
        state.dropped()
        assert state.kept.rounds == 1
        for name, values in feedback(state).items():
            assert (values == before[name]).all()


def test_tensors_that_a_round_does_not_take_keep_their_feedback(state: State) -> None:
    with state.locked():
        state.begin(pending(made_of(state, arrays(0), arrays(1))))
        state.counted()
        before = feedback(state)
        state.begin(pending(made_of(state, arrays(0), arrays(2), shapes={"w": (40, 64)}), 2))
        state.counted()
        after = feedback(state)
    assert (after["b"] == before["b"]).all() and (after["w"] != before["w"]).any()


def test_momentum_is_kept_with_what_is_left_out(state: State) -> None:
    """As arrays in memory would be; a share falls as the site warms up."""
    manner = Manner("top:0.01:sign", momentum=0.9, warm_up=3)
    rounds = [(arrays(number), choose_codecs(manner, ("*",), number)) for number in range(1, 5)]
    assert rounds[0][1] == {"*": "top:0.25:sign"} and rounds[-1][1] == {"*": "top:0.01:sign"}
    base, expected = arrays(0), Feedback(momentum=0.9)
    with state.locked():
        for number, (trained, codecs) in enumerate(rounds, 1):
            state.begin(pending(made_of(state, base, trained, codecs=codecs, momentum=0.9), number))
            state.counted()

            def read(name: str, segment: Segment, trained: Mapping[str, Floats] = trained) -> Floats:
                values = (base[name] - trained[name]).reshape(-1)[segment.first : segment.first + segment.count]
                return expected.compensate(name, segment, values.reshape(segment.rows, segment.columns))

            write_update(io.BytesIO(), SHAPES, read, codec(codecs["*"]), expected.kept)
            expected.commit()
        found = of_file(state.path(state.kept.feedback))
    for kind, kept in (("left", expected.left), ("velocity", expected.velocities)):
        for name, values in kept.items():
            assert (found[f"{kind}/{name}"].run(0, values.size) == values.reshape(-1)).all()


def test_a_training_that_diverged_is_named_and_leaves_nothing(state: State) -> None:
    trained = arrays(1)
    trained["w"][3, 4] = np.nan
    with state.locked(), pytest.raises(NonFinite, match="w: "):
        made_of(state, arrays(0), trained)
    with state.locked():
        assert state.kept == Kept()
    assert sorted(file.name for file in state.folder.iterdir()) == ["lock"]


def test_two_processes_do_not_submit_at_once(state: State) -> None:
    with state.locked(), pytest.raises(SiteBusy), State(state.folder).locked():
        pass


@pytest.mark.parametrize("document", [b"", b"{}", b'{"format": 1, "feedback": "../x", "rounds": 0, "last": 0}'])
def test_a_damaged_state_is_named(document: bytes, state: State) -> None:
    state.folder.mkdir(parents=True)
    (state.folder / "state.json").write_bytes(document)
    with pytest.raises(ConfigError, match=r"state\.json"), state.locked():
        pass


def test_a_kill_at_any_moment_leaves_what_was_or_what_is_pending(tmp_path: Path) -> None:
    """And what is left is taken up by the next run, which leaves no file behind."""
    base, first, second = arrays(0), arrays(1), arrays(2)

    def run(folder: Path) -> None:
        """As ``submit`` does it, but for the network."""
        state = State(folder)
        with state.locked():
            if state.kept.pending is None:
                number = state.kept.last + 1
                state.begin(pending(made_of(state, base, first if number == 1 else second), number))
            state.counted()

    seen, killed, step = set(), True, 0
    while killed:
        step += 1
        folder = tmp_path / str(step)
        run(folder)  # the first round is counted
        killed = killed_at(step, partial(run, folder), folder)
        state = State(folder)
        with state.locked():
            kept = state.kept
            seen.add((kept.last, kept.pending is not None))
            named = [kept.feedback, *((kept.pending.update, kept.pending.feedback) if kept.pending else ())]
            there = [file.name for kind in (UPDATE, FEEDBACK) for file in folder.glob(f"{kind}*")]
            assert sorted(named) == sorted(there)
            feedback(state)
            if kept.pending:
                read(state, kept.pending.update)
                state.counted()
        if kept.last == 1 and not kept.pending:
            run(folder)
        with state.locked():
            assert state.kept.last == 2
            final = feedback(state)
        expected = State(tmp_path / "expected")
        if not expected.folder.exists():
            run(expected.folder)
            run(expected.folder)
        with expected.locked():
            for name, values in feedback(expected).items():
                assert (values == final[name]).all()
    assert seen == {(1, False), (1, True), (2, False)} and step > 10
