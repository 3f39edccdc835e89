"""The timestamp and the files that it leads to, in one answer: for who knows nothing yet, behind a long round trip.

A msgpack map of file names and bytes; null where there is no such file. It is only a shorter way to the same files:
each is checked as if it had come alone, and what is not in it is asked for by its name. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from shared import codec
from shared.errors import DecodeError, UpstreamError
from shared.trust_names import ACCESS, SNAPSHOT, TARGETS, TIMESTAMP_FILE, parse_file_name, public_role

MEDIA_TYPE = "application/vnd.nearshard.trust+msgpack"
MAX_CHAIN = 4 << 20
"""Bytes of all files together; what does not fit is left out."""
MAX_BODY = MAX_CHAIN + (64 << 10)
"""Bytes of the whole answer, with names."""
MAX_ROOTS = 8
"""New roots that are put into one."""


def encode(files: Mapping[str, bytes | None]) -> bytes:
    """The body of the answer."""
    return codec.encode({"files": [[name, data] for name, data in files.items()]})


def decode(body: bytes) -> dict[str, bytes | None]:
    """The files in it, the timestamp among them. Raises UpstreamError."""
    try:
        files: dict[str, bytes | None] = dict(codec.decode(body, MAX_BODY)["files"])
        known = all(parse_file_name(name) and isinstance(data, bytes | None) for name, data in files.items())
        if not known or not isinstance(files.get(TIMESTAMP_FILE), bytes):
            raise DecodeError("not files of the metadata")
    except (DecodeError, KeyError, TypeError, ValueError) as error:
        raise UpstreamError(f"not a chain of metadata: {error}") from error
    return files


def leads_to(data: bytes) -> dict[str, int]:
    """The roles that a timestamp or a snapshot names, and their versions; none where it is not as it should be: whoever
    needs one will ask for it, and hear what is wrong."""
    try:
        meta = codec.decode_json(data, MAX_CHAIN)["signed"]["meta"]
        return {name.removesuffix(".json"): item["version"] for name, item in meta.items() if item["version"] > 0}
    except (DecodeError, KeyError, TypeError, AttributeError):
        return {}


def roles(org: str) -> tuple[str, ...]:
    """Those that are worth sending along, in the order of need."""
    return (SNAPSHOT, TARGETS, ACCESS, *([public_role(org)] if org else []))
