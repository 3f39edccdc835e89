"""The GeoIP database: a file of MaxMind's form, read in place."""

from __future__ import annotations

from pathlib import Path

import maxminddb

from router.location import Lookup
from shared.errors import ConfigError


def open_geoip(path: Path) -> Lookup:
    """The database at ``path``. Raises ConfigError where it is none, or is broken."""
    try:
        reader = maxminddb.open_database(path)
        reader.get("192.0.2.1")
    except (OSError, ValueError, maxminddb.InvalidDatabaseError) as error:
        raise ConfigError(f"router.geoip: {path} cannot be used: {error}") from error

    def lookup(address: str) -> object:
        """What it has of an address. A damaged record, or IPv6 in a database without, is as none."""
        try:
            return reader.get(address)
        except (ValueError, maxminddb.InvalidDatabaseError):
            return None

    return lookup
