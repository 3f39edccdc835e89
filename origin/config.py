"""The origin's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from shared.config import ServiceSettings


def default_data() -> Path:
    """Where nearshard keeps its data unless told otherwise."""
    return Path("~/.local/share/nearshard").expanduser()


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
    revisions: int = Field(8, ge=0, description="Revisions of a model that gc keeps besides those of refs, last first.")
    grace: float = Field(86400.0, ge=0, description="Seconds for which gc spares what nothing refers to yet.")
