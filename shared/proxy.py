"""Which proxy leads to a URL: none, one for all, or by the usual environment variables.

``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` (either case) are read as curl and Python read them, and
only where somebody asks for them: a variable that was set for another program must not change where models come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

from shared.errors import ConfigError

SCHEMES = ("http", "socks5", "socks5h")
ENVIRONMENT = "env"

ProxyOf = Callable[[str], str | None]
"""The proxy's URL for a URL that is asked, None where it is asked directly."""


def parse_proxy(text: str) -> str:
    """A proxy's URL. Raises ValueError, which does not repeat it: there may be a password in it."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in SCHEMES and parts.hostname and parts.port and parts.path in ("", "/")
    except ValueError:  # a port that is no number
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ValueError("a proxy is http://, socks5:// or socks5h://[user:password@]host:port")
    return text.rstrip("/")


def choose_proxy(setting: str) -> ProxyOf:
    """By a setting: empty is none, ``env`` is by the environment, else the proxy's URL, for all. Raises ConfigError."""
    if setting == ENVIRONMENT:
        return _by_environment(getproxies_environment())
    try:
        proxy = parse_proxy(setting) if setting else None
    except ValueError as error:
        raise ConfigError(f"proxy: {error}; or env, to go by HTTP_PROXY and its like") from error
    return lambda _: proxy


def _by_environment(found: Mapping[str, str]) -> ProxyOf:
    """The scheme's, else the one for all, unless the host is excepted. Raises ConfigError."""
    proxies: dict[str, str] = {}
    for name in ("http", "https", "all"):
        if value := found.get(name):
            try:
                proxies[name] = parse_proxy(value if "://" in value else f"http://{value}")
            except ValueError as error:
                raise ConfigError(f"{name.upper()}_PROXY: {error}") from error

    def choose(url: str) -> str | None:
        parts = urlsplit(url)
        if any(proxy_bypass_environment(host, found) for host in (parts.netloc, parts.hostname or "")):
            return None
        return proxies.get(parts.scheme, proxies.get("all"))

    return choose
