"""Federated rounds at a real origin: what it takes of sites, what it refuses, and what it makes of it."""

from __future__ import annotations

import json
import os
import struct
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from safetensors.numpy import load_file, save_file

from origin.federated.documents import Gate, Noise, Round
from origin.federated.sites import enrol
from origin.federated.transitions import State
from shared.digest import digest_of
from shared.enrolment import SIGNATURE_FIELD
from shared.errors import ConfigError, Conflict
from shared.federated import LENGTH_FIELD, OFFSET_FIELD, authorization, updates_path
from shared.keys import NodeKey
from shared.manifest import decode
from shared.updates.codecs import codec
from shared.updates.document import MAGIC
from tests.federated_sites import Answer, Arrays, Operator, Site, append, ask, document, rounds_url, sites, sites_file
from tests.harness import Lab, Service, command, get_json, make_model, wait_until

TINY = "acme/tiny"


@pytest.fixture(scope="module")
def origin(shared_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An origin that publishes by itself, with the keys that made the lab's store."""
    own = next(file for file in shared_lab.keys.glob("*.pem") if file.name == "publisher.pem")
    words = [f"--federated.key={own}", "--federated.look=0.1", "--federated.interval=0"]
    yield shared_lab.origin(*words)


@pytest.fixture(scope="module")
def operator(shared_lab: Lab) -> Operator:
    """Who opens rounds."""
    return Operator(shared_lab)


def publish(lab: Lab, name: str) -> tuple[str, Arrays]:
    """A small model of its own; its name and tensors."""
    folder = lab.folder / name
    tensors = make_model(folder, width=8)
    lab.publish(folder, f"acme/{name}")
    return f"acme/{name}", tensors


def updates(tensors: Arrays, count: int, seed: int = 0) -> list[Arrays]:
    """As many, of about one norm."""
    rng = np.random.default_rng(seed)
    return [
        {
            name: np.full(array.shape, 0.01, np.float32) * rng.standard_normal(array.shape, np.float32)
            for name, array in tensors.items()
        }
        for _ in range(count)
    ]


# U1 to U8: what is refused


class Table:
    """One open round for all of the table, with a site for each case."""

    def __init__(self, lab: Lab, operator: Operator) -> None:
        self.model, self.tensors = publish(lab, "table")
        self.sites = sites(40, "t")
        self.opened = operator.open(self.model, self.sites, min_sites=5, codecs=("*",))
        (self.update,) = updates(self.tensors, 1)
        self.body = document(self.update)
        self._next = iter(self.sites)

    def site(self) -> Site:
        """One that has sent nothing yet."""
        return next(self._next)


@pytest.fixture(scope="module")
def table(shared_lab: Lab, origin: Service, operator: Operator) -> Table:
    return Table(shared_lab, operator)


def refused(answer: Answer) -> tuple[int, str]:
    return answer.status, answer.code


def test_u1_who_is_not_known_not_proven_or_not_in_the_round(table: Table, origin: Service, operator: Operator) -> None:
    stranger, other = Site("stranger"), Site("elsewhere")
    assert refused(stranger.send(origin, table.opened, table.body)) == (401, "unknown_site")
    site = table.site()
    statement = site.statement(table.opened, table.body)
    assert refused(site.state(origin, statement, NodeKey.generate())) == (401, "bad_signature")
    no_signature = ask(origin.url + updates_path(table.model), "POST", b"\x80", **{SIGNATURE_FIELD: "0" * 128})
    assert refused(no_signature) == (422, "bad_update")
    operator.do(lambda records, trust, closing: enrol(records, {"elsewhere": other.key.public.hex()}))
    assert refused(other.send(origin, table.opened, table.body)) == (403, "not_in_round")
    no_model = site.statement(table.opened, table.body, model="acme/nothing")
    assert refused(site.state(origin, no_model)) == (403, "not_in_round")
    assert refused(site.state(origin, no_model, NodeKey.generate())) == (404, "unknown_model")


def test_u2_the_same_again_is_a_duplicate_and_another_body_is_refused(
    table: Table, origin: Service, operator: Operator
) -> None:
    site = table.site()
    statement = site.statement(table.opened, table.body)
    offered = site.state(origin, statement)
    assert append(origin, offered, table.body).document == {"state": "counted", "clipped": False}
    for again in (site.state(origin, statement), site.send(origin, table.opened, table.body)):
        assert (again.status, again.document) == (200, {"state": "duplicate"})
    assert append(origin, offered, table.body).code == "unknown_upload"
    (other,) = updates(table.tensors, 1, seed=1)
    assert refused(site.send(origin, table.opened, document(other))) == (409, "other_update")
    assert operator.newest(table.model).updates[site.name].digest == digest_of(table.body)


def test_u3_another_base_a_round_that_is_not_open_and_a_wrong_clock(table: Table, origin: Service) -> None:
    site, base = table.site(), digest_of(b"other")
    assert refused(site.send(origin, table.opened, table.body, base=base)) == (409, "stale_round")
    for number in (2, 10**6):
        assert refused(site.send(origin, table.opened, table.body, round=number)) == (409, "stale_round")
    for seconds in (-301, 301, 86400):
        at = datetime.now(UTC) + timedelta(seconds=seconds)
        assert refused(site.send(origin, table.opened, table.body, time=at)) == (401, "clock_skew")
    near = datetime.now(UTC) + timedelta(seconds=290)
    assert site.send(origin, table.opened, table.body, time=near).document["state"] == "counted"


MARK = np.float32(12345)


def not_finite(arrays: Arrays, name: str, value: float) -> bytes:
    """A document that no encoder writes: ``value`` is the last one of a tensor."""
    real = codec("fp32")

    class Lying(type(real)):  # type: ignore[misc]
        def encode(self, values: Any) -> bytes:
            return bytes(real._encode(np.where(values == MARK, np.float32(value), values)))

        def decode(self, data: Any, rows: int, columns: int) -> Any:
            return np.zeros((rows, columns), np.float32)

    marked = {key: array.copy() for key, array in arrays.items()}
    marked[name].reshape(-1)[-1] = MARK
    return document(marked, Lying())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_u4_what_is_not_finite_is_refused_with_a_strike(
    table: Table, origin: Service, operator: Operator, value: float
) -> None:
    site = table.site()
    body = not_finite(table.update, "encoder.layer.2.bias", value)
    assert refused(site.send(origin, table.opened, body)) == (422, "non_finite")
    assert operator.do(lambda records, trust, closing: records.sites())[site.name].strikes == 1
    assert site.send(origin, table.opened, table.body).document["state"] == "counted", "it may still send a right one"


def scaled(arrays: Arrays, factor: float) -> Arrays:
    return {name: array * np.float32(factor) for name, array in arrays.items()}


def test_u5_far_larger_than_others_is_refused_and_somewhat_larger_is_counted(
    table: Table, origin: Service, operator: Operator
) -> None:
    while len(operator.newest(table.model).updates) < 20:  # enough of 40 to say what is usual
        table.site().send(origin, table.opened, table.body)
    huge, large = table.site(), table.site()
    assert refused(huge.send(origin, table.opened, document(scaled(table.update, 11)))) == (422, "norm_exceeded")
    assert operator.do(lambda records, trust, closing: records.sites())[huge.name].strikes == 1
    answer = large.send(origin, table.opened, document(scaled(table.update, 9)))
    assert answer.document == {"state": "counted", "clipped": True}


def without(arrays: Arrays, name: str) -> Arrays:
    return {key: array for key, array in arrays.items() if key != name}


def test_u6_other_names_and_shapes(table: Table, origin: Service) -> None:
    site, name = table.site(), "encoder.layer.0.weight"
    changed: list[Arrays] = [
        without(table.update, name),
        {**table.update, "more": table.update[name]},
        {**table.update, name: table.update[name].reshape(4, 16)},
        {**without(table.update, name), name.upper(): table.update[name]},
    ]
    for wrong in changed:
        assert refused(site.send(origin, table.opened, document(wrong))) == (422, "schema_mismatch")
    sparse = codec("top:0.1:sign")

    class Garbled(type(sparse)):  # type: ignore[misc]
        def encode(self, values: Any) -> bytes:
            return bytes(sparse.encode(values)[:-1])

        def decode(self, data: Any, rows: int, columns: int) -> Any:
            return np.zeros((rows, columns), np.float32)

    Garbled.__init__ = lambda self: self.__dict__.update(sparse.__dict__)  # type: ignore[method-assign]
    garbled = site.send(origin, table.opened, document(table.update, Garbled()), codecs=(sparse.name,))
    assert refused(garbled) == (422, "schema_mismatch"), "fewer bytes than there are indices and signs"
    for junk in (b"junk" * 100, table.body[:-1], table.body[:4] + b"\xff" * 8 + table.body[12:]):
        assert site.send(origin, table.opened, junk).status == 422
    assert refused(site.send(origin, table.opened, table.body, codecs=("int4",))) == (422, "bad_update")
    assert site.send(origin, table.opened, table.body).document["state"] == "counted", "none of these is a strike"


def bomb() -> bytes:
    """A document of 40 kB whose header would be 1 GB."""
    packed = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 26))
    return MAGIC + packed + struct.pack("<I", len(packed)) + MAGIC


