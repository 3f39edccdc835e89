"""The file in which a router's members outlast its restart: the nodes' own signed words, so that it may be read by
the same rules as what comes over the network."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from router.exchange import from_record, to_record
from shared.codec import decode_json, encode_json
from shared.enrolment import Told
from shared.errors import DecodeError, DiskError, RequestError
from shared.files import replace_file

FILE = "members.json"
MAX_FILE = 256 << 20


def write_members(file: Path, epoch: int, members: Iterable[Told]) -> None:
    """Replace the file, in one step. Raises DiskError."""
    # Latin-1 gives each byte of a record a character, and most of it is ASCII.
    records = {told.node.id: to_record(told).decode("latin-1") for told in members}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, encode_json({"epoch": epoch, "records": records}))
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error


def read_members(file: Path) -> tuple[int, list[Told]]:
    """Epoch and members, none of them proven yet; 0 and none where there is no file. Raises DiskError."""
    try:
        document = decode_json(file.read_bytes(), MAX_FILE)
        epoch = document["epoch"]
        if type(epoch) is not int or not 0 <= epoch < 2**52:
            raise DecodeError("an epoch is a count")
        return epoch, [
            from_record(node.encode(), record.encode("latin-1")) for node, record in document["records"].items()
        ]
    except FileNotFoundError:
        return 0, []
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error
    except (RequestError, KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise DiskError(f"{file}: not a router's members") from error
