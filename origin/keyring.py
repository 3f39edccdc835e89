"""Private keys on disk: a folder of PEM files (PKCS #8, Ed25519), each readable by its owner alone.

Which role a key is of, the metadata says: a file's name is for people. Keys of roles that are offline are kept in
folders of their own, which are named when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from origin.config import KEYS, beside
from origin.signing import key_id
from shared.errors import ConfigError
from shared.keys import NodeKey, load_key, save_key

ROOT_FILE = "root.json"
"""What whoever checks knows the network by, beside the keys that made it."""
PUBLISHER_FILE = "publisher.pem"
"""A key that publishes for any organisation, each delegated when something is first published there: for networks of
one machine, where the targets key is at hand anyway."""


class Keyring(dict[str, NodeKey]):
    """Private keys at hand, by key id."""

    anybody: NodeKey | None = None
    """The one that publishes for any organisation."""


def load_ring(folders: Iterable[Path]) -> Keyring:
    """All keys in these folders. Raises ConfigError for a file that is no key or not private, DiskError."""
    ring = Keyring()
    for folder in folders:
        for file in sorted(folder.expanduser().glob("*.pem")):
            key = load_key(file)
            ring[key_id(key)] = key
            if file.name == PUBLISHER_FILE:
                ring.anybody = key
    return ring


def make_key(folder: Path, name: str) -> NodeKey:
    """A new key in ``<folder>/<name>``. Raises ConfigError where there is a file of that name, DiskError."""
    key = NodeKey.generate()
    try:
        save_key(folder / name, key)
    except FileExistsError:
        raise ConfigError(f"{folder / name} is there already, and keys are never overwritten") from None
    return key


def named(prefix: str, key: NodeKey) -> str:
    """A file name for a key: what it is of, and the beginning of its id."""
    return f"{prefix}-{key_id(key)[:8]}.pem"


def make_named(folder: Path, prefix: str) -> NodeKey:
    """A new key in a file that is named after it."""
    key = NodeKey.generate()
    save_key(folder / named(prefix, key), key)
    return key


def keys_beside(store: str) -> Path:
    """Where keys are looked for unless said."""
    return beside(store) / KEYS
