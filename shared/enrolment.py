"""Who may be a member, and how a node proves that it is the one that was enrolled. Pure.

The enrolment file is TOML, a line a node:

    "berlin-1" = { url = "http://10.0.0.1:8720", region = "berlin", weight = 2, key = "<64 hex digits>" }

A node signs what it tells of itself, and when it leaves: the signature is over the bytes of the body as they are,
behind a word for what they are meant as, so that neither can be taken for the other, nor for anything else that is
ever signed with this key. In the body are the node's name, a nonce of the router that it is meant for, the boot (a
random word of this run of the node) and a sequence that only grows in it: what was recorded is of no use later or
elsewhere, and no clock needs to be right.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from shared.codec import decode_json, encode_json
from shared.errors import BadId, DecodeError, RequestError
from shared.keys import SIGNATURE, NodeKey, parse_public, verify
from shared.node import Node, State, parse_node, parse_state

SIGNATURE_FIELD = "Nearshard-Signature"
"""The field of a request with the signature of its body: 128 hex digits."""
MAX_BODY = 16 << 10
"""Bytes of what a node tells."""
MAX_SEQUENCE = 2**52 - 1
KEY, IDENTITY = "node.key", "node.json"
"""Files in a node's directory: its private key, and what there is to enrol."""
HEARTBEAT, LEAVE = b"nearshard heartbeat 1\0", b"nearshard leave 1\0"
UNSIGNED = bytes(SIGNATURE)
"""Stands for the signature of a node that gave none."""
_SIGNATURE = re.compile(r"[0-9a-f]{128}")
_WORD = re.compile(r"[0-9a-f]{0,32}")
_NOBODY = "# nobody is enrolled\n"
"""What the file is when the last node is out: an empty one is taken for one that is being written."""
_FIELDS = ("key", "region", "url", "weight")


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A node that may join: where, with at most which weight, and the public key that proves that it is the one."""

    node: Node
    key: bytes


@dataclass(frozen=True, slots=True)
class Told:
    """What a node told of itself, with the bytes that prove it."""

    node: Node
    state: State
    boot: str
    sequence: int
    nonce: str
    body: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Leave:
    """A node's word that it goes. ``boot`` and ``sequence`` say which of its heartbeats it comes after."""

    node: str
    boot: str = ""
    sequence: int = 0
    nonce: str = ""


def sign(key: NodeKey, purpose: bytes, document: Mapping[str, Any]) -> tuple[bytes, str]:
    """The body to send, and the value of its signature field. ``purpose``: HEARTBEAT or LEAVE."""
    body = encode_json(dict(sorted(document.items())))
    return body, key.sign(purpose + body).hex()


def parse_signature(text: str) -> bytes:
    """The signature in a field. Raises RequestError (``bad_signature``)."""
    if not _SIGNATURE.fullmatch(text):
        raise RequestError("a signature is 128 hex digits", code="bad_signature")
    return bytes.fromhex(text)


def parse_told(node: str, body: bytes, signature: bytes = UNSIGNED) -> Told:
    """What a heartbeat of ``node`` says; nothing of it is proven yet. Raises RequestError."""
    document = _document(node, body)
    boot, sequence, nonce = _order(document)
    return Told(parse_node(node, document), parse_state(document), boot, sequence, nonce, body, signature)


def parse_leave(node: str, body: bytes) -> Leave:
    """What a node says that goes; nothing of it is proven yet. Raises RequestError."""
    return Leave(node, *_order(_document(node, body)))


def _document(node: str, body: bytes) -> dict[str, Any]:
    document = decode_json(body)
    if len(body) > MAX_BODY:
        raise RequestError(f"more than {MAX_BODY} bytes", code="too_large")
    if not isinstance(document, dict):
        raise RequestError("a node record is a map", code="bad_node")
    if document.get("id", node) != node:
        raise RequestError("the record is another node's", code="bad_node")
    return document


def _order(document: Mapping[str, Any]) -> tuple[str, int, str]:
    boot, sequence, nonce = document.get("boot", ""), document.get("sequence", 0), document.get("nonce", "")
    if type(sequence) is not int or not 0 <= sequence <= MAX_SEQUENCE:
        raise RequestError("a sequence is a count", code="bad_node")
    if not all(isinstance(word, str) and _WORD.fullmatch(word) for word in (boot, nonce)):
        raise RequestError("boot and nonce are hex digits", code="bad_node")
    return boot, sequence, nonce


