"""The origin's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from shared.config import HttpUrl, ServiceSettings


def default_data() -> Path:
    """Where nearshard keeps its data unless told otherwise."""
    return Path("~/.local/share/nearshard").expanduser()


KEYS = "keys"
ONLINE_FILE = "online.pem"
AUDIT_FILE = "audit.jsonl"


def beside(store: str) -> Path:
    """Where what belongs to a store is, unless told otherwise: next to a directory, else in nearshard's own data."""
    return default_data() if "://" in store else Path(store).expanduser().resolve().parent


class OriginSettings(ServiceSettings):
    """The origin: keeps published models and answers from them.

    Example: nearshard origin --store /srv/models --port 8710
    """

    service: ClassVar[str] = "origin"

    port: int = Field(8710, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")
    store: str = Field(
        default_factory=lambda: str(default_data() / "origin"),
        description="Where models are kept: a directory, or a URL of an object store.",
    )
    online_key: Path | None = Field(
        None, description="File of the online key; keys/online.pem beside the store by default."
    )
    audit: Path | None = Field(None, description="File of the audit log; audit.jsonl beside the store by default.")
    router: list[HttpUrl] = Field(
        default_factory=list, description="Routers to tell what is published here from afar; they tell the edges."
    )
    publish_tokens: bool = Field(
        False, description="Publishing from afar also takes a token with 'publish' for the model."
    )
    revisions: int = Field(8, ge=0, description="Revisions of a model that gc keeps besides those of refs, last first.")
    grace: float = Field(86400.0, ge=0, description="Seconds for which gc spares what nothing refers to yet.")

    @property
    def online_file(self) -> Path:
        """The online key's file."""
        return self.online_key or beside(self.store) / KEYS / ONLINE_FILE

    @property
    def audit_file(self) -> Path:
        """The audit log's file."""
        return self.audit or beside(self.store) / AUDIT_FILE
