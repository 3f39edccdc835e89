"""What is believed of signed metadata: nothing that is not signed by who may, whole, and as new as what was seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securesystemslib.signer import Key, SSlibKey
from tuf.api.metadata import Metadata, Root

from shared import trust
from shared.errors import (
    ClockSkew,
    DecodeError,
    EquivocationDetected,
    KeyRevoked,
    MetadataExpired,
    MetadataTooLarge,
    MixedMetadata,
    RollbackDetected,
    SignatureInvalid,
    ThresholdNotMet,
    TrustError,
    UnknownKey,
)
from shared.trust import Kept, Trust
from shared.trust_names import SNAPSHOT, TARGETS, TIMESTAMP, private_role, public_role
from tests.metadata import NOW, Repository, make_key, sign

MODEL = "acme/tiny"
PUBLIC = public_role("acme")
DAY = 86_400.0


def follow(before: Trust, files: Mapping[str, bytes], now: float = NOW) -> Trust:
    """One refresh from a source that has these files, delegated roles included."""
    steps = trust.refresh(before, files["timestamp.json"], now)
    try:
        wanted = next(steps)
        while True:
            data = files.get(wanted.name)
            assert data is not None or wanted.optional, wanted
            if data is not None and len(data) > wanted.limit:
                raise MetadataTooLarge
            wanted = steps.send(data)
    except StopIteration as stop:
        made: Trust = stop.value
    for role in made.delegated():
        if not made.loaded(role):
            made.take(role, files[made.wanted(role).name], now)
    return made


def believed(repository: Repository, kept: Kept | None = None, now: float = NOW) -> Trust:
    """What is believed of a repository by who starts now."""
    return follow(trust.begin(repository.root, kept, now), repository.files, now)


def changed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A file with something changed after it was signed."""
    document = json.loads(data)
    change(document)
    return json.dumps(document).encode()


def test_a_ref_means_what_its_publisher_signed() -> None:
    repository = Repository()
    repository.publish(MODEL, "main", b"first")
    repository.publish("acme/secret", "main", b"hidden", private=True)
    found = believed(repository)
    target = found.target(MODEL, "main", NOW)
    assert target is not None and target.length == 5 and not target.private and target.published
    hidden = found.target("acme/secret", "main", NOW)
    assert hidden is not None and hidden.private
    assert found.target(MODEL, "v2", NOW) is None and found.target("other/tiny", "main", NOW) is None
    assert found.is_public(MODEL) and not found.is_public("acme/secret") and not found.is_public("acme/none")
    assert list(found.models()) == ["acme/secret", MODEL]
    assert list(found.refs(MODEL)) == ["main"] and not found.refs("acme/none")
    assert found.access(NOW) == {"token_keys": [], "revoked": []}


def test_of_a_public_model_the_private_role_says_nothing() -> None:
    """All that is of a public model is for all: a ref that was signed for privately must not become so too."""
    repository = Repository()
    repository.publish(MODEL, "draft", b"private", private=True)
    hidden = believed(repository)
    assert not hidden.is_public(MODEL) and hidden.target(MODEL, "draft", NOW) is not None
    repository.publish(MODEL, "main", b"public")
    shown = believed(repository)
    assert shown.is_public(MODEL) and shown.target(MODEL, "main", NOW) is not None
    assert shown.target(MODEL, "draft", NOW) is None and list(shown.refs(MODEL)) == ["main"]


def test_what_is_published_moves_a_ref() -> None:
    repository = Repository()
    repository.publish(MODEL, "main", b"first")
    first = believed(repository)
    repository.publish(MODEL, "main", b"second")
    second = follow(first, repository.files)
    was, now = first.target(MODEL, "main", NOW), second.target(MODEL, "main", NOW)
    assert was is not None and now is not None and was.revision != now.revision


