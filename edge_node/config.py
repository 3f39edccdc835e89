"""The edge node's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ByteSize, Field, model_validator

from shared.acceptance import parse_acceptance
from shared.config import HttpUrl, Name, ServiceSettings, TrustRoot, size
from shared.errors import BadId
from shared.ids import parse_task_id
from shared.link import parse_window
from shared.pins import check_pin
from shared.proxy import parse_proxy

PROFILES: dict[str, dict[str, Any]] = {"gateway": {"memory": "64MiB", "disk": "2GiB", "small_model": "500MB"}}


def _accepted(text: str) -> str:
    return parse_acceptance(text).text


def _task_id(text: str) -> str:
    try:
        parse_task_id(text)
    except BadId as error:
        raise ValueError(str(error)) from error
    return text


Subscribed = Annotated[str, AfterValidator(_task_id)]
Accepted = Annotated[str, AfterValidator(_accepted)]
Window = Annotated[str, AfterValidator(parse_window)]
Proxy = Annotated[str, AfterValidator(parse_proxy)]


class EdgeSettings(ServiceSettings):
    """An edge node: caches shards in memory and on disk, and serves them.

    Example: nearshard edge --trust-root root.json --origin http://origin:8710 --router http://router:8700
    """

    service: ClassVar[str] = "edge"

    port: int = Field(8720, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")
    origin: list[HttpUrl] = Field(
        default_factory=lambda: ["http://127.0.0.1:8710"], description="Origins to fill from, best first."
    )
    trust_root: TrustRoot = Field(
        Path(), validate_default=True, description="A trusted root.json: what refs mean is checked against it."
    )
    parent: list[HttpUrl] = Field(default_factory=list, description="Edges of a parent region, asked before origins.")
    replicas: int = Field(1, ge=1, le=8, description="Nodes of the region that keep each shard on disk.")
    router: list[HttpUrl] = Field(default_factory=list, description="Routers to send heartbeats to.")
    node: Name = Field("edge", description="This node's name; unique among the nodes of a router.")
    region: Name = Field("default", description="The region this node is in.")
    advertise: HttpUrl | None = Field(None, description="URL that clients reach this node at; its own by default.")
    weight: int = Field(1, ge=1, le=10, description="Share of the region's shards, beside the other nodes' weights.")
    data: Path = Field(
        default_factory=lambda: Path("~/.cache/nearshard/edge").expanduser(),
        description="Directory of the disk cache.",
    )
    token: Path | None = Field(
        None, description="File (mode 0600) of this node's token, '*/*:read': for private models upstream."
    )
    profile: Literal["office", "gateway"] = Field(
        "office", description="gateway: 64 MiB of memory, 2 GiB of disk, models under 500 MB kept first."
    )
    memory: ByteSize = Field(size("512MiB"), ge=0, description="Bytes of shards kept in memory.")
    disk: ByteSize = Field(size("20GiB"), ge=0, description="Bytes of shards kept on disk.")
    small_model: ByteSize = Field(
        size("0"), ge=0, description="Shards of models up to this size are evicted after all others; 0: no difference."
    )
    link_rate: ByteSize = Field(size("0"), ge=0, description="Bytes a second over the link upstream; 0 is no cap.")
    link_windows: dict[Window, ByteSize] = Field(
        default_factory=dict, description='Other caps by local time of day, as {"08:00-18:00": "2MB"}.'
    )
    upstream_rates: dict[HttpUrl, ByteSize] = Field(
        default_factory=dict, description="Caps by upstream URL, on top of the node's."
    )
    upstream_proxies: dict[HttpUrl, Proxy] = Field(
        default_factory=dict, description="Proxy by upstream URL: http://, socks5:// or socks5h://host:port."
    )
    subscriptions: list[Subscribed] = Field(
        default_factory=list,
        description="Models or tasks, org/name[:task][@ref], of which this node keeps the shards that it owns, in the"
        " revision that the ref means.",
    )
    subscription_interval: float = Field(
        3600.0, ge=1, description="Seconds between two looks at a subscription; an announcement comes first."
    )
    subscription_windows: list[Window] = Field(
        default_factory=list,
        description='Local times of day, like "22:00-06:00", in which subscriptions fetch at all; none: always.',
    )
    subscription_pin: bool = Field(False, description="Never evict what is subscribed to.")
    accept_expired: list[Accepted] = Field(
        default_factory=list,
        description="Models served by metadata that has expired, each like 'org/name@ref until 2027-01-31':"
        " at most 90 days ahead.",
    )
    metered: bool = Field(False, description="Fetch only what clients ask for; preheating waits.")
    deltas: bool = Field(
        True, description="Make shards from deltas and compressed parcels where that moves fewer bytes."
    )
    scrub: float = Field(86_400.0, ge=0, description="Seconds in which the disk cache is read through once; 0: never.")
    admin_port: int = Field(0, ge=0, le=65535, description="Loopback port for operators; 0 picks a free one.")
    ref_lifetime: float = Field(5.0, ge=0, description="Seconds a ref is used before it is revalidated.")
    pins: list[Annotated[str, AfterValidator(check_pin)]] = Field(
        default_factory=list, description="Refs that mean one revision at this node: MODEL@REF=sha256:…"
    )
    heartbeat: float = Field(2.0, gt=0, le=60, description="Seconds between heartbeats.")
    measure: float = Field(
        30.0, ge=0, le=3600, description="Seconds between two measurements of round trips to other regions; 0: none."
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_profile(cls, values: dict[str, Any]) -> dict[str, Any]:
        """A profile changes defaults; what is set by hand stays."""
        return {**PROFILES.get(str(values.get("profile")), {}), **values}