def test_u7_more_than_is_stated_or_allowed_and_what_would_expand(
    table: Table, origin: Service, operator: Operator
) -> None:
    site = table.site()
    assert refused(site.send(origin, table.opened, table.body, size=(8 << 20) + 1)) == (413, "too_large")
    offered = site.state(origin, site.statement(table.opened, table.body, size=100))
    assert refused(append(origin, offered, table.body)) == (413, "too_large")
    assert refused(site.send(origin, table.opened, bomb())) == (413, "too_large")
    assert operator.do(lambda records, trust, closing: records.sites())[site.name].strikes == 1
    assert refused(site.send(origin, table.opened, bytes(len(table.body)), digest=digest_of(b"x"))) == (
        422,
        "digest_mismatch",
    )


@pytest.mark.parametrize("examples", [10**12, 0, -1])
def test_u8_examples_that_nobody_has(table: Table, origin: Service, examples: int) -> None:
    answer = table.site().send(origin, table.opened, table.body, examples=examples)
    assert refused(answer) == (422, "bad_update")


def test_three_strikes_are_quarantine_and_the_operator_pardons(
    table: Table, origin: Service, operator: Operator, shared_lab: Lab
) -> None:
    site = table.site()
    for _ in range(3):
        assert refused(site.send(origin, table.opened, bomb())) == (413, "too_large")
    assert refused(site.send(origin, table.opened, table.body)) == (403, "quarantined")
    where = ["--store", str(shared_lab.store)]
    assert "3 strikes, in quarantine" in command("federated", "status", table.model, *where).stdout
    assert "3 strikes" in command("federated", "pardon", site.name, *where).stdout
    assert site.send(origin, table.opened, table.body).document["state"] == "counted"
    assert command("federated", "pardon", "nobody", *where, check=False).returncode == 5
    events = [json.loads(line) for line in (shared_lab.folder / "audit.jsonl").read_text().splitlines()]
    mine = [line["event"] for line in events if site.name in (line["who"], line.get("site"))]
    assert mine.count("strike") == 3
    assert mine.count("quarantined") == mine.count("site pardoned") == mine.count("update counted") == 1


