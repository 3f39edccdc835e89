"""The client of nearshard: ``Client`` (async), ``SyncClient``, and the ``nearshard`` command.

>>> from nearshard import SyncClient
>>> got = SyncClient("http://127.0.0.1:8700").get("demo/minilm:embed-3l", "embed-3l/")
"""

from nearshard.client import Client, Got, SyncClient
from shared.errors import NearshardError

__all__ = ["Client", "Got", "NearshardError", "SyncClient"]
