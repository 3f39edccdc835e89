"""Which node this is: its key, and a file for whoever enrols it.

<data>/node.key     the private key, PEM, mode 0600; made at the first start
<data>/node.json    name, URL, region, weight and public key: what `nearshard enroll --data` reads
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from shared.codec import encode_json
from shared.enrolment import IDENTITY, KEY
from shared.errors import DiskError
from shared.files import replace_file
from shared.keys import NodeKey, load_or_make_key


def own_key(data: Path, log: FilteringBoundLogger) -> NodeKey:
    """This node's key. Raises ConfigError for a file that is no key, or that everybody may read."""
    try:
        return load_or_make_key(data / KEY)
    except DiskError as error:
        # A disk that takes no file is no reason not to serve; only, no router will know this node.
        log.warning("this node's key cannot be kept; it has another one after a restart", reason=str(error))
        return NodeKey.generate()


def write_identity(data: Path, node: str, key: NodeKey, record: Mapping[str, Any]) -> None:
    """Say who this is. A disk that takes no file is left alone: it can still be said by hand."""
    document = {"id": node, "key": key.public.hex(), **{name: record[name] for name in ("url", "region", "weight")}}
    with suppress(OSError):
        replace_file(data / IDENTITY, encode_json(document) + b"\n")