def test_a_body_goes_on_where_it_broke_off(table: Table, origin: Service) -> None:
    site = table.site()
    offered = site.state(origin, site.statement(table.opened, table.body))
    assert append(origin, offered, table.body, 0, 1000).status == 204
    for start in (0, 999, 1001):
        wrong = append(origin, offered, table.body, start)
        assert (*refused(wrong), wrong.fields[OFFSET_FIELD]) == (409, "wrong_offset", "1000")
    url, fields = origin.url + offered.document["upload"], {"Authorization": authorization(offered.document["token"])}
    head = ask(url, "HEAD", None, **fields)
    assert (head.fields[OFFSET_FIELD], head.fields[LENGTH_FIELD]) == ("1000", str(len(table.body)))
    assert ask(url, "HEAD").status == 401
    assert ask(url, "HEAD", Authorization=authorization("x" * 43)).status == 404
    again = site.state(origin, site.statement(table.opened, table.body))
    assert again.document["offset"] == 1000
    assert ask(url, "HEAD", None, **fields).status == 404, "its token is another now"
    assert append(origin, again, table.body).document["state"] == "counted"


def test_what_is_open_is_told(table: Table, origin: Service) -> None:
    told = get_json(rounds_url(origin, table.model))
    assert told["open"]["number"] == 1 and told["open"]["base"] == table.opened.base
    assert told["open"]["min_sites"] == 5 and told["open"]["sites"] == 40
    assert ask(rounds_url(origin, "acme/nothing"), "GET").code == "unknown_model"


