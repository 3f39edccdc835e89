"""Write docs/reference.md from the code: settings, errors, metrics, requests, checks. ``make docs``; a test looks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ByteSize
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from edge_node.api import operations as of_edge
from edge_node.config import EdgeSettings
from nearshard.doctor.checks import CHECKS
from origin.api import operations as of_origin
from origin.config import OriginSettings
from router.api import operations as of_router
from router.config import RouterSettings
from shared.config import ServiceSettings
from shared.errors import CODES
from shared.metrics import Metrics

TARGET = Path(__file__).parent.parent / "docs" / "reference.md"
SERVICES: tuple[type[ServiceSettings], ...] = (RouterSettings, OriginSettings, EdgeSettings)


def reference() -> str:
    """The page."""
    parts = [
        "# Reference\n\nMade from the code by `make docs`; do not edit.\n",
        "## Settings\n\nA table of a TOML file (`--config FILE`), then environment variables, then flags; each later "
        'one wins. `memory` of the edge is `[edge] memory = "1GiB"`, `NEARSHARD_EDGE_MEMORY=1GiB` or `--memory`.\n',
    ]
    for settings in SERVICES:
        parts.append(f"### {settings.service}\n\n| setting | default | what it is |\n|---|---|---|")
        parts += [
            f"| `{name}` | {_default(field.get_default(call_default_factory=True))} | {field.description} |"
            for name, field in _fields(settings)
        ]
        parts.append("")
    parts.append(
        "## Errors\n\n`application/problem+json` with these codes (RFC 9457); commands end with the exit code.\n"
    )
    parts.append("| code | status | exit | meaning |\n|---|---|---|---|")
    parts += [f"| `{code}` | {m.status} | {m.exit_code} | {m.title} |" for code, m in CODES.items()]
    parts.append("\n## Metrics\n\n`GET /metrics` of every service.\n")
    parts.append("| metric | type | labels | what it counts |\n|---|---|---|---|")
    for metric in sorted(vars(Metrics()).values(), key=lambda item: getattr(item, "_name", "")):
        if hasattr(metric, "_documentation"):
            labels = ", ".join(metric._labelnames)
            name = metric._name + "_total" * (metric._type == "counter")
            parts.append(f"| `{name}` | {metric._type} | {labels} | {metric._documentation} |")
    parts.append("\n`process_*` are of the process: memory, descriptors, processor time, start.")
    parts.append(
        "\n## HTTP API\n\n`GET /openapi.json` of every service is what it answers, as OpenAPI 3.1; "
        "[openapi.json](openapi.json) is that of all tiers. A GET has its HEAD. Operating a node, on loopback, has no "
        "`/admin` before it.\n"
    )
    parts.append("| request | answered by | what for |\n|---|---|---|")
    parts += _requests()
    parts.append("\n## Checks\n\nWhat `nearshard doctor` looks at ([doctor.md](doctor.md)).\n")
    parts.append("| check | read | judged | why | mended by | source |\n|---|---|---|---|---|---|")
    parts += [f"| `{c.id}` | {c.reads} | {c.rule} | {c.why} | {c.mend} | {c.source} |" for c in CHECKS]
    return "\n".join(parts) + "\n"


def _requests() -> Iterator[str]:
    """A line for each request that some tier answers."""
    tiers = {"origin": of_origin(), "router": of_router(), "edge": of_edge()}
    by_request: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for tier, operations in tiers.items():
        for one in operations:
            by_request.setdefault((one.path, one.method), (one.about, []))[1].append(tier)
    for (path, method), (about, answering) in sorted(by_request.items()):
        who = "all" if len(answering) == len(tiers) else ", ".join(answering)
        yield f"| `{method} {path}` | {who} | {about} |"


def _fields(settings: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The settings, and those of tables within, by their whole names."""
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _default(value: object) -> str:
    if value is PydanticUndefined or value is None or value in ("", [], {}):
        return ""
    if isinstance(value, ByteSize):
        return f"`{value.human_readable(separator=' ')}`"
    return f"`{str(value).replace(str(Path.home()), '~')}`"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
    sys.stdout.write(f"{TARGET}\n")
