"""Settings: one frozen, typed object per service, read once.

Each later source wins over the one before: the service's table of a TOML file (``--config``), environment
variables ``NEARSHARD_<SERVICE>_<NAME>``, flags ``--<name>``. An unknown key is an error that names file and key.
Fields describe themselves; ``--help`` and ``docs/settings.md`` are made from them.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, ByteSize, Field, TypeAdapter, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from shared.enrolment import is_loopback_address
from shared.errors import BadId, ConfigError
from shared.ids import parse_name

S = TypeVar("S", bound="ServiceSettings")


def size(text: str) -> ByteSize:
    """A default in bytes, as people write it: ``512MiB``."""
    return TypeAdapter(ByteSize).validate_python(text)


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("not an http:// or https:// URL")
    return url.rstrip("/")


def _name(name: str) -> str:
    try:
        return parse_name(name)
    except BadId as error:
        raise ValueError(str(error)) from error


def _given(path: Path) -> Path:
    if path == Path():
        raise ValueError(
            "needed: the file of a trusted root.json, from who runs the origin (`nearshard trust init` makes it);"
            " `nearshard trust accept URL` fetches it, for you to compare its fingerprint"
        )
    return path


HttpUrl = Annotated[str, AfterValidator(_http_url)]
"""A base URL without a slash at its end."""
Name = Annotated[str, AfterValidator(_name)]
"""A node or region name."""

TrustRoot = Annotated[Path, AfterValidator(_given)]
"""The file of a trusted root.json. There is no check without it, and no service without the check."""


class ServiceSettings(BaseSettings):
    """What every service has. ``service`` names its TOML table and its environment prefix."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", cli_kebab_case=True, cli_implicit_flags=True)
    service: ClassVar[str] = ""
    example: ClassVar[str] = ""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(0, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")
    ready_file: Path | None = Field(None, description="Written with the service's URL once it listens.")
    tls_cert: Path | None = Field(None, description="Certificate to serve HTTPS with, and the chain to its CA: PEM.")
    tls_key: Path | None = Field(None, description="Its private key, for the service's user alone (mode 0600): PEM.")
    tls_ca: Path | None = Field(
        None, description="CAs of the deployment, beside the system's: nodes must show certificates of theirs. PEM."
    )
    node_certificates: Literal["optional", "required"] = Field(
        "optional", description="required: reading is for whoever shows a node's certificate of tls_ca, nobody else."
    )
    insecure: bool = Field(
        False, description="Listen beyond loopback also without TLS, or where anybody may take part."
    )
    log_format: Literal["console", "json"] = Field("console", description="How log lines look.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")
    otlp: HttpUrl | None = Field(
        None,
        description="Collector that traces go to, by OTLP over HTTP: a base URL, to which /v1/traces is added. Needs"
        " the extra `otel`.",
    )
    connections: int = Field(4096, ge=1, description="Client connections at a time; more are told to come back.")
    connections_per_address: int = Field(
        256, ge=1, description="The same from one address; loopback has no such limit."
    )
    congestion: str = Field("bbr", description="TCP congestion control for sending, where the kernel has it.")
    keepalive: float = Field(15.0, gt=0, le=3600, description="Seconds an idle connection or a slow header may take.")

    def lacks(self) -> list[str]:
        """What this service must have, beside TLS, to listen beyond loopback; as advice, one line each."""
        return []

    def check(self) -> None:
        """Refuse settings that contradict each other, and those that are dangerous. Raises ConfigError."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(f"{self.service}.tls_cert: needs tls_key, and the other way round")
        if self.node_certificates == "required" and not (self.tls_cert and self.tls_ca):
            raise ConfigError(f"{self.service}.node_certificates: required needs tls_cert, tls_key and tls_ca")
        missing = [] if self.tls_cert else ["set tls_cert and tls_key (`nearshard trust cert` makes them)"]
        missing += self.lacks()
        if missing and not self.insecure and not (self.host == "localhost" or is_loopback_address(self.host)):
            raise ConfigError(
                f"{self.service}.host: {self.host} is not loopback, so others can reach this service: "
                f"{'; '.join(missing)}; or say --insecure"
            )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Init arguments stand in for the file here: the lowest source, so they come last."""
        return env_settings, init_settings


def load(settings: type[S], argv: list[str]) -> S:
    """The settings of a service from ``--config``, environment and flags. Raises ConfigError.

    ``--help`` and a malformed command line end the process, as commands do (0 and 2).
    """
    argv, file = _take_config(argv)
    table = _read_table(file, settings) if file else {}
    prefix = f"NEARSHARD_{settings.service.upper()}_"
    source: Any = CliSettingsSource(
        settings,
        cli_prog_name=f"nearshard {settings.service}",
        cli_parse_args=argv,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )
    try:
        make: Any = settings  # the two arguments that pydantic-settings keeps out of the signature
        made: S = make(_env_prefix=prefix, _cli_settings_source=source, **table)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        where = f"{file}:{settings.service}.{name}" if file and name in table else f"{settings.service}.{name}"
        raise ConfigError(f"{where}: {first['msg']}") from error
    made.check()
    return made


def _take_config(argv: list[str]) -> tuple[list[str], Path | None]:
    rest, file = [], None
    words = iter(argv)
    for word in words:
        if word == "--config":
            file = Path(next(words, ""))
        elif word.startswith("--config="):
            file = Path(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, file


def _read_table(file: Path, settings: type[ServiceSettings]) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # also an integer of 5,000 digits
        raise ConfigError(f"{file}: {error}") from error
    table = document.get(settings.service, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{file}:{settings.service}: not a table")
    for key in table:
        if key not in settings.model_fields:
            known = ", ".join(sorted(settings.model_fields))
            raise ConfigError(f"{file}:{settings.service}.{key}: unknown setting; known are {known}")
    return table


def fail(error: ConfigError) -> None:
    """Say what is wrong with the settings, and end the process as commands do."""
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(error.exit_code)