def test_an_unchanged_state_asks_for_nothing_but_the_next_root() -> None:
    repository = Repository()
    before = believed(repository)
    repository.sign_timestamp()
    asked = []
    steps = trust.refresh(before, repository.timestamp, NOW)
    wanted = next(steps)
    with pytest.raises(StopIteration) as stop:
        while True:
            asked.append(wanted.name)
            wanted = steps.send(None)
    made: Trust = stop.value.value
    assert asked == ["2.root.json"] and set(made.roles) == set(before.roles)


# FAULTS M2, M3, S1, S3: who signed


def _bad(data: bytes, signature: Callable[[str], str]) -> bytes:
    def change(document: dict[str, Any]) -> None:
        for item in document["signatures"]:
            item["sig"] = signature(item["sig"])

    return changed(data, change)


def _plus_order(signature: str) -> str:
    """S + L: the same signature for who does not look (RFC 8032 §5.1.7)."""
    order = 2**252 + 27742317777372353535851937790883648493
    number = int.from_bytes(bytes.fromhex(signature[64:]), "little") + order
    return signature[:64] + number.to_bytes(32, "little").hex()


SIGNATURES: Mapping[str, Callable[[str], str]] = {
    "one bit wrong": lambda text: f"{int(text[0], 16) ^ 1:x}" + text[1:],
    "empty": lambda _: "",
    "63 bytes": lambda text: text[:-2],
    "65 bytes": lambda text: text + "00",
    "all zero": lambda _: "00" * 64,
    "S plus L": _plus_order,
    "no hex": lambda _: "zz",
}


@pytest.mark.parametrize(
    "name", ["timestamp.json", "2.snapshot.json", "2.targets.json", f"2.{PUBLIC}.json", "2.root.json"]
)
@pytest.mark.parametrize("how", SIGNATURES)
def test_a_signature_that_is_not_right_is_refused(name: str, how: str) -> None:
    """M2, S1, for every role."""
    repository = Repository(hashes=False)
    before = believed(repository)
    repository.rotate(root=repository.root_keys, publisher=make_key(6))
    repository.files[name] = _bad(repository.files[name], SIGNATURES[how])
    with pytest.raises(SignatureInvalid):
        follow(before, repository.files)
    with pytest.raises(SignatureInvalid):
        believed(repository)


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json", f"1.{PUBLIC}.json"])
def test_content_changed_after_signing_or_not_signed_is_refused(name: str) -> None:
    """M2: a bit flip, a missing signature, metadata of another type."""
    repository = Repository(hashes=False)
    right = repository.files[name]
    wrong = {
        "changed": changed(right, lambda document: document["signed"].update(expires="2099-01-01T00:00:00Z")),
        "unsigned": changed(right, lambda document: document["signatures"].clear()),
        "another type": repository.files["1.root.json"],
    }
    for data in wrong.values():
        repository.files[name] = data
        with pytest.raises(SignatureInvalid):
            believed(repository)


def test_a_key_counts_once_for_a_threshold() -> None:
    """M3: one signature of two; one key twice; one key under two ids."""
    repository = Repository()
    before = believed(repository)
    keys = repository.root_keys
    root = repository.make_root(2)
    once = sign(root, keys[:1])
    twice = changed(once, lambda document: document["signatures"].append(document["signatures"][0]))
    other_id = SSlibKey("ab" * 32, "ed25519", "ed25519", dict(keys[0].public_key.keyval))
    root.add_key(other_id, "root")
    signed = Metadata[Root].from_bytes(sign(root, keys[:1]))
    value = signed.signatures[keys[0].public_key.keyid].signature

    def add(document: dict[str, Any]) -> None:
        document["signatures"].append({"keyid": "ab" * 32, "sig": value})

    for data in (once, twice, changed(signed.to_bytes(), add)):
        repository.files["2.root.json"] = data
        with pytest.raises(ThresholdNotMet):
            follow(before, repository.files)


