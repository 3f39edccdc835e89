"""Which networks this user trusts: ``networks.toml`` in the user's configuration directory, and a root file for each.

    [[network]]
    root = "roots/<SHA-256 of the file>.json"
    urls = ["http://127.0.0.1:8700", ...]

A URL is of one network. ``nearshard up`` notes its own, ``nearshard trust accept`` others'.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shared.codec import encode_json
from shared.digest import digest_of, hex_of
from shared.errors import ConfigError, DiskError
from shared.files import home, locked, replace_file

DEFAULT_ROUTER = "http://127.0.0.1:8700"
HEAD = "# Networks whose signed metadata is trusted: `nearshard up` and `nearshard trust accept` note them here.\n"


@dataclass(frozen=True)
class Network:
    """A network that is trusted. ``root``: its file, relative to the configuration directory or absolute."""

    root: str
    urls: tuple[str, ...]


def config_dir() -> Path:
    """Where networks are noted."""
    return home("XDG_CONFIG_HOME", "~/.config")


def state_file(root: bytes) -> Path:
    """Where what is believed of the network with this root is kept."""
    return home("XDG_DATA_HOME", "~/.local/share") / "trust" / f"{hex_of(digest_of(root))}.msgpack"


def find_root(urls: Sequence[str]) -> Path:
    """The root file of the network that has these URLs. Raises ConfigError where none is known, or they are of two."""
    found = {network.root for network in _load() for url in urls if url in network.urls}
    if not found:
        raise ConfigError(
            f"no network with {urls[0]} is trusted yet: run `nearshard trust accept {urls[0]}` and compare the"
            " fingerprint with whoever runs it, or name its root.json with --trust-root (NEARSHARD_TRUST_ROOT)"
        )
    if len(found) > 1:
        raise ConfigError(f"{', '.join(urls)} are of different networks, by {_file()}")
    return config_dir() / found.pop()


def note(urls: Sequence[str], root: bytes) -> Path:
    """Trust the network with this root at these URLs, and no other there; the file that says so. Raises DiskError."""
    name = f"roots/{hex_of(digest_of(root))}.json"
    file = _file()
    try:
        (config_dir() / "roots").mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(file):
            replace_file(config_dir() / name, root, mode=0o600, sync=True)
            networks = list(_noted(_load(), name, urls))
            replace_file(file, (HEAD + "".join(map(_table, networks))).encode(), mode=0o600, sync=True)
    except OSError as error:
        raise DiskError(f"{file}: {error.strerror}") from error
    return file


def _noted(networks: Sequence[Network], root: str, urls: Sequence[str]) -> Iterator[Network]:
    mine = [url for network in networks if network.root == root for url in network.urls]
    for network in networks:
        others = tuple(url for url in network.urls if url not in urls)
        if network.root != root and others:
            yield replace(network, urls=others)
    yield Network(root, tuple(dict.fromkeys((*mine, *urls))))


def _table(network: Network) -> str:
    urls = encode_json(network.urls).decode()  # strings of JSON are strings of TOML
    return f"\n[[network]]\nroot = {encode_json(network.root).decode()}\nurls = {urls}\n"


def _file() -> Path:
    return config_dir() / "networks.toml"


def _load() -> list[Network]:
    """Raises ConfigError."""
    file = _file()
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        networks = [Network(table["root"], tuple(table["urls"])) for table in document.get("network", [])]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if not all(isinstance(text, str) for network in networks for text in (network.root, *network.urls)):
        raise ConfigError(f"{file}: root and urls are text")
    return networks
