"""``nearshard trust ca`` and ``trust cert``: a deployment's certificates, as files that its operator keeps."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from shared.certificates import (
    CA_CERTIFICATE,
    CA_KEY,
    MAX_DAYS,
    Pair,
    load_authority,
    make_authority,
    make_certificate,
)
from shared.errors import DiskError, LocalError
from shared.files import replace_file
from shared.ids import parse_name


def ca_command(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where ca.pem and ca.key go; keep it offline.")],
    name: Annotated[str, typer.Option(help="What people see it called; at most 64 characters.")] = "nearshard",
) -> None:
    """Make the CA of a deployment. Give ca.pem to all services and clients, ca.key to nobody."""
    for file in (directory / CA_CERTIFICATE, directory / CA_KEY):
        if file.exists():
            raise LocalError(f"{file}: is there already; nothing was changed", code="exists")
    _write(make_authority(name[:64], datetime.now(UTC)), directory / CA_CERTIFICATE, directory / CA_KEY)


def cert_command(
    node: Annotated[str, typer.Argument(metavar="NODE", help="The node's name; any for an origin or a router.")],
    ca: Annotated[Path, typer.Option("--ca", help="The directory of `nearshard trust ca`.")],
    dns: Annotated[list[str] | None, typer.Option(help="A host name that it is reached by; again for more.")] = None,
    ip: Annotated[list[str] | None, typer.Option(help="An address that it is reached by; again for more.")] = None,
    days: Annotated[int, typer.Option(help=f"How long it is good for; at most {MAX_DAYS}.")] = MAX_DAYS,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for NODE.pem and NODE.key.")] = Path(),
) -> None:
    """Make a service's certificate, or the next one: it reads its files again when they change."""
    name = parse_name(node, "a node")
    if output.resolve() == ca.resolve() and f"{name}.key" == CA_KEY:
        raise LocalError(f"{ca / CA_KEY}: is the deployment's CA; say another --output", code="exists")
    pair = make_certificate(load_authority(ca), name, dns or [], ip or [], datetime.now(UTC), days)
    _write(pair, output / f"{name}.pem", output / f"{name}.key")


def _write(pair: Pair, certificate: Path, key: Path) -> None:
    """Each in one step; the key for its owner alone. Raises DiskError."""
    try:
        key.parent.mkdir(parents=True, exist_ok=True)
        replace_file(key, pair.key, mode=0o600)
        replace_file(certificate, pair.certificate)
    except OSError as error:
        raise DiskError(f"{key.parent}: {error.strerror}") from error
    sys.stdout.write(f"{certificate}\n{key}\n")


def add_certificate_commands(app: typer.Typer) -> None:
    """Let ``nearshard trust`` have these words."""
    app.command("ca", epilog="Example: nearshard trust ca ./ca --name 'Acme models'")(ca_command)
    app.command("cert", epilog="Example: nearshard trust cert berlin-1 --dns berlin-1.acme.example --ca ./ca")(
        cert_command
    )