def test_one_key_under_two_ids_is_one_key() -> None:
    """M3: in a root that says so itself, and in targets: python-tuf would count it twice."""
    repository = Repository()
    key = repository.root_keys[0]
    again = SSlibKey("ab" * 32, "ed25519", "ed25519", dict(key.public_key.keyval))
    repository.root_keys = [key]
    root = repository.make_root(1)
    root.add_key(again, "root")
    document = json.loads(sign(root, [key]))
    document["signatures"].append({"keyid": again.keyid, "sig": document["signatures"][0]["sig"]})
    with pytest.raises(ThresholdNotMet, match="two ids"):
        trust.begin(json.dumps(document).encode(), None, NOW)
    repository = Repository()
    targets = repository.make_targets(2)
    assert targets.delegations is not None
    twice = SSlibKey("ab" * 32, "ed25519", "ed25519", dict(repository.publisher_key.public_key.keyval))
    targets.delegations.keys[twice.keyid] = twice
    repository.next(TARGETS)
    repository.put(TARGETS, sign(targets, [repository.targets_key]))
    repository.sign_snapshot()
    with pytest.raises(ThresholdNotMet, match="two ids"):
        believed(repository)


def test_a_root_needs_the_keys_of_the_one_before_and_its_own() -> None:
    repository = Repository()
    before = believed(repository)
    old, repository.root_keys = repository.root_keys, [make_key(n) for n in (11, 12, 13)]
    root = repository.make_root(2)
    for keys, error in (
        (repository.root_keys, UnknownKey),
        (old, UnknownKey),
        ([*repository.root_keys, old[0]], ThresholdNotMet),
        ([*old, repository.root_keys[0]], ThresholdNotMet),
    ):
        repository.files["2.root.json"] = sign(root, keys)
        with pytest.raises(error):
            follow(before, repository.files)
    repository.files["2.root.json"] = sign(root, [*old, *repository.root_keys])
    assert follow(before, repository.files).versions()["root"] == 2


def test_a_key_that_never_was_is_told_from_one_that_was_revoked() -> None:
    """S3."""
    repository = Repository()
    repository.publish(MODEL, "main", b"first")
    before = believed(repository)
    revoked = repository.publisher_key
    repository.rotate(publisher=make_key(21))
    for key, error in ((revoked, KeyRevoked), (make_key(22), UnknownKey)):
        repository.set_ref(MODEL, "main", b"forged")
        repository.sign_role(PUBLIC, key)
        repository.sign_snapshot()
        for kept in (None, before.kept()):
            start = trust.begin(repository.root, kept, NOW)
            with pytest.raises(error if kept else UnknownKey):
                follow(start, repository.files)


def test_a_role_of_a_revoked_key_is_not_carried_over() -> None:
    """F34: the role's file is as it was, but whose key may sign it has changed."""
    repository = Repository()
    repository.publish(MODEL, "main", b"first")
    before = believed(repository)
    repository.publisher_key = make_key(21)
    repository.sign_targets()
    repository.sign_snapshot()
    with pytest.raises(KeyRevoked):
        follow(before, repository.files)


@pytest.mark.parametrize(
    "public",
    [
        "0100000000000000000000000000000000000000000000000000000000000000",
        "00" * 32,
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "ab" * 31,
        "ab" * 33,
        "",
        "AB" * 32,
    ],
)
def test_keys_that_prove_nothing_are_refused_wherever_they_are(public: str) -> None:
    """S2: small order, another length, another spelling."""
    repository = Repository()
    bad: Key = SSlibKey("cd" * 32, "ed25519", "ed25519", {"public": public})
    root = repository.make_root(1)
    root.add_key(bad, "timestamp")
    with pytest.raises(TrustError, match="not acceptable"):
        trust.begin(sign(root, repository.root_keys), None, NOW)
    targets = repository.make_targets(2)
    assert targets.delegations is not None
    targets.delegations.keys[bad.keyid] = bad
    repository.next(TARGETS)
    repository.put(TARGETS, sign(targets, [repository.targets_key]))
    repository.sign_snapshot()
    with pytest.raises(TrustError, match="not acceptable"):
        believed(repository)