# What becomes of a round


def deliver(origin: Service, opened: Round, named: list[Site], given: Sequence[Arrays], name: str = "fp32") -> None:
    for site, update in zip(named, given, strict=True):
        answer = site.send(origin, opened, document(update, name), codecs=(name,))
        assert answer.document.get("state") == "counted", answer


def wait_for(operator: Operator, model: str, state: State) -> Round:
    wait_until(lambda: operator.newest(model).state is state, f"{model} {state}")
    return operator.newest(model)


def files_of(lab: Lab, origin: Service, model: str, ref: str, path: str = "model.safetensors") -> Any:
    file = lab.folder / "got.safetensors"
    with urllib.request.urlopen(f"{origin.url}/models/{model}/files/{ref}/{path}", timeout=30) as answer:
        file.write_bytes(answer.read())
    return load_file(file)


def test_a_round_is_published_by_itself_with_its_provenance(
    shared_lab: Lab, origin: Service, operator: Operator
) -> None:
    model, tensors = publish(shared_lab, "whole")
    named, given = sites(5, "w"), updates(tensors, 5)
    opened = operator.open(model, named, min_sites=5)
    deliver(origin, opened, named, given)
    done = wait_for(operator, model, State.PUBLISHED)
    refs = operator.meaning(model)
    assert refs["canary"] == done.candidates["canary"].revision and refs["main"] == opened.base

    found = files_of(shared_lab, origin, model, "canary")
    norms = [np.sqrt(sum(float((array**2).sum()) for array in update.values())) for update in given]
    scales = [min(1, np.median(norms) / norm) for norm in norms]
    whole = np.stack(
        [np.concatenate([u[name].ravel() * scale for name in tensors]) for u, scale in zip(given, scales, strict=True)]
    )
    near = np.argsort(np.linalg.norm(whole[:, None] - whole[None], axis=2), axis=1)[
        :, :4
    ]  # of five, one may be hostile
    for name, array in tensors.items():
        clipped = np.stack([update[name] * scale for update, scale in zip(given, scales, strict=True)])
        expected = array - np.sort([clipped[four].mean(axis=0) for four in near], axis=0)[1:-1].mean(axis=0)
        np.testing.assert_allclose(found[name], expected, atol=1e-6)

    with urllib.request.urlopen(f"{origin.url}/models/{model}/manifests/canary", timeout=30) as answer:
        manifest = decode(answer.read())
    assert manifest.provenance is not None and manifest.parent == opened.base and manifest.deltas
    record = manifest.provenance.record()
    assert record == {"round": 1, "base": opened.base, "sites": 5, "rule": "nnm", "rejected": {}}
    assert set(manifest.tasks) == {"all", "embed", "half"}
    assert manifest.tasks["embed"].files == ("tokenizer.json",)

    wait_until(lambda: operator.newest(model).cleaned, "the updates are gone")
    assert not list((shared_lab.store / "federated" / model).glob("*/updates/*"))
    again = named[0].send(origin, opened, document(given[0]))
    assert again.document == {"state": "duplicate"}, "a lost answer is asked for again after the end, too"
    assert refused(named[0].send(origin, opened, document(given[1]))) == (409, "stale_round")
    assert get_json(rounds_url(origin, model))["last"][0]["revision"] == refs["canary"]


