"""The client of nearshard: ``Client`` (async), ``SyncClient``, and the ``nearshard`` command.

>>> from nearshard import SyncClient
>>> got = SyncClient("http://127.0.0.1:8700").get("demo/minilm:embed-3l", "embed-3l/")
>>> tensors = SyncClient("http://127.0.0.1:8700").load_task("demo/minilm:embed-3l")
"""

from nearshard.client import Client, Got, SyncClient
from nearshard.opened import BlockingFile, OpenFile
from nearshard.repository import Repository
from shared.errors import NearshardError

__all__ = ["BlockingFile", "Client", "Got", "NearshardError", "OpenFile", "Repository", "SyncClient"]