def test_other_kinds_of_keys_are_refused() -> None:
    repository = Repository()
    root = repository.make_root(1)
    root.add_key(SSlibKey("cd" * 32, "rsa", "rsassa-pss-sha256", {"public": "pem"}), "timestamp")
    with pytest.raises(TrustError, match="not Ed25519"):
        trust.begin(sign(root, repository.root_keys), None, NOW)


# FAULTS M4, M8, M10: which version


def test_older_than_was_seen_is_a_rollback() -> None:
    """M4, for the timestamp, the snapshot and what the snapshot lists."""
    repository = Repository()
    repository.publish(MODEL, "main", b"first")
    old = dict(repository.files)
    repository.publish(MODEL, "main", b"second")
    before = believed(repository)
    with pytest.raises(RollbackDetected):
        follow(before, old)
    replayed = repository.make_timestamp(9)
    replayed.snapshot_meta.version = 1
    with pytest.raises(RollbackDetected):
        follow(before, {**repository.files, "timestamp.json": sign(replayed, [repository.online_key])})
    for change in ("older", "missing"):
        snapshot = repository.make_snapshot(repository.next(SNAPSHOT))
        if change == "older":
            snapshot.meta[f"{PUBLIC}.json"].version -= 1
        else:
            del snapshot.meta[f"{PUBLIC}.json"]
        repository.put(SNAPSHOT, sign(snapshot, [repository.online_key]))
        repository.sign_timestamp()
        with pytest.raises(RollbackDetected):
            follow(before, repository.files)


def test_a_replayed_root_is_refused() -> None:
    repository = Repository()
    repository.rotate(root=repository.root_keys)
    before = believed(repository)
    for replayed in ("1.root.json", "2.root.json"):
        with pytest.raises(RollbackDetected):
            follow(before, {**repository.files, "3.root.json": repository.files[replayed]})


@pytest.mark.parametrize("role", [TIMESTAMP, SNAPSHOT, TARGETS, PUBLIC])
def test_two_contents_of_one_version_are_equivocation(role: str) -> None:
    """M4: the origin, or who has its key, shows two people two things."""
    repository = Repository()
    before = believed(repository)
    repository.versions[role] -= 1
    if role == TIMESTAMP:
        repository.now += 60
        repository.sign_timestamp()
    else:
        repository.now += 60
        sign_again = {SNAPSHOT: repository.sign_snapshot, TARGETS: repository.sign_targets}
        sign_again.get(role, lambda: repository.sign_role(role))()
        if role != SNAPSHOT:
            repository.sign_snapshot()
    with pytest.raises(EquivocationDetected):
        follow(before, repository.files, NOW + 60)


def test_the_same_content_written_another_way_is_no_equivocation() -> None:
    repository = Repository()
    before = believed(repository)
    spaced = json.dumps(json.loads(repository.timestamp), indent=4).encode()
    assert follow(before, {**repository.files, "timestamp.json": spaced}).timestamp == repository.timestamp


@pytest.mark.parametrize("hashes", [True, False])
def test_files_of_two_states_are_not_mixed(hashes: bool) -> None:
    """M8: each file is signed well, and they do not belong together."""
    repository = Repository(hashes=hashes)
    repository.publish(MODEL, "main", b"first")
    old = dict(repository.files)
    repository.publish(MODEL, "main", b"second")
    repository.sign_targets()
    repository.sign_snapshot()
    for name in ("snapshot", "targets", PUBLIC):
        versions = sorted(file for file in repository.files if file.endswith(f".{name}.json"))
        files = {**repository.files, versions[-1]: old[versions[0]]}
        with pytest.raises(MixedMetadata):
            follow(trust.begin(repository.root, None, NOW), files)


