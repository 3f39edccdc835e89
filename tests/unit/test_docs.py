"""Docs that are made from the code are in step with it."""

from __future__ import annotations

import runpy
from pathlib import Path

from tests.faults.__main__ import coverage

ROOT = Path(__file__).parent.parent.parent


def test_the_reference_is_made_from_the_code() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "reference.py"))
    assert (ROOT / "docs" / "reference.md").read_text() == made["reference"](), "run: make docs"


def test_the_page_on_faults_says_what_is_covered() -> None:
    assert coverage() in (ROOT / "docs" / "faults.md").read_text(), "put there what `make faults ARGS=--list` prints"


def test_the_openapi_document_is_made_from_the_code() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "openapi.py"))
    assert (ROOT / "docs" / "openapi.json").read_text() == made["text"](), "run: make docs"
