"""Enrolling nodes: changes of the file that says which nodes may join."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.codec import decode_json
from shared.enrolment import IDENTITY, KEY, Enrolled, change_enrolment, parse_enrolled
from shared.errors import ConfigError, DecodeError, DiskError, RequestError
from shared.files import replace_file
from shared.keys import load_or_make_key

MAX_FILE = 64 << 20


def read_identity(data: Path) -> dict[str, Any]:
    """What a node of this machine says of itself, in its directory: id, url, region, weight, as far as it has been
    started, and its public key, made now where it has none. Raises DiskError, ConfigError."""
    file = data / IDENTITY
    try:
        said = decode_json(file.read_bytes())
        if not isinstance(said, dict):
            raise DecodeError("not an object")
    except FileNotFoundError:
        said = {}
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error
    except DecodeError as error:
        raise ConfigError(f"{file}: {error}") from error
    return {**said, "key": load_or_make_key(data / KEY).public.hex()}


def enrolled_of(said: dict[str, Any]) -> Enrolled:
    """A node from its id, url, region, weight and key. Raises RequestError, naming what is missing."""
    if missing := [name for name in ("id", "url", "region", "key") if not said.get(name)]:
        raise RequestError(f"missing: {', '.join(missing)}")
    record = {name: said[name] for name in ("url", "region", "key")}
    return parse_enrolled(str(said["id"]), {**record, "weight": said.get("weight", 1)})


def change_file(file: Path, node: str, enrolled: Enrolled | None) -> None:
    """Put the node's line into the file, or take it out (None); the file is made where there is none.

    It changes in one step, so that a router never reads half of it. Raises DiskError, RequestError.
    """
    try:
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        replace_file(file, change_enrolment(text, node, enrolled).encode())
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8") from error
