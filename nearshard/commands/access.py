"""What a client is made with that a word of the command opens: of the options that all such words have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nearshard.commands.options import by_window
from nearshard.guide import parse_routers
from nearshard.kept import Kept, cache_file
from nearshard.manners import Manners, parse_manners
from nearshard.mirrored import say_waiting
from shared.token_file import given_token


def access(
    router: list[str],
    region: str | None,
    trust_root: Path | None,
    token_file: Path | None,
    ca: Path | None,
    accept_expired: list[str] | None = None,
) -> dict[str, Any]:
    """What a client is made with that goes on where the last command left off, also with no router left."""
    routers = parse_routers(router)
    kept = Kept(cache_file(routers, region))
    return {
        "router": routers,
        "region": region,
        "kept": kept,
        "trust_root": trust_root,
        "token": given_token(token_file),
        "ca": ca,
        "waiting": say_waiting,
        "accept_expired": accept_expired or [],
        "warn": _warn,
    }


def _warn(line: str) -> None:
    sys.stderr.write(f"warning: {line}\n")


def manners(limit_rate: str, windows: list[str] | None, metered: bool, proxy: str) -> Manners:
    """How it behaves on the link. Raises RequestError, ConfigError."""
    return parse_manners(limit_rate=limit_rate, windows=by_window(windows or []), metered=metered, proxy=proxy)