def test_an_organisation_that_has_published_nothing_yet_has_no_models() -> None:
    """Its publisher's key was named, and its roles come with its first publish. What was there cannot vanish so."""
    repository = Repository(orgs=("acme", "new"))
    version = {role: repository.versions.pop(role) for role in (public_role("new"), private_role("new"))}
    repository.sign_snapshot()
    before = believed(repository)
    assert before.loaded(public_role("new")) and public_role("new") not in before.roles
    assert before.target("new/model", "main", NOW) is None
    repository.versions |= version
    repository.sign_snapshot()
    after = follow(before, repository.files)
    assert public_role("new") in after.roles
    for role in version:
        del repository.versions[role]
    repository.sign_snapshot()
    with pytest.raises(RollbackDetected):
        follow(after, repository.files)


def test_a_stolen_key_that_rushed_ahead_ends_with_a_new_root() -> None:
    """M10: a version of 2⁶³ is accepted while its key is good; after the rotation versions start over."""
    repository = Repository()
    repository.publish(MODEL, "main", b"first")
    honest = dict(repository.versions)
    repository.versions |= {TIMESTAMP: 2**63, SNAPSHOT: 2**62}
    repository.sign_snapshot()
    rushed = believed(repository)
    assert rushed.versions()[TIMESTAMP] == 2**63 + 1
    repository.versions |= {TIMESTAMP: honest[TIMESTAMP], SNAPSHOT: honest[SNAPSHOT]}
    repository.sign_snapshot()
    with pytest.raises(RollbackDetected):
        follow(rushed, repository.files)
    repository.rotate(online=make_key(31))
    after = follow(rushed, repository.files)
    assert after.versions()[TIMESTAMP] < 100 and after.target(MODEL, "main", NOW) is not None


def test_after_a_rotation_of_its_key_the_timestamp_and_its_snapshot_start_over() -> None:
    """TUF 5.3.11: also where the snapshot's own key is still good."""
    repository = Repository(timestamp_key=make_key(71))
    honest = dict(repository.versions)
    repository.versions[SNAPSHOT] = 2**40
    repository.versions[PUBLIC] = 2**40
    repository.sign_role(PUBLIC)
    repository.sign_snapshot()
    rushed = believed(repository)
    repository.versions |= honest
    repository.timestamp_key = make_key(72)
    repository.sign_root()
    repository.sign_snapshot()
    assert follow(rushed, repository.files).versions()[SNAPSHOT] < 100


# FAULTS M5: when


@pytest.mark.parametrize("role", ["root", TIMESTAMP, SNAPSHOT, TARGETS, "publisher"])
def test_what_has_expired_is_refused(role: str) -> None:
    """M5: at a refresh, and while it is kept."""
    repository = Repository()
    repository.publish(MODEL, "main", b"first")
    repository.lifetimes |= dict.fromkeys(repository.lifetimes, timedelta(days=3)) | {role: timedelta(days=1)}
    repository.rotate(root=repository.root_keys, publisher=make_key(6))
    later = NOW + 2 * DAY
    with pytest.raises(MetadataExpired) as raised:
        believed(repository, now=later)
    assert raised.value.expires == NOW + DAY
    held = believed(repository)
    with pytest.raises(MetadataExpired):
        held.check(later)
        held.target(MODEL, "main", later)
    restored = trust.begin(repository.root, held.kept(), later)
    assert restored.complete == (role in ("publisher",)), "what has expired is kept only to hold newer against"
    repository.now = later
    repository.lifetimes[role] = timedelta(days=3)
    repository.rotate(root=repository.root_keys, publisher=make_key(6))
    assert follow(restored, repository.files, later).target(MODEL, "main", later) is not None


def test_an_expired_timestamp_still_counts_against_rollback() -> None:
    repository = Repository()
    old = dict(repository.files)
    repository.sign_timestamp()
    held = believed(repository)
    restored = trust.begin(repository.root, held.kept(), NOW + 4 * DAY)
    assert not restored.complete
    with pytest.raises(RollbackDetected):
        follow(restored, old, NOW + 4 * DAY)


