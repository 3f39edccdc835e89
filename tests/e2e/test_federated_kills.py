"""F33: whoever aggregates is killed at each step, sites die or send twice. Each site counts once in a round, a version
is published once, and a part of an update is nothing."""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tuf.api.metadata import Targets

from origin.federated.closing import Closing
from origin.federated.documents import Round
from origin.federated.records import Records
from origin.federated.transitions import State
from origin.signing import parse
from origin.trust_store import TrustStore
from shared.errors import IntegrityError
from shared.trust_names import public_role, target_path
from tests.dying import die_at
from tests.e2e.test_federated_rounds import publish, updates
from tests.federated_sites import Operator, append, document, sites
from tests.harness import Lab, wait_until

CONTEXT = multiprocessing.get_context("forkserver")


@dataclass
class Place:
    """A store with its keys: what an operator needs of a lab."""

    folder: Path
    store: Path
    keys: Path


@pytest.fixture(scope="module")
def collected(shared_lab: Lab) -> Iterator[tuple[Lab, Round, str]]:
    """A lab whose origin took in all updates of a round and is gone; what the round makes."""
    model, tensors = publish(shared_lab, "killed")
    operator, named = Operator(shared_lab), sites(3, "k")
    origin = shared_lab.origin("--federated.interval=0", "--federated.look=60")
    opened = operator.open(model, named)
    for site, update in zip(named, updates(tensors, 3), strict=True):
        assert site.send(origin, opened, document(update)).document["state"] == "counted"
    origin.stop()
    copied = copy_of(shared_lab, shared_lab.folder / "clean")
    made = Operator(copied).close(model)  # type: ignore[arg-type]
    yield shared_lab, opened, made.candidates["canary"].revision


def copy_of(lab: Lab, folder: Path) -> Place:
    shutil.copytree(lab.store, folder / "store")
    return Place(folder, folder / "store", lab.keys)


def close_and_die(place: Place, model: str, point: str, call: int) -> None:
    """In a process of its own: close a round, and be killed on the way."""
    die_at(point, call)
    Operator(place).close(model)  # type: ignore[arg-type]


def meanings(operator: Operator, model: str) -> list[str]:
    """What the canary ref meant in each version of the role that was ever signed."""

    async def read(records: Records, trust: TrustStore, closing: Closing) -> list[str]:
        found, version, role = [], 1, public_role("acme")
        while (data := await trust.probe(role, version)) is not None:
            target = parse(data, Targets)[0].targets.get(target_path(model, "canary"))
            found.append("sha256:" + target.hashes["sha256"] if target else "")
            version += 1
        return found

    return operator.do(read)


POINTS = [
    ("origin.federated.records.Records.change", 1),
    ("origin.federated.closing.fetch_model", 1),
    ("origin.federated.closing.take_off", 1),
    ("origin.storage.Storage.put_manifest", 1),
    ("origin.federated.records.Records.change", 2),
    ("origin.federated.records.Records.change", 3),
    ("origin.trust_store.TrustStore.create", 1),
    ("origin.storage.Storage.replace", 4),
    ("origin.federated.records.Records.change", 4),
    ("origin.objects.Directory.delete", 1),
    ("origin.federated.records.Records.done", 1),
]
"""Before the states collected, aggregated (while files are fetched, changed and stored, too), publishing and published;
before the signature is stored, and before it is in force; before updates are deleted, and before that is noted."""


@pytest.mark.parametrize(("point", "call"), POINTS)
def test_who_is_killed_while_a_round_is_closed_has_published_it_once(
    collected: tuple[Lab, Round, str], tmp_path: Path, point: str, call: int
) -> None:
    lab, opened, revision = collected
    place = copy_of(lab, tmp_path)
    operator = Operator(place)  # type: ignore[arg-type]
    before = meanings(operator, opened.model)
    process = CONTEXT.Process(target=close_and_die, args=(place, opened.model, point, call))
    process.start()
    process.join(60)
    assert process.exitcode == -9, "it was killed there"
    between = operator.newest(opened.model)
    refs = operator.meaning(opened.model)
    assert refs.get("canary", revision) == revision, "wholly visible or absent"
    assert between.state is not State.PUBLISHED or "canary" in refs
    done = operator.close(opened.model)
    assert done.state is State.PUBLISHED and done.candidates["canary"].revision == revision
    assert set(done.statistics) == {"k0", "k1", "k2"}
    assert meanings(operator, opened.model) == [*before, revision], "one version more, and one signature"
    assert not list(place.store.glob("federated/acme/killed/*/updates/*")) and done.cleaned
    assert not list((tmp_path / "operator").glob("*.d/*"))


