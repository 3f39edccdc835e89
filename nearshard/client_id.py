"""What stays the same of this user's client: by it a rollout takes them, or not yet. It is told to nobody."""

from __future__ import annotations

import secrets
from contextlib import suppress

from nearshard.networks import config_dir
from shared.files import locked, replace_file


def client_id() -> str:
    """Made once, and kept; empty where it cannot be kept: then a rollout takes this client when it takes all."""
    file = config_dir() / "client-id"
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="ascii").strip()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(file):
            if not file.exists():
                replace_file(file, f"{secrets.token_hex(16)}\n".encode(), mode=0o600, sync=True)
            return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
