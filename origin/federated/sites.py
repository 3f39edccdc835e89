"""The sites: who may take part, and who was refused too often."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass

from origin.federated.documents import Site
from origin.federated.records import Records
from shared.errors import BadId, ConfigError, NotFound, RequestError
from shared.ids import parse_name
from shared.keys import parse_public

MAX_SITES = 1000


def parse_sites(text: str, where: str) -> dict[str, str]:
    """The sites of an operator's file, with their public keys as hex digits: a table ``[sites.<name>]`` with ``key``
    for each. Raises ConfigError, which begins with ``where``."""
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also an integer of 5,000 digits
        raise ConfigError(f"{where}: {error}") from error
    tables = document.get("sites")
    if document.keys() != {"sites"} or not isinstance(tables, dict) or not 0 < len(tables) <= MAX_SITES:
        raise ConfigError(f"{where}: 1 to {MAX_SITES} tables [sites.<name>], and nothing else, are expected")
    found: dict[str, str] = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or table.keys() != {"key"} or not isinstance(table["key"], str):
            raise ConfigError(f'{where}: sites.{name}: a table with key = "<64 hex digits>" is expected')
        try:
            parse_public(table["key"])
            parse_name(name, "a site")
        except (RequestError, BadId) as error:
            raise ConfigError(f"{where}: sites.{name}: {error}") from error
        if other := next((known for known, key in found.items() if key == table["key"]), None):
            raise ConfigError(f"{where}: sites.{name} has the key of sites.{other}: each site needs its own")
        found[name] = table["key"]
    return found


async def enrol(records: Records, keys: Mapping[str, str]) -> list[str]:
    """Have these sites known by these keys. Gives those that had another key: by it, they are no longer known."""
    changed: list[str] = []

    def edit(sites: dict[str, Site]) -> dict[str, Site]:
        changed[:] = [name for name, key in keys.items() if name in sites and sites[name].key != key]
        known = {name: sites[name] if name in sites else Site(key=key) for name, key in keys.items()}
        return {**sites, **{name: site.model_copy(update={"key": keys[name]}) for name, site in known.items()}}

    await records.change_sites(edit)
    return changed


@dataclass(frozen=True, slots=True)
class Struck:
    """What a strike did."""

    strikes: int
    quarantined: bool
    """Whether this one was the last that was borne."""


async def strike(records: Records, name: str, most: int) -> Struck:
    """Note that a site sent what no honest one does; with ``most`` strikes it is in quarantine."""
    now = await records.change_sites(lambda sites: {**sites, name: _struck(sites[name], most)})
    return Struck(now[name].strikes, now[name].quarantined and now[name].strikes == most)


def _struck(site: Site, most: int) -> Site:
    strikes = site.strikes + 1
    return site.model_copy(update={"strikes": strikes, "quarantined": site.quarantined or strikes >= most})


async def pardon(records: Records, name: str) -> Site:
    """Forget a site's strikes; what it was before. Raises NotFound (``unknown_site``)."""
    before: list[Site] = []

    def edit(sites: dict[str, Site]) -> dict[str, Site]:
        if name not in sites:
            raise NotFound(f"no site is called {name}", code="unknown_site")
        before[:] = [sites[name]]
        return {**sites, name: sites[name].model_copy(update={"strikes": 0, "quarantined": False})}

    await records.change_sites(edit)
    return before[0]
