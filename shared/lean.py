"""Imports without what libraries load only because it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(module: str) -> Iterator[None]:
    """In the block ``module`` cannot be found, unless it is loaded already."""
    left_out = module not in sys.modules
    if left_out:
        sys.modules[module] = None  # type: ignore[assignment]  # as the import system has it: "not found"
    try:
        yield
    finally:
        if left_out:
            del sys.modules[module]
