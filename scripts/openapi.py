"""Write docs/openapi.json from the code: what all tiers answer. ``make docs``; a test holds it in step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edge_node.api import operations as of_edge
from origin.api import operations as of_origin
from router.api import operations as of_router
from shared.openapi.tier import describe

TARGET = Path(__file__).parent.parent / "docs" / "openapi.json"


def text() -> str:
    """The document; what several tiers answer is described with the answers of all."""
    made = describe("", [*of_edge(), *of_origin(), *of_router()])
    paths = [f"{json.dumps(path)}: {_lines(methods)}" for path, methods in made.pop("paths").items()]
    rest = [f"{json.dumps(name)}: {_lines(part)}" for name, part in made.items()]
    return "{\n" + ",\n".join([*rest, '"paths": {\n' + ",\n".join(paths) + "\n}"]) + "\n}\n"


def _lines(part: Any) -> str:
    """A line for each thing in it: short enough a file, and a change of one operation is a change of one line."""
    if not isinstance(part, dict):
        return json.dumps(part, ensure_ascii=False)
    return "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in part.items()) + "\n}"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{TARGET}\n")