def test_a_clock_that_is_wrong_is_named() -> None:
    """M5, F28: behind, by what was signed; ahead, by what the source says."""
    repository = Repository()
    for behind in (2 * DAY, 365 * DAY, 600.0):
        with pytest.raises(ClockSkew):
            believed(repository, now=NOW - behind)
        with pytest.raises(ClockSkew):
            believed(repository).check(NOW - behind)
    believed(repository, now=NOW - 200)
    with pytest.raises(MetadataExpired) as raised:
        believed(repository, now=NOW + 5 * DAY)
    date = "Fri, 15 Jan 2027 08:00:00 GMT"
    assert isinstance(trust.skewed(raised.value, date, NOW + 5 * DAY), ClockSkew)
    for said, now in ((None, NOW + 5 * DAY), ("rubbish", NOW + 5 * DAY), (date, NOW + 100.0)):
        assert trust.skewed(raised.value, said, now) is raised.value
    late = "Fri, 22 Jan 2027 08:00:00 GMT"
    assert trust.skewed(raised.value, late, NOW + 5 * DAY) is raised.value, "by their clock it has expired too"


# Bounds and form


def test_what_is_too_long_is_refused() -> None:
    repository = Repository()
    before = believed(repository)
    long = changed(repository.timestamp, lambda document: document["signed"].update(filler="x" * 20_000))
    with pytest.raises(MetadataTooLarge):
        follow(before, {**repository.files, "timestamp.json": long})
    timestamp = repository.make_timestamp(9)
    timestamp.snapshot_meta.version, timestamp.snapshot_meta.length = 9, 1 << 40
    with pytest.raises(MetadataTooLarge):
        follow(before, {**repository.files, "timestamp.json": sign(timestamp, [repository.online_key])})


def test_roots_without_end_are_not_followed() -> None:
    repository = Repository()
    before = believed(repository)
    for _ in range(trust.MAX_ROTATIONS):
        repository.sign_root()
    assert follow(before, repository.files).versions()["root"] == trust.MAX_ROTATIONS + 1
    repository.sign_root()
    with pytest.raises(MetadataTooLarge):
        follow(before, repository.files)


def test_a_role_speaks_for_its_organisation_only() -> None:
    repository = Repository(orgs=("acme", "other"))
    repository.set_ref(MODEL, "main", b"first")
    role = repository.refs[PUBLIC]
    stolen = replace_path(repository, "other/tiny/main")
    role["other/tiny/main"] = stolen
    role["acme/tiny/../x"] = stolen
    role["acme/tiny"] = stolen
    repository.sign_role(PUBLIC)
    repository.sign_snapshot()
    found = believed(repository)
    assert list(found.models()) == [MODEL] and list(found.refs(MODEL)) == ["main"]


@pytest.mark.parametrize(("paths", "models"), [(["*/*/*"], ["acme/tiny"]), (["acme/other/*"], [])])
def test_neither_its_name_nor_its_paths_alone_let_a_role_speak(paths: list[str], models: list[str]) -> None:
    """Delegated too much it speaks for its organisation still; delegated less, for less."""
    repository = Repository()
    repository.set_ref(MODEL, "main", b"first")
    repository.refs[PUBLIC]["other/tiny/main"] = replace_path(repository, "other/tiny/main")
    repository.sign_role(PUBLIC)
    targets = repository.make_targets(repository.next(TARGETS))
    assert targets.delegations is not None and targets.delegations.roles is not None
    targets.delegations.roles[PUBLIC].paths = paths
    repository.put(TARGETS, sign(targets, [repository.targets_key]))
    repository.sign_snapshot()
    assert list(believed(repository).models()) == models