def check_signature(enrolled: Enrolled | None, purpose: bytes, signature: bytes, body: bytes) -> Enrolled:
    """The enrolment of whoever signed this. Raises RequestError (``not_enrolled``, ``bad_signature``)."""
    if enrolled is None:
        raise RequestError("the node is not enrolled", code="not_enrolled")
    if not verify(enrolled.key, signature, purpose + body):
        raise RequestError("not signed with the key that the node was enrolled with", code="bad_signature")
    return enrolled


def check_proven(told: Told, enrolled: Mapping[str, Enrolled] | None) -> None:
    """Whether a node may be a member as it told: signed by its key, and as it was enrolled; with no enrolment
    (None), any node of this machine. Raises RequestError (``not_enrolled``, ``bad_signature``, ``bad_node``)."""
    if enrolled is None:
        if not is_loopback(told.node.url):
            raise RequestError("without an enrolment file, only nodes on loopback may join", code="not_enrolled")
        return
    known = check_signature(enrolled.get(told.node.id), HEARTBEAT, told.signature, told.body)
    check_as_enrolled(told, known)


def check_as_enrolled(told: Told, enrolled: Enrolled) -> None:
    """Whether the node is where it was enrolled to be. Raises RequestError (``not_as_enrolled``)."""
    mine, theirs = enrolled.node, told.node
    if (theirs.id, theirs.url, theirs.region) != (mine.id, mine.url, mine.region) or theirs.weight > mine.weight:
        raise RequestError("url, region or weight is not as enrolled", code="not_as_enrolled")


def is_loopback(url: str) -> bool:
    """Whether a node's URL means the machine itself."""
    host = urlsplit(url).hostname or ""
    return host == "localhost" or is_loopback_address(host)


def is_loopback_address(text: str) -> bool:
    """Whether this is an address of the machine itself."""
    try:
        address = ip_address(text)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


# The file


def parse_enrolment(text: str) -> tuple[dict[str, Enrolled], dict[str, str]]:
    """The nodes in an enrolment file, and by name what is wrong with the others. Raises DecodeError: not TOML."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also an integer of 5,000 digits
        raise DecodeError(f"not TOML: {error}") from error
    nodes: dict[str, Enrolled] = {}
    wrong: dict[str, str] = {}
    for name, record in document.items():
        try:
            nodes[name] = parse_enrolled(name, record)
        except RequestError as error:
            wrong[name] = str(error)
    return nodes, wrong


def parse_enrolled(name: str, record: object) -> Enrolled:
    """One node of the file. Raises RequestError (``bad_node``, ``bad_key``)."""
    if not isinstance(record, dict) or not set(record) <= set(_FIELDS):
        raise RequestError(f"a node has {', '.join(_FIELDS)}", code="bad_node")
    key = record.get("key")
    if not isinstance(key, str):
        raise RequestError("a public key is 64 hex digits, lower case", code="bad_key")
    try:
        return Enrolled(parse_node(name, record), parse_public(key))
    except BadId as error:
        raise RequestError(str(error), code="bad_node") from error


def enrolment_line(enrolled: Enrolled) -> str:
    """A node's line. What is in it needs no escapes: names, a plain URL, hex digits."""
    node = enrolled.node
    return (
        f'"{node.id}" = {{ url = "{node.url}", region = "{node.region}", weight = {node.weight}, '
        f'key = "{enrolled.key.hex()}" }}'
    )


def change_enrolment(text: str, node: str, enrolled: Enrolled | None) -> str:
    """The file with the node's line in it, in the place of an older one; without it where ``enrolled`` is None.

    All other lines stay as they are. Raises RequestError where that is not possible: a file in another form.
    """
    before, _ = parse_enrolment(text)
    own = re.compile(rf'\s*(?:"{re.escape(node)}"|\'{re.escape(node)}\'|{re.escape(node)})\s*=')
    lines = [line for line in text.splitlines() if not own.match(line) and line != _NOBODY.strip()]
    if enrolled is not None:
        # Above the first [table], should there be one: below it, the line would be a part of it.
        end = next((at for at, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
        lines.insert(end, enrolment_line(enrolled))
    changed = "".join(f"{line}\n" for line in lines) or _NOBODY
    expected = {name: known for name, known in before.items() if name != node}
    if enrolled is not None:
        expected[node] = enrolled
    if parse_enrolment(changed)[0] != expected:
        raise RequestError(f"the file has {node} in a form that only a person can change", code="bad_node")
    return changed