def test_u9_too_few_sites_expire_a_round_and_what_they_sent_is_taken_into_the_next(
    shared_lab: Lab, origin: Service, operator: Operator
) -> None:
    model, tensors = publish(shared_lab, "few")
    named, given = sites(4, "f"), updates(tensors, 4)
    opened = operator.open(model, named, min_sites=4, late=0.5, deadline=timedelta(seconds=2))
    deliver(origin, opened, named[:3], given[:3])
    wait_for(operator, model, State.EXPIRED)
    assert operator.meaning(model).keys() == {"main"}
    assert refused(named[3].send(origin, opened, document(given[3]))) == (409, "stale_round")

    second = operator.open(model, named, min_sites=4, late=0.5)
    assert second.updates.keys() == {site.name for site in named[:3]}
    assert named[0].send(origin, opened, document(given[0])).document == {"state": "duplicate"}
    answer = named[0].send(origin, second, document(scaled(given[0], 2)))
    assert answer.document["state"] == "counted", "its own of this round takes the place of its late one"
    assert named[3].send(origin, opened, document(given[3])).document["state"] == "counted"
    done = wait_for(operator, model, State.PUBLISHED)
    shares = {site: told["share"] for site, told in done.statistics.items()}
    assert shares["f0"] == pytest.approx(2 * shares["f1"]) and shares["f3"] == pytest.approx(shares["f1"])
    wait_until(lambda: operator.newest(model).cleaned, "the updates are gone")
    assert not list((shared_lab.store / "federated" / model).glob("*/updates/*")), "those of both rounds"


def test_late_ones_are_refused_where_the_round_takes_none(shared_lab: Lab, origin: Service, operator: Operator) -> None:
    model, tensors = publish(shared_lab, "late")
    named, given = sites(3, "l"), updates(tensors, 3)
    first = operator.open(model, named)
    operator.discard(model)
    operator.open(model, named)
    assert refused(named[0].send(origin, first, document(given[0]))) == (409, "stale_round")
    with pytest.raises(Conflict):
        operator.open(model, named)
    operator.discard(model)


GATE = """
import sys
from safetensors.numpy import load_file
tensors = load_file(sys.argv[1] + "/model.safetensors")
print("looked at", len(tensors))
print(float(abs(tensors["encoder.layer.0.bias"]).sum()))
"""


def age(store: Path, days: float) -> None:
    """All that is in a store is so many days older."""
    for path in store.rglob("*"):
        when = path.stat().st_mtime - 86_400 * days
        os.utime(path, (when, when))