def test_who_is_killed_while_an_update_comes_counts_it_once(lab: Lab) -> None:
    model, tensors = publish(lab, "taken")
    operator, named, given = Operator(lab), sites(5, "i"), updates(tensors, 5)
    opened = operator.open(model, named, min_sites=4)
    words = ["--store", str(lab.store), "--federated.look=0.1"]
    points = ("origin.objects.Directory.put_file", "origin.federated.records.Records.change",
              "origin.federated.intake.encode_counted")  # fmt: skip
    url = ""
    for number, (site, point) in enumerate(zip(named[:3], points, strict=True)):
        body = document(given[number])
        dying = lab.service("tests.dying", point, "1", *words, name=f"dying-{number}", url=url)
        url = dying.url
        with pytest.raises(OSError):
            site.send(dying, opened, body)
        wait_until(dying.ended, "it was killed")
        origin = lab.service("origin", *words, name=f"origin-{number}", url=url)
        lost = number == 2  # only the answer was
        assert site.send(origin, opened, body).document["state"] == ("duplicate" if lost else "counted")
        if number < 2:
            origin.stop()

    body = document(given[3])
    offered = named[3].state(origin, named[3].statement(opened, body))
    assert append(origin, offered, body, 0, 5000).status == 204
    origin.kill()
    origin.start()
    again = named[3].state(origin, named[3].statement(opened, body))
    assert again.document["offset"] == 5000, "what came is there for who goes on"
    assert append(origin, again, body).document["state"] == "counted"

    cut_off = named[4].state(origin, named[4].statement(opened, document(given[4])))
    assert append(origin, cut_off, document(given[4]), 0, 5000).status == 204
    spool = lab.folder / "federated" / "spool"
    assert list(spool.rglob("*~i4"))
    counted = operator.newest(model).updates
    assert counted.keys() == {site.name for site in named[:4]}
    assert len(list(lab.store.glob("federated/acme/taken/*/updates/*"))) == 4, "one body of each"
    assert operator.close(model).state is State.PUBLISHED
    wait_until(lambda: not list(spool.glob("*")), "the part is dropped")
    assert append(origin, cut_off, document(given[4]), 5000).status in (404, 409)
    codes = [named[4].state(origin, named[4].statement(opened, document(given[4]))) for _ in range(12)]
    assert codes[-1].code == "slow_down" and int(codes[-1].fields["Retry-After"]) >= 1


def test_a_record_that_the_origin_did_not_write_is_not_believed(
    collected: tuple[Lab, Round, str], tmp_path: Path
) -> None:
    lab, opened, _ = collected
    place = copy_of(lab, tmp_path)
    operator = Operator(place)  # type: ignore[arg-type]
    record = place.store / "federated" / opened.model / "00000001" / "round"
    right = record.read_bytes()
    index = (place.store / "federated" / "index").read_bytes()
    for wrong in (right.replace(b'"min_sites":3', b'"min_sites":1'), right[:-1], index, b"", bytes(96) + right[96:]):
        assert wrong != right
        record.write_bytes(wrong)
        with pytest.raises(IntegrityError):
            operator.newest(opened.model)
    record.write_bytes(right)
    (body, *_) = record.parent.glob("updates/*")
    body.write_bytes(body.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError):
        operator.close(opened.model)
    assert operator.discard(opened.model).state is State.DISCARDED
    assert not list(record.parent.glob("updates/*"))
