"""The client of nearshard: ``Client`` (async), ``SyncClient``, and the ``nearshard`` command.

>>> from nearshard import SyncClient
>>> got = SyncClient("http://127.0.0.1:8700").get("demo/minilm:embed-3l", "embed-3l/")
>>> tensors = SyncClient("http://127.0.0.1:8700").load_task("demo/minilm:embed-3l")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearshard.client import Client, Got, SyncClient
    from nearshard.opened import BlockingFile, OpenFile
    from nearshard.repository import Repository
    from shared.errors import NearshardError

__all__ = ["BlockingFile", "Client", "Got", "NearshardError", "OpenFile", "Repository", "SyncClient"]

_HOMES = {
    "BlockingFile": "nearshard.opened",
    "Client": "nearshard.client",
    "Got": "nearshard.client",
    "NearshardError": "shared.errors",
    "OpenFile": "nearshard.opened",
    "Repository": "nearshard.repository",
    "SyncClient": "nearshard.client",
}


def __getattr__(name: str) -> object:
    """Imported when it is asked for (PEP 562): the command imports this package too, and needs little of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