def test_a_worse_model_is_held_until_a_person_says(shared_lab: Lab, origin: Service, operator: Operator) -> None:
    model, tensors = publish(shared_lab, "gated")
    script = shared_lab.folder / "gate.py"
    script.write_text(GATE)
    gate = Gate(command=f"{sys.executable} {script}", margin=0.01)
    bias = tensors["encoder.layer.0.bias"]
    worse: list[Arrays] = [{"encoder.layer.0.bias": -0.1 * bias} for _ in range(3)]
    named = sites(3, "g")
    options: dict[str, Any] = {"gate": gate, "tensors": ("encoder.layer.0.bias",)}
    for number, end in ((1, operator.discard), (2, operator.accept)):
        opened = operator.open(model, named, **options)
        deliver(origin, opened, named, worse)
        held = wait_for(operator, model, State.HELD)
        assert held.number == number and held.gate and held.gate.values and "1.00%" in held.reason
        assert held.gate.values[1] == pytest.approx(1.1 * held.gate.values[0], rel=1e-5)
        assert "canary" not in operator.meaning(model)
        refused_close = command("federated", "close", model, "--store", str(shared_lab.store), check=False)
        assert refused_close.returncode == 2 and "--accept" in refused_close.stderr
        age(shared_lab.store, days=2)
        for _ in range(2):  # the first one does away with the notes of who published
            command("gc", "--store", str(shared_lab.store), "--keep", "0", "--grace", "0")
        ended = end(model)
    assert ended.state is State.PUBLISHED
    assert operator.meaning(model)["canary"] == ended.candidates["canary"].revision
    file = f"{origin.url}/models/{model}/files/canary/model.safetensors"
    with urllib.request.urlopen(file, timeout=20) as answer:  # no ref meant what was held, and gc has left it
        assert answer.read()

    better: list[Arrays] = [{"encoder.layer.0.bias": 0.1 * bias} for _ in range(3)]
    opened = operator.open(model, named, **options)
    deliver(origin, opened, named, better)
    assert wait_for(operator, model, State.PUBLISHED).gate is not None

    opened = operator.open(model, named, **{**options, "gate": Gate(command="false", margin=0.01)})
    deliver(origin, opened, named, better)
    assert "no number" in wait_for(operator, model, State.HELD).reason
    operator.discard(model)


def test_an_adapter_is_published_and_merged(shared_lab: Lab, origin: Service, operator: Operator) -> None:
    folder, model = shared_lab.folder / "lora", "acme/lora"
    tensors = make_model(folder, width=8)
    adapter = folder / "adapters" / "q"
    adapter.mkdir(parents=True)
    target = "base_model.model.encoder.layer.1"
    rng = np.random.default_rng(3)
    down = rng.standard_normal((2, 8)).astype(np.float32)
    save_file(
        {f"{target}.lora_A.weight": down, f"{target}.lora_B.weight": np.zeros((8, 2), np.float32)},
        adapter / "adapter_model.safetensors",
    )
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 8}')
    shared_lab.publish(folder, model)
    trained = rng.standard_normal((8, 2)).astype(np.float32)
    update = {f"{target}.lora_A.weight": np.zeros((2, 8), np.float32), f"{target}.lora_B.weight": -trained}
    named = sites(3, "a")
    opened = operator.open(model, named, tensors=("*.lora_*",), merge=True)
    deliver(origin, opened, named, [update] * 3, "int8")
    wait_for(operator, model, State.PUBLISHED)
    path = "adapters/q/adapter_model.safetensors"
    got = files_of(shared_lab, origin, model, "canary", path)[f"{target}.lora_B.weight"]
    np.testing.assert_allclose(got, trained, atol=0.05)
    np.testing.assert_array_equal(
        files_of(shared_lab, origin, model, "canary")["encoder.layer.1.weight"], tensors["encoder.layer.1.weight"]
    )
    merged = files_of(shared_lab, origin, model, "canary-merged")
    np.testing.assert_allclose(
        merged["encoder.layer.1.weight"], tensors["encoder.layer.1.weight"] + 4 * got @ down, atol=1e-5
    )
    np.testing.assert_array_equal(merged["encoder.layer.0.weight"], tensors["encoder.layer.0.weight"])
    assert ask(f"{origin.url}/models/{model}/files/canary-merged/{path}", "GET").code == "unknown_file"


def test_a_private_model_is_unknown_to_who_is_not_a_site_of_it(
    shared_lab: Lab, origin: Service, operator: Operator
) -> None:
    model, folder = "closed/secret", shared_lab.folder / "secret"
    tensors = make_model(folder, width=8)
    shared_lab.publish(folder, model, "--private")
    named, stranger = sites(3, "p"), Site("nobody")
    opened, given = operator.open(model, named), updates(tensors, 3)
    body = document(given[0])
    assert opened.private
    assert refused(stranger.send(origin, opened, body)) == (404, "unknown_model")
    forged = named[0].state(origin, named[0].statement(opened, body), NodeKey.generate())
    assert refused(forged) == (404, "unknown_model")
    assert refused(ask(rounds_url(origin, model), "GET")) == (404, "unknown_model")
    reader = {"Authorization": f"Bearer {shared_lab.token('closed/*:read')}"}
    assert ask(rounds_url(origin, model), "GET", None, **reader).document["open"]["number"] == 1
    deliver(origin, opened, named, given)
    wait_for(operator, model, State.PUBLISHED)
    listed = f"{origin.url}/models/{model}"
    assert ask(listed, "GET").status == 404
    assert ask(listed, "GET", None, **reader).document["refs"].keys() == {"main", "canary"}