def test_roles_are_kept_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "MAX_ROLES", 2000)
    repository = Repository(orgs=[f"org{n}" for n in range(9)])
    before = trust.begin(repository.root, None, NOW)
    files = repository.files
    found = follow(before, files)
    for org in repository.orgs:
        found.take(public_role(org), files[f"1.{public_role(org)}.json"], NOW)
    assert sum(len(files[f"1.{role}.json"]) for role in found.roles) <= 2000
    assert found.access(NOW) is not None, "whose tokens are good is never let go"


def replace_path(repository: Repository, path: str) -> Any:
    """The target of ``main`` under another path."""
    target = repository.refs[PUBLIC][f"{MODEL}/main"]
    return type(target)(target.length, target.hashes, path, target.unrecognized_fields)


@pytest.mark.parametrize(("name", "value"), [("hashes", {"md5": "ab" * 16}), ("length", 0), ("length", 6 << 20)])
def test_a_target_that_is_no_manifest_is_refused(name: str, value: object) -> None:
    """M7."""
    repository = Repository()
    repository.set_ref(MODEL, "main", b"first")
    setattr(repository.refs[PUBLIC][f"{MODEL}/main"], name, value)
    repository.sign_role(PUBLIC)
    repository.sign_snapshot()
    with pytest.raises(TrustError):
        believed(repository)


RIGHT = Repository()
RIGHT.publish(MODEL, "main", b"first")
BEFORE = believed(RIGHT)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_bytes_are_anything_but_believed_or_refused(data: st.DataObject) -> None:
    """Whatever a source sends, what is believed afterwards was signed, or a TrustError says why not."""
    name = data.draw(st.sampled_from(sorted(RIGHT.files)))
    right = RIGHT.files[name]
    where = data.draw(st.integers(0, len(right) - 1))
    wrong = data.draw(
        st.one_of(
            st.binary(max_size=200),
            st.builds(
                lambda part: right[:where] + part + right[where + len(part) :], st.binary(min_size=1, max_size=4)
            ),
            st.just(right[:where]),
            st.builds(
                lambda text: right.replace(b'"version":', b'"version":' + text), st.sampled_from([b"-", b"1e3", b"[]"])
            ),
        )
    )
    try:
        found = follow(trust.begin(RIGHT.root, None, NOW), {**RIGHT.files, name: wrong})
    except TrustError:
        return
    assert found.refs(MODEL) == BEFORE.refs(MODEL)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=100))
def test_a_root_or_kept_metadata_is_what_it_claims(data: bytes) -> None:
    with pytest.raises(TrustError):
        trust.begin(data, None, NOW)
    with pytest.raises(DecodeError):
        Kept.decode(data)


# What is kept


def test_what_is_kept_is_taken_up_again() -> None:
    repository = Repository()
    repository.publish(MODEL, "main", b"first")
    repository.rotate(root=repository.root_keys)
    held = believed(repository)
    kept = Kept.decode(held.kept().encode())
    assert kept == held.kept()
    taken = trust.begin(repository.root, kept, NOW)
    assert taken.complete and taken.target(MODEL, "main", NOW) == held.target(MODEL, "main", NOW)
    assert taken.files() == held.files()
    newer = trust.begin(repository.files["2.root.json"], kept, NOW)
    assert newer.complete, "any root that the network ever had goes with it"


def test_what_was_kept_of_another_network_is_left_out() -> None:
    mine, other = Repository(), Repository(root_keys=[make_key(n) for n in (41, 42, 43)])
    other.publish(MODEL, "main", b"theirs")
    kept = believed(other).kept()
    assert not trust.begin(mine.root, kept, NOW).complete
    assert trust.supersedes(believed(mine).kept(), kept)


def test_kept_metadata_only_goes_forward() -> None:
    repository = Repository()
    older = believed(repository).kept()
    repository.sign_timestamp()
    newer = believed(repository).kept()
    assert trust.supersedes(newer, older) and not trust.supersedes(older, newer) and not trust.supersedes(older, older)
    assert trust.supersedes(older, replace(older, roles={}, order=(1, 1, 0))), "more roles of the same state"
