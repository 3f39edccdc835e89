"""The edge node's settings."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import ByteSize, Field

from shared.config import HttpUrl, Name, ServiceSettings, size


class EdgeSettings(ServiceSettings):
    """An edge node: caches shards in memory and on disk, and serves them.

    Example: nearshard edge --origin http://origin:8710 --router http://router:8700 --region north
    """

    service: ClassVar[str] = "edge"

    port: int = Field(8720, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")
    origin: list[HttpUrl] = Field(
        default_factory=lambda: ["http://127.0.0.1:8710"], description="Origins to fill from, best first."
    )
    parent: list[HttpUrl] = Field(default_factory=list, description="Edges of a parent region, asked before origins.")
    replicas: int = Field(1, ge=1, le=8, description="Nodes of the region that keep each shard on disk.")
    router: list[HttpUrl] = Field(default_factory=list, description="Routers to send heartbeats to.")
    node: Name = Field("edge", description="This node's name; unique among the nodes of a router.")
    region: Name = Field("default", description="The region this node is in.")
    advertise: HttpUrl | None = Field(None, description="URL that clients reach this node at; its own by default.")
    weight: int = Field(1, ge=1, le=100, description="Share of the region's shards, beside the other nodes' weights.")
    data: Path = Field(
        default_factory=lambda: Path("~/.cache/nearshard/edge").expanduser(),
        description="Directory of the disk cache.",
    )
    memory: ByteSize = Field(size("512MiB"), ge=0, description="Bytes of shards kept in memory.")
    disk: ByteSize = Field(size("20GiB"), ge=0, description="Bytes of shards kept on disk.")
    ref_lifetime: float = Field(5.0, ge=0, description="Seconds a ref is used before it is revalidated.")
    heartbeat: float = Field(2.0, gt=0, le=60, description="Seconds between heartbeats.")