def test_noise_is_accounted_over_all_rounds_and_shown(shared_lab: Lab, origin: Service, operator: Operator) -> None:
    pytest.importorskip("dp_accounting")
    model, tensors = publish(shared_lab, "noisy")
    named, given = sites(3, "n"), updates(tensors, 3)
    spent = []
    for _ in range(2):
        opened = operator.open(model, named, rule="trimmed", noise=Noise(multiplier=4, clip=0.5, delta=1e-5))
        deliver(origin, opened, named, given)
        spent.append(wait_for(operator, model, State.PUBLISHED).epsilon)
    assert spent[0] == pytest.approx(1.0, abs=0.1) and spent[1] == pytest.approx(1.4, abs=0.2)
    made = ask(f"{origin.url}/models/{model}", "GET").document["refs"]["canary"]["revision"]
    with urllib.request.urlopen(f"{origin.url}/models/{model}/manifests/{made}", timeout=30) as answer:
        shown = decode(answer.read()).provenance
    assert shown is not None and (shown.epsilon, shown.delta) == (spent[1], 1e-5)
    opened = operator.open(model, named)
    deliver(origin, opened, named, given)
    wait_for(operator, model, State.PUBLISHED)
    with pytest.raises(ConfigError):
        operator.open(model, named, rule="trimmed", noise=Noise(multiplier=4, clip=0.5, delta=1e-5))


# The command


def test_the_operators_command(shared_lab: Lab, origin: Service, tmp_path: Path) -> None:
    model, tensors = publish(shared_lab, "typed")
    named, given = sites(3, "c"), updates(tensors, 3)
    where = ["--store", str(shared_lab.store), "--json"]
    file = sites_file(tmp_path / "sites.toml", named)
    words = ["federated", "open", model, "--sites", str(file), *where]
    assert command(*words, check=False).returncode == 3, "five sites are needed by default, and there are three"
    done = command(*words, "--min-sites", "3", "--to-ref", "next")
    opened = Round.model_validate_json(done.stdout)
    assert opened.codecs == ("*",) and not done.stderr
    again = command(*words, "--min-sites", "3", check=False)
    assert again.returncode == 2 and "is open" in again.stderr
    deliver(origin, opened, named[:2], given[:2])
    shown = json.loads(command("federated", "status", model, *where).stdout)["rounds"][0]
    assert shown["state"] == "open" and len(shown["updates"]) == 2
    ended = json.loads(command("federated", "close", model, *where).stdout)
    assert ended["state"] == "expired" and "2 of 3" in ended["reason"]
    coarse = command(*words, "--min-sites", "3", "--rule", "trimmed", "--codec", "top:*", "--codec", "int8")
    assert "trimmed moves far what comes as top:*:" in coarse.stderr
    command("federated", "close", model, *where)
    noisy = Round.model_validate_json(command(*words, "--min-sites", "3", "--noise", "4", "--clip", "0.5").stdout)
    assert (opened.rule, noisy.rule) == ("nnm", "trimmed"), "what the default mixes, noise could not hide"
    for wrong in ("[sites.a]\nkey = 1\n", "x", "[other]\n", f'[sites."A b"]\nkey = "{named[0].key.public.hex()}"\n'):
        file.write_text(wrong)
        done = command(*words, check=False)
        assert done.returncode == 3 and "sites.toml" in done.stderr
