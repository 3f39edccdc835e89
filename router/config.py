"""The router's settings."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field, TypeAdapter

from shared.config import HttpUrl, Name, ServiceSettings, TrustRoot
from shared.pins import check_pin


def _cidr(text: str) -> str:
    return str(ip_network(text))


def _link(text: str) -> str:
    here, arrow, there = text.partition(">")
    if not arrow or TypeAdapter(Name).validate_python(here) == TypeAdapter(Name).validate_python(there):
        raise ValueError("a link is 'region>region'")
    return text


def _country(text: str) -> str:
    if len(text) != 2 or not text.isascii() or not text.isupper():
        raise ValueError("a country is two capital letters, as in ISO 3166")
    return text


Cidr = Annotated[str, AfterValidator(_cidr)]
Link = Annotated[str, AfterValidator(_link)]
Country = Annotated[str, AfterValidator(_country)]
Latitude = Annotated[float, Field(ge=-90, le=90)]
Longitude = Annotated[float, Field(ge=-180, le=180)]
Milliseconds = Annotated[float, Field(ge=0, le=60_000)]


class RouterSettings(ServiceSettings):
    """The router: sends each client to the nearest node that has what it wants.

    Example: nearshard router --trust-root root.json --origin http://origin:8710 --redis redis://redis:6379/0
    """

    service: ClassVar[str] = "router"

    port: int = Field(8700, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")
    origin: list[HttpUrl] = Field(
        default_factory=lambda: ["http://127.0.0.1:8710"],
        description="Origins: for manifests, and where no node is left.",
    )
    trust_root: TrustRoot = Field(
        Path(), validate_default=True, description="A trusted root.json: what refs mean is checked against it."
    )
    redis: str = Field(
        "",
        description="The Redis or Valkey that routers share, as redis://, rediss://, redis+sentinel://h1,h2/master/db"
        " or redis+cluster://h1,h2; without it membership is in memory.",
    )
    redis_prefix: str = Field(
        "nearshard:", pattern=r"^[A-Za-z0-9:._-]+$", description="What every key in Redis begins with, in braces."
    )
    enrolled: Path | None = Field(
        None, description="File of the nodes that may join; without it, any on loopback may (for development)."
    )
    token: Path | None = Field(
        None, description="File (mode 0600) of this router's token, '*/*:read': for what private models' refs mean."
    )
    data: Path | None = Field(None, description="Directory where members and metadata are kept for a restart.")
    ttl: float = Field(6.0, gt=0, le=300, description="Seconds without a heartbeat after which a node is out.")
    default_region: Name = Field("default", description="Region of a client that nothing else tells of.")
    networks: dict[Cidr, Name] = Field(
        default_factory=dict,
        description='Region by client network, as {"10.1.0.0/16": "north"}; the longest wins.',
    )
    trusted_proxies: list[Cidr] = Field(
        default_factory=list, description="Networks of proxies whose X-Forwarded-For tells where a client is."
    )
    geoip: Path | None = Field(None, description="GeoIP database (MaxMind's form): for clients of no network above.")
    countries: dict[Country, Name] = Field(
        default_factory=dict, description='Region by country in the GeoIP database, as {"DE": "europe"}.'
    )
    coordinates: dict[Name, tuple[Latitude, Longitude]] = Field(
        default_factory=dict, description='Where regions are, as {"north": [59.3, 18.1]}: used where none is measured.'
    )
    links: dict[Link, Milliseconds] = Field(
        default_factory=dict,
        description='Milliseconds that a link between regions counts as more, as {"north>south": 50}; both ways.',
    )
    probe: float = Field(5.0, ge=0, le=300, description="Seconds between two probes of each node; 0: none.")
    pins: list[Annotated[str, AfterValidator(check_pin)]] = Field(
        default_factory=list, description="Refs that mean one revision: MODEL@REF=sha256:…, then @SITE for one region."
    )
    ref_lifetime: float = Field(2.0, ge=0, description="Seconds a ref is used before it is revalidated.")
    candidates: int = Field(3, ge=1, le=16, description="Nodes named in an answer, best first, before the origin.")

    def lacks(self) -> list[str]:
        """Without an enrolment, anybody on its machine joins."""
        return [] if self.enrolled else ["set enrolled (`nearshard enroll` writes the file), so that not all may join"]
