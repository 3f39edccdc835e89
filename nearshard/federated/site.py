"""What a site has on this machine: a directory with its key, and for each model what its updates left behind.

sites/<site>/site.key                         private, mode 0600
sites/<site>/<org>/<name>/state.json          what counts (``nearshard.federated.state``)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nearshard.placing import on_disk
from shared.errors import ConfigError
from shared.files import home
from shared.ids import parse_name
from shared.keys import NodeKey, load_key, load_or_make_key

KEY = "site.key"


def default_sites() -> Path:
    """NEARSHARD_SITES, or ``sites`` in our folder of the user's data."""
    named = os.environ.get("NEARSHARD_SITES", "")
    return Path(named).expanduser() if named else home("XDG_DATA_HOME", "~/.local/share") / "sites"


@dataclass(frozen=True)
class Site:
    """A participant in rounds, with what proves that it is the one."""

    name: str
    folder: Path
    key: NodeKey

    @property
    def line(self) -> str:
        """What whoever runs the origin puts into the file of sites."""
        name = f'"{self.name}"' if "." in self.name else self.name  # TOML takes a bare dot for a table within a table
        return f'[sites.{name}]\nkey = "{self.key.public.hex()}"\n'


def enroll(name: str, root: Path | None = None) -> Site:
    """The site of that name on this machine; its key is made where there is none. Raises BadId, ConfigError,
    DiskError."""
    folder = (root or default_sites()) / parse_name(name, "a site")
    with on_disk():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Site(name, folder, load_or_make_key(folder / KEY))


def find_site(name: str | None = None, root: Path | None = None) -> Site:
    """The site of that name; without a name the only one of this machine. Raises BadId, ConfigError, DiskError."""
    sites = root or default_sites()
    if name is None:
        found = sorted(file.parent.name for file in sites.glob(f"*/{KEY}"))
        if len(found) != 1:
            there = f"there are {', '.join(found)} in {sites}: name one" if found else f"there is none in {sites}"
            raise ConfigError(f"which site? {there}; `nearshard federated enroll SITE` makes one")
        (name,) = found
    folder = sites / parse_name(name, "a site")
    try:
        return Site(name, folder, load_key(folder / KEY))
    except FileNotFoundError:
        raise ConfigError(f"{folder / KEY} is not there; `nearshard federated enroll {name}` makes it") from None
