"""Options that several words have, and what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nearshard.networks import DEFAULT_ROUTER

Router = Annotated[
    list[str],
    typer.Option("--router", envvar="NEARSHARD_ROUTER", help="Router, edge or origin to ask; again for more."),
]
ROUTERS = [DEFAULT_ROUTER]
Token = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="NEARSHARD_TOKEN_FILE",
        help="File (mode 0600) of your token, for private models; NEARSHARD_TOKEN may hold the token itself.",
    ),
]
Region = Annotated[str | None, typer.Option("--region", envvar="NEARSHARD_REGION", help="The region you are in.")]
TrustRoot = Annotated[
    Path | None,
    typer.Option("--trust-root", envvar="NEARSHARD_TRUST_ROOT", help="A root.json of the network, to check refs by."),
]
Ca = Annotated[
    Path | None,
    typer.Option("--ca", envvar="NEARSHARD_CA", help="CA of the deployment, as PEM, beside the system's."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
JsonLines = Annotated[
    bool, typer.Option("--json", help="Print one line of JSON for each event; the result is the last.")
]
AcceptExpired = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-expired",
        help="'org/name@ref until 2027-01-31': go by metadata that has expired, 90 days ahead at most; again for more.",
    ),
]
LimitRate = Annotated[
    str,
    typer.Option(
        "--limit-rate", envvar="NEARSHARD_LIMIT_RATE", help="Bytes a second of all connections, like 2M; 0 is no cap."
    ),
]
Windows = Annotated[
    list[str] | None,
    typer.Option("--window", envvar="NEARSHARD_WINDOWS", help="HH:MM-HH:MM=RATE, another cap by time; again for more."),
]
Metered = Annotated[
    bool,
    typer.Option("--metered", envvar="NEARSHARD_METERED", help="The link costs by the byte: only what is asked for."),
]
Proxy = Annotated[
    str,
    typer.Option(
        "--proxy",
        envvar="NEARSHARD_PROXY",
        help="http://, socks5:// or socks5h://[user:password@]host:port; env: by HTTP_PROXY, NO_PROXY and their like.",
    ),
]


Data = Annotated[
    Path, typer.Option("--data", help="A node's data directory, or that of `nearshard up`.", envvar="NEARSHARD_DATA")
]
Nodes = Annotated[list[str] | None, typer.Option("--node", help="Only this node; again for more. All by default.")]
What = Annotated[str, typer.Argument(metavar="WHAT", help="org/name, org/name:task, or a shard's digest.")]
DEFAULT_DATA = Path("~/.local/share/nearshard")
NodeUrls = Annotated[
    list[str] | None,
    typer.Option("--node-url", help="A node elsewhere, by its URL, with a token for 'admin'; again for more."),
]
OperatorToken = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        envvar="NEARSHARD_TOKEN_FILE",
        help="File (mode 0600) of the token for services elsewhere; NEARSHARD_TOKEN may hold the token itself.",
    ),
]


Pin = Annotated[
    list[str] | None,
    typer.Option("--pin", envvar="NEARSHARD_PIN", help="MODEL@REF=sha256:…, stay there, whatever is signed; or more."),
]


def by_window(words: list[str]) -> dict[str, str]:
    """``HH:MM-HH:MM=RATE``, each."""
    return dict(word.partition("=")[::2] for word in words)
