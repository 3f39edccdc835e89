"""An origin that kills itself: ``python -m tests.dying POINT CALL ...`` dies as a function is called so often."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any


def die_at(point: str, call: int) -> None:
    """Have the process killed as the function or method ``point`` is called for the ``call``th time."""
    path, _, name = point.rpartition(".")
    try:
        owner: Any = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, kind = path.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    real, calls = getattr(owner, name), []

    def die(*words: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*words, **options)

    setattr(owner, name, die)


if __name__ == "__main__":
    from origin.app import build_app
    from origin.config import OriginSettings
    from shared.web.command import serve

    die_at(sys.argv[1], int(sys.argv[2]))
    del sys.argv[1:3]
    serve(OriginSettings, build_app)
