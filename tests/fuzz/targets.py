"""The table of parsers that see bytes of the network. A new one is a line here."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from itertools import product

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save
from securesystemslib.exceptions import FormatError
from securesystemslib.formats import encode_canonical

from origin.hub_listing import bytes_path, info_path, parse_revision
from router.exchange import from_record, to_record
from router.location import Regions
from shared import codec, hub, manifest, parcel, plan, trust, trust_chain, view
from shared.acceptance import accept
from shared.bundle import END, Index, Unpacker, decode_index, entry_name, head, padding
from shared.conditional import Conditions, Partial, evaluate
from shared.deltas import ways
from shared.digest import digest_of, parse_digest
from shared.enrolment import HEARTBEAT, parse_enrolment, parse_leave, parse_signature, parse_told, sign
from shared.errors import ConfigError, DecodeError, NonFinite
from shared.federated import (
    OpenRound,
    PastRound,
    Rounds,
    Statement,
    encode_rounds,
    parse_rounds,
    parse_statement,
    sign_statement,
)
from shared.ids import parse_task_id
from shared.keys import NodeKey, parse_public
from shared.layout import Layout, Slice
from shared.manifest import Delta, Manifest, Task, Tensor
from shared.paths import manifest_path, parse_path
from shared.publishing import SESSION, Opening, make_opening, parse_opening, parse_shards
from shared.tensorfile import PREFIX, header_length, parse_header
from shared.tokens import AccessList, TokenKey, issue, key_id, parse_scopes, read_claims
from shared.tracing import MAX_STATE, REQUEST_ID, TRACEPARENT, TRACESTATE, context_of
from shared.trust_names import SNAPSHOT, file_name, parse_file_name, public_role
from shared.trust_names import TARGETS as TARGETS_ROLE
from shared.updates.codecs import codec as codec_of
from shared.updates.codecs import codec_name
from shared.updates.document import open_update, write_update
from shared.web.plain import PlainRequests
from tests.fuzz.fuzz import Target
from tests.metadata import Repository

SIZE = 1000
ETAG = "ab" * 32
A, B = digest_of(b"a"), digest_of(b"b")
KEY = NodeKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
ENROLLED = f'"n-1" = {{ url = "http://h:1", region = "r", key = "{KEY.public.hex()}" }}\n'
HOPS = ["10.1.2.3, 192.0.2.1", "[2001:db8::1]:443\n10.9.0.7", "::ffff:10.1.1.1"]
MANIFEST = Manifest(
    "acme/minilm",
    {A: 100, B: 50},
    {
        "config.json": Layout(30, ETAG, (Slice(A, 10, 30),)),
        "weights/model.safetensors": Layout(150, ETAG, (Slice(A, 0, 100), Slice(B, 0, 50))),
    },
    {"embed": Task("embed", Layout(50, ETAG, (Slice(B, 0, 50),)), "model.safetensors", ("config.json",), "vectors")},
    (Tensor("w", "F32", (2, 5), "weights/model.safetensors", (Slice(A, 60, 40),)),),
)
DAY = datetime(2026, 1, 2, tzinfo=UTC)
STATEMENT = sign_statement(Statement("berlin", "acme/minilm", 3, A, bytes(16), DAY, 5, B, 9, ("int4",)), KEY)[0]
ROUNDS = Rounds(
    "acme/minilm",
    OpenRound(3, A, "open", ("*.lora_*",), DAY, ("*",), 5, 10, 2, 1 << 20, 0.5, "trimmed"),
    (PastRound(2, B, "published", 7, A, "2026-01-01"),),
)
OLD, PARCEL = digest_of(b"old"), digest_of(b"parcel")
DELTAS = dataclasses.replace(
    MANIFEST,
    parent=digest_of(b"parent"),
    deltas=(Delta(A, PARCEL, (Slice(OLD, 5, 60), Slice(B, 0, 40))), Delta(OLD, PARCEL)),
    others={PARCEL: 30, OLD: 65},
)
PLAN = plan.build(MANIFEST, MANIFEST.tasks["embed"], lambda _: ["http://10.1.0.5:8720", "https://edge.example.org"])
NODE = {"id": "n-1", "url": "http://10.1.0.5:8720", "region": "north", "weight": 2}
HEARTBEAT_OF = {**NODE, "boot": "ab" * 8, "sequence": 7, "nonce": "cd" * 16, "in_flight": 3, "draining": False}
VIEW = {
    "epoch": 4, "region": "north", "regions": ["north"], "left_off": 0, "origins": ["https://origin.example.org:8710"],
    "nodes": [{**NODE, "draining": False, "ejected": False}],
}  # fmt: skip
LISTING = {
    "id": "Acme/MiniLM", "sha": "ab" * 20, "private": False, "gated": "auto",
    "siblings": [{"rfilename": "a/model.safetensors", "size": 9, "lfs": {"sha256": ETAG, "size": 9, "pointerSize": 1}},
                 {"rfilename": "config.json", "size": 3, "blobId": "ab" * 20}],
}  # fmt: skip
TASK_IDS = ["acme/minilm", "acme/minilm:embed-3l@v2", f"demo/a.b_c:all@{A}"]
PATHS = [f"/shards/{TASK_IDS[1]}", f"/blobs/{A}", "/models", f"/models/acme/minilm/files/{A}/a/b%20c.json?x=1",
         "/models/acme/minilm/manifests/main"]  # fmt: skip
RANGES = [
    "bytes=0-0\n\n\n",
    f'bytes=10-\n"{ETAG}"\n\n',
    f'bytes=-5\n\n"{ETAG}"\n',
    f'bytes=1-2,5-6\n\n\nW/"x", "{ETAG}"',
    "\n\n\n*",
]
"""Lines: Range, If-Range, If-Match, If-None-Match."""
REQUEST = (
    f'GET /blobs/{A} HTTP/1.1\r\nHost: edge\r\nAccept: */*\r\nIf-None-Match: "{ETAG}"\r\nConnection: keep-alive\r\n\r\n'
)


def text(data: bytes) -> str:
    """As the HTTP library hands on what it is not sure of."""
    return data.decode("utf-8", "surrogateescape")


def _task_id(data: bytes) -> None:
    assert str(parse_task_id(text(data))).startswith(text(data).partition("@")[0].partition(":")[0])


def _path(data: bytes) -> None:
    parse_path(text(data))


def _hub(data: bytes) -> None:
    model, _, ref = text(data).partition("@")
    assert parse_path(manifest_path(hub.model_named(model), hub.ref_named(ref)))


def _conditions(data: bytes) -> None:
    fields = [[line] if line else [] for line in text(data).split("\n")] + [[]] * 4
    for method in ("GET", "HEAD"):
        decision = evaluate(Conditions(method, *fields[:4]), ETAG, SIZE)
        if isinstance(decision, Partial):
            assert 0 <= decision.span.start < decision.span.stop <= SIZE


def _manifest(data: bytes) -> None:
    decoded = manifest.decode(data)
    assert all(slice_.digest in decoded.shards for layout in decoded.files.values() for slice_ in layout.slices)
    for steps in ways(decoded, decoded.shards, lambda _: False).values():
        assert all(decoded.size_of(step.parcel) < decoded.size_of(step.target) for step in steps)


def _plan(data: bytes) -> None:
    urls = [url for found in plan.decode(data).urls.values() for url in found]
    assert all(url.startswith(("http://", "https://")) for url in urls)


def _view(data: bytes) -> None:
    view.decode(data).nearness()


def _msgpack(data: bytes) -> None:
    codec.encode(codec.decode(data, len(data)))


def _hub_listing(data: bytes) -> None:
    found = parse_revision(data)
    assert info_path(found.name, found.commit).startswith("/api/models/")
    for file in found.files:
        assert manifest.check_path(file.path) == file.path and file.size >= 0
        assert ".." not in bytes_path(found, file.path).split("/")


def _json(data: bytes) -> None:
    assert codec.decode_json(codec.encode_json(value := codec.decode_json(data)), 8 * len(data) + 64) == value


def _told(data: bytes) -> None:
    parse_told("n-1", data).node.record()


def _tensors(data: bytes) -> None:
    header = data[PREFIX : PREFIX + header_length(data[:PREFIX], len(data))]
    assert sum(tensor.size for tensor in parse_header(header, len(data)).tensors) <= len(data)


def _parcels() -> list[bytes]:
    """By each method: alone, upon a base that a LoRA was merged into, and upon one that was trained."""
    random = np.random.default_rng(0)
    lora = WEIGHTS + (random.standard_normal((64, 2)) @ random.standard_normal((2, 64)) / 999).astype(np.float32)
    trained = WEIGHTS + (random.standard_normal((64, 64)) / 9999).astype(np.float32)
    made = []
    for effort, target, based in product(parcel.Effort, (WEIGHTS, lora, trained), (False, True)):
        runs = [parcel.Run(8000, "F32", 64, based=based), parcel.Run(8384, "F32", 64, 2000, based=based)]
        runs = [parcel.Run(16384, "F32", 64, based=based)] if effort is parcel.Effort.MOST else runs
        base = WEIGHTS.tobytes() if based else b""
        made.append(parcel.encode(memoryview(target.tobytes()), memoryview(base), runs, effort))
    return list(dict.fromkeys(made))


def _parcel(data: bytes) -> None:
    for base in (WEIGHTS.tobytes(), b""):
        with suppress(DecodeError):
            assert len(parcel.decode(memoryview(data), memoryview(base), WEIGHTS.nbytes)) == WEIGHTS.nbytes


def _updates() -> list[bytes]:
    """With each codec that there is, of a matrix and what is not one."""
    shapes = {"w": (64, 64), "b": (64,), "s": (), "none": (0, 3)}
    made = []
    for name in ("int4", "fp32", "bf16", "int8", "ternary", "sign:lifted", "step:0.5", "top:0.1:sign", "lowrank:1"):
        file = BytesIO()
        write_update(file, shapes, lambda _, s: WEIGHTS.reshape(-1)[s.first : s.first + s.count], codec_of(name))
        made.append(file.getvalue())
    return made


def _update(data: bytes) -> None:
    update = open_update(BytesIO(data), len(data))
    for name, tensor in update.tensors.items():
        for number, placed in enumerate(tensor.segments):
            with suppress(DecodeError, NonFinite):  # the others are looked at too
                assert update.read(name, number).size == placed.segment.count


def _codec(data: bytes) -> None:
    assert codec_name(found := codec_name(text(data))) == found


def _trust_file(data: bytes) -> None:
    named = parse_file_name(text(data))
    assert named is None or file_name(*named) == text(data)


def _metadata(name: str, data: bytes) -> None:
    """One file of the metadata, as who may sign it could have signed it; all others are right."""
    signed = _signed_anew(name, data)
    if name == ROLE_FILE:
        FOLLOWED.verify(public_role("acme"), signed, NOW)
    else:
        _follow({**FILES, name: signed})


def _signed_anew(name: str, data: bytes) -> bytes:
    try:
        document = json.loads(data)
        words = str(encode_canonical(document["signed"])).encode()
        document["signatures"] = [signer.sign(words).to_dict() for signer in SIGNERS[name]]
        return json.dumps(document).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, FormatError):
        return data


def _follow(files: Mapping[str, bytes]) -> trust.Trust:
    """What comes of following a source that has these files, to the end."""
    steps = trust.refresh(trust.begin(files["1.root.json"], None, NOW), files["timestamp.json"], NOW)
    wanted = next(steps)
    try:
        while True:
            wanted = steps.send(files.get(wanted.name))
    except StopIteration as stop:
        made: trust.Trust = stop.value
    made.take(public_role("acme"), files[ROLE_FILE], NOW)
    return made


def _kept(data: bytes) -> None:
    trust.begin(FILES["1.root.json"], trust.Kept.decode(data), NOW)


def _token(data: bytes) -> None:
    assert ACCESS.verify(text(data), NOW) == read_claims(text(data)), "who may verify reads the same"


def _access(data: bytes) -> None:
    AccessList.parse(codec.decode_json(data)).document()


def _opening(data: bytes) -> None:
    parse_opening("acme/minilm", data, KEY.sign(SESSION + data).hex())


def _forwarded(data: bytes) -> None:
    lines = text(data).split("\n")
    Regions({"10.0.0.0/8": "north"}, "south", trusted=["10.9.0.0/16"]).find(None, "10.9.0.1", lines)


def _said_region(data: bytes) -> None:
    Regions({}, "south").find(text(data), None)


def _enrolment(data: bytes) -> None:
    parse_enrolment(data.decode("utf-8", "replace"))


def _record(data: bytes) -> None:
    from_record(b"n-1", data)


def _bundle(data: bytes) -> None:
    unpacker = Unpacker()
    unpacker.feed(data)
    unpacker.end()


def _accept(said: str) -> None:
    with suppress(ConfigError):
        accept([said], NOW, "fuzz")


def _make_bundle() -> bytes:
    parts = {"trust": b"{}", "manifests": MANIFEST.encoded, "blobs": b"shard"}
    entries = tuple((entry_name(kind, digest_of(data)), len(data)) for kind, data in parts.items())
    index = Index(
        "acme/minilm", "main", MANIFEST.revision, {"timestamp.json": digest_of(b"{}")}, entries, ("embed",), A
    )
    files = (
        head(name, size) + data + padding(size) for (name, size), data in zip(entries, parts.values(), strict=True)
    )
    return index.encode() + b"".join(files) + END


def _trace(data: bytes) -> object:
    parent, _, state = text(data).partition("|")
    given = {REQUEST_ID: parent, TRACEPARENT: parent, TRACESTATE: state}
    context = context_of(given, make_id=lambda: "made-anew")
    assert all(value.isprintable() and len(value) <= MAX_STATE for value in context.fields().values())
    assert not context.parent or len(context.trace_id) == 32
    return context


def _all(words: list[str]) -> list[bytes]:
    return [word.encode() for word in words]


def _safetensors() -> list[bytes]:
    whole = save({"a": np.zeros((2, 3), np.float32), "b": np.ones(5, np.int8)}, {"format": "pt"})
    (length,) = struct.unpack("<Q", whole[:PREFIX])
    return [whole, whole[: PREFIX + length], save({})]


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01|congo=t61rcWkgMzE"
TOLD, SIGNED = sign(KEY, HEARTBEAT, {**HEARTBEAT_OF, "rtt": {"south": 12.5}})
NOW = 1_800_000_000.0
REPOSITORY = Repository(now=NOW, hashes=False)
REPOSITORY.publish("acme/minilm", "main", MANIFEST.encoded)
ROLE_FILE = file_name(public_role("acme"), REPOSITORY.versions[public_role("acme")])
SIGNERS = {
    "1.root.json": REPOSITORY.root_keys,
    "timestamp.json": [REPOSITORY.online_key],
    file_name(SNAPSHOT, REPOSITORY.versions[SNAPSHOT]): [REPOSITORY.online_key],
    file_name(TARGETS_ROLE, REPOSITORY.versions[TARGETS_ROLE]): [REPOSITORY.targets_key],
    ROLE_FILE: [REPOSITORY.publisher_key],
}
FILES = dict(REPOSITORY.files)
FOLLOWED = _follow(FILES)
ACCESS = AccessList([TokenKey(key_id(KEY.public), KEY.public)], {"gone": NOW + 900})
TOKEN = issue(KEY, parse_scopes(["acme/*:read"]), token_id="t", now=NOW, lifetime=900)
OPENING, _ = make_opening(Opening("acme/minilm", "ab" * 16, KEY.public, False), KEY)
WEIGHTS = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
TARGETS = [
    Target("task id", _task_id, _all(TASK_IDS)),
    Target("path", _path, _all(PATHS)),
    Target("model and ref of a hub", _hub, _all([f"acme/minilm@{A}", f"acme/minilm@{A[7:47]}", "acme/minilm@main"])),
    Target("digest", lambda data: parse_digest(text(data)), _all([A])),
    Target("conditions", _conditions, _all(RANGES)),
    Target("plain request", PlainRequests().parse, _all([REQUEST])),
    Target("fields of a trace", _trace, _all([TRACE])),
    Target("accept", lambda data: plan.negotiate(text(data), ["a/b", "c/d"]), _all(["a/b;q=0.5, */*;q=0.1", "c/*"])),
    Target("manifest", _manifest, [MANIFEST.encoded, DELTAS.encoded]),
    Target("have", lambda data: plan.parse_have(text(data).split("&")), _all([A, f"{A}&{B}"])),
    Target("plan", _plan, [codec.encode(PLAN)]),
    Target("view", _view, [codec.encode_json(VIEW)]),
    Target("msgpack", _msgpack, [codec.encode({"a": [1, 2.5, None, b"x", "y"], "long": list(range(2000))})]),
    Target("hub's listing", _hub_listing, [codec.encode_json(LISTING)]),
    Target("json", _json, [codec.encode_json({"a": [1, 2.5, None, "y"], "b": {"c": True}})]),
    Target("heartbeat", _told, [TOLD]),
    Target("leave", partial(parse_leave, "n-1"), [codec.encode_json({"id": "n-1", "boot": "ab", "sequence": 1})]),
    Target("signature", lambda data: parse_signature(text(data)), _all([SIGNED])),
    Target("public key", lambda data: parse_public(text(data)), _all([KEY.public.hex()])),
    Target("record of Redis", _record, [to_record(parse_told("n-1", TOLD, parse_signature(SIGNED)))]),
    Target("enrolment", _enrolment, _all([ENROLLED])),
    Target("region", _said_region, _all(["north", "eu-1.a_b"])),
    Target("X-Forwarded-For", _forwarded, _all(HOPS)),
    Target("safetensors", _tensors, _safetensors()),
    *(Target(f"metadata {name}", partial(_metadata, name), [FILES[name]]) for name in SIGNERS),
    Target("chain of metadata", trust_chain.decode, [trust_chain.encode({**FILES, "2.root.json": None})]),
    Target("kept metadata", _kept, [FOLLOWED.kept().encode()]),
    Target("token", _token, _all([TOKEN])),
    Target("claims of a token", lambda data: read_claims(text(data)), _all([TOKEN])),
    Target("access list", _access, [codec.encode_json(ACCESS.document())]),
    Target("bundle", _bundle, [_make_bundle()]),
    Target("index of a bundle", decode_index, [_make_bundle()[512:].split(b"\0")[0]]),
    Target("acceptance", lambda data: _accept(text(data)), _all(["acme/minilm@main until 2027-01-31"])),
    Target("opening of a session", _opening, [OPENING]),
    Target("statements of sites", partial(parse_statement, "acme/minilm"), [STATEMENT]),
    Target(
        "answers about rounds", parse_rounds, [encode_rounds(ROUNDS), encode_rounds(Rounds("acme/minilm", None))]
    ),
    Target("shards of a session", parse_shards, [codec.encode_json({"shards": {A: 100, B: 50}})]),
    Target("parcel", _parcel, _parcels()),
    Target("update", _update, _updates()),
    Target("name of a codec", _codec, _all(["step:0.50", "top:0.1:sign:lifted", "int4:clipped"])),
    Target("trust file name", _trust_file, _all(["timestamp.json", "12.root.json", "3.acme~private.json"])),
]  # fmt: skip
