"""How a client behaves on the link of the machine it runs on: rates, time windows, metered links, proxies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nearshard.pace import MOST
from shared.errors import RequestError
from shared.link import LinkPolicy, parse_policy
from shared.proxy import ProxyOf, choose_proxy

LEAST_RATE = 16_000
"""Bytes a second of one connection: nodes cut off who reads fewer than 10,000."""


def _directly(_: str) -> None:
    return None


@dataclass(frozen=True)
class Manners:
    """Made by ``parse_manners``; the default is no cap, no proxy, and a link that costs nothing by the byte."""

    policy: LinkPolicy = field(default_factory=LinkPolicy)
    proxy_of: ProxyOf = _directly

    def connections(self, wanted: int | None) -> int | None:
        """How many connections carry shards at once, None for as many as the link is worth, where ``wanted`` are: one
        on a metered link, and so few under the lowest cap that none is cut off for being slow."""
        if self.policy.metered:
            return 1
        borne = min(
            (cap // LEAST_RATE for cap in (self.policy.rate, *self.policy.windows.values()) if cap), default=MOST
        )
        return max(1, min(borne, wanted or MOST)) if borne < (wanted or MOST) else wanted


def parse_manners(
    *,
    limit_rate: int | str = 0,
    windows: Mapping[str, int | str] | None = None,
    metered: bool = False,
    proxy: str = "",
) -> Manners:
    """``limit_rate``: bytes a second of all connections together, as a number or like ``2M``; 0 is no cap.
    ``windows``: other caps by local time of day, as ``{"08:00-18:00": "500k"}``. ``metered``: whether the link costs by
    the byte: then only what is asked for is fetched, over one connection. ``proxy``: ``http://``, ``socks5://`` or
    ``socks5h://[user:password@]host:port`` (names are resolved there), or ``env`` for the environment's.

    Raises RequestError, ConfigError.
    """
    policy = parse_policy({"rate": limit_rate, "windows": windows or {}, "metered": metered}, LinkPolicy())
    if any(0 < cap < LEAST_RATE for cap in (policy.rate, *policy.windows.values())):
        raise RequestError(f"a rate is at least {LEAST_RATE // 1000}k: nodes cut off who reads slower; 0 is no cap")
    return Manners(policy, choose_proxy(proxy))
