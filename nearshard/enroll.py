"""Enrolling nodes: what a node says of itself, and having routers let it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nearshard.operate import Access, on_all
from shared.codec import decode_json
from shared.enrolment import IDENTITY, KEY, Enrolled, parse_enrolled
from shared.errors import ConfigError, DecodeError, DiskError, RequestError
from shared.keys import load_or_make_key
from shared.paths import ENROLMENTS


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


async def change_afar(routers: list[Access], node: str, enrolled: Enrolled | None) -> None:
    """Have routers let the node in, or throw it out (None). All are asked, also where one of them fails. Raises the
    first error."""
    if enrolled is None:
        await on_all(routers, "DELETE", f"{ENROLMENTS}/{node}")
    else:
        place = enrolled.node
        record = {"url": place.url, "region": place.region, "weight": place.weight, "key": enrolled.key.hex()}
        await on_all(routers, "PUT", f"{ENROLMENTS}/{node}", record)
