"""The origin's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

from origin.hub_listing import EXCLUDED
from shared.config import HttpUrl, ServiceSettings, size
from shared.errors import ConfigError


def default_data() -> Path:
    """Where nearshard keeps its data unless told otherwise."""
    return Path("~/.local/share/nearshard").expanduser()


KEYS = "keys"
ONLINE_FILE = "online.pem"
AUDIT_FILE = "audit.jsonl"


def beside(store: str) -> Path:
    """Where what belongs to a store is, unless told otherwise: next to a directory, else in nearshard's own data."""
    return default_data() if "://" in store else Path(store).expanduser().resolve().parent


class MirrorSettings(BaseModel):
    """Another hub whose models an origin fetches when somebody asks for one that it has not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    upstream: HttpUrl | None = Field(
        default=None, description="Hub to fetch what is not here from on the first request: a URL as in HF_ENDPOINT."
    )
    allow: list[str] = Field(
        default_factory=list, description="Models that may be fetched: globs over org/name, in lower case."
    )
    key: Path | None = Field(
        default=None,
        description="File of the key that signs what was fetched (mode 0600), delegated for those organisations.",
    )
    token_file: Path | None = Field(default=None, description="File (mode 0600) with this origin's token at the hub.")
    proxy: str = Field(default="", description="Proxy towards the hub: http://, socks5:// or socks5h://.")
    lifetime: float = Field(
        default=3600.0, gt=0, description="Seconds after which the hub is asked whether a ref has moved."
    )
    private: Literal["upstream", "always", "never"] = Field(
        default="upstream",
        description="What is published for those with a token only: upstream means what the hub restricts.",
    )
    max_size: ByteSize = Field(
        default=size("200GiB"), description="Bytes of the largest model that is fetched on a request."
    )
    at_once: int = Field(default=2, ge=1, le=64, description="Models that are fetched at a time; others wait.")
    exclude: list[str] = Field(
        default=list(EXCLUDED), description="Files that are not fetched, as globs over paths: pickles, by default."
    )
    effort: Literal["none", "fast", "default", "most"] = Field(
        default="fast",
        description="How long it may take to make deltas and compressed shards of what was fetched; none: make none.",
    )
    data: Path | None = Field(
        default=None, description="Where files are until they are published; mirror beside the store by default."
    )


class FederatedSettings(BaseModel):
    """How this origin takes in what sites of federated rounds send, and ends the rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Path | None = Field(
        default=None,
        description="File of a publisher's key (mode 0600) to publish what rounds make with; without one, rounds end at"
        " their deadline and an operator's `nearshard federated close` publishes.",
    )
    data: Path | None = Field(
        default=None, description="Where what is on its way from sites is; federated beside the store by default."
    )
    max_update: ByteSize = Field(
        default=size("256MiB"), description="Bytes of a site's update, unless a round is opened with another limit."
    )
    uploads: int = Field(default=16, ge=1, le=1024, description="Updates that come in at a time.")
    interval: float = Field(
        default=2.0, ge=0, description="Seconds between a site's statements; eight may come at once."
    )
    strikes: int = Field(
        default=3, ge=1, description="Refusals for values, norm or size after which a site is in quarantine."
    )
    look: float = Field(
        default=5.0, gt=0, description="Seconds after which is looked whether a round was opened, or is over."
    )
    memory: ByteSize = Field(default=size("256MiB"), description="Bytes that aggregating may take, about.")
    gate_timeout: float = Field(default=3600.0, gt=0, description="Seconds that a round's gate may take.")


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
    mirror: MirrorSettings = Field(default_factory=MirrorSettings, description="Another hub to mirror.")
    federated: FederatedSettings = Field(default_factory=FederatedSettings, description="Federated rounds.")
    publish_tokens: bool = Field(
        False, description="Publishing from afar also takes a token with 'publish' for the model."
    )
    revisions: int = Field(8, ge=0, description="Revisions of a model that gc keeps besides those of refs, last first.")
    grace: float = Field(86400.0, ge=0, description="Seconds for which gc spares what nothing refers to yet.")

    def check(self) -> None:
        """As of any service; and a mirror has a key to sign with and says what it mirrors. Raises ConfigError."""
        super().check()
        if self.mirror.upstream and not (self.mirror.key and self.mirror.allow):
            raise ConfigError(
                "origin.mirror: upstream needs key (nearshard trust add-publisher ORG makes one) and allow, which names"
                ' what may be fetched, like ["acme/*"]'
            )

    @property
    def mirror_folder(self) -> Path:
        """Where what is being fetched from another hub is."""
        return self.mirror.data or beside(self.store) / "mirror"

    @property
    def federated_folder(self) -> Path:
        """Where what is on its way from sites is, and candidates are made."""
        return self.federated.data or beside(self.store) / "federated"

    @property
    def online_file(self) -> Path:
        """The online key's file."""
        return self.online_key or beside(self.store) / KEYS / ONLINE_FILE

    @property
    def audit_file(self) -> Path:
        """The audit log's file."""
        return self.audit or beside(self.store) / AUDIT_FILE
