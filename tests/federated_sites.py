"""Sites of federated rounds for tests: what they state and send, right by default and wrong on order; and an origin to
send it to."""

from __future__ import annotations

import asyncio
import io
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from origin.config import OriginSettings
from origin.federated.closing import Closing
from origin.federated.documents import Round
from origin.federated.records import Records, Seal
from origin.federated.rounds import Opening, open_round
from origin.keyring import load_ring
from origin.storage import Storage
from origin.trust_store import TrustStore
from shared import log
from shared.clock import SystemClock
from shared.config import load
from shared.digest import Digest, digest_of
from shared.enrolment import SIGNATURE_FIELD
from shared.federated import (
    OFFSET_FIELD,
    PART_TYPE,
    STATEMENT_TYPE,
    Statement,
    authorization,
    rounds_path,
    sign_statement,
    updates_path,
)
from shared.keys import NodeKey
from shared.updates.codec import Codec
from shared.updates.codecs import codec
from shared.updates.document import write_update
from tests.harness import Lab, Service

T = TypeVar("T")
Arrays = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


@dataclass
class Answer:
    """What came back."""

    status: int
    fields: Mapping[str, str]
    document: dict[str, Any]

    @property
    def code(self) -> str:
        """Of an error."""
        return str(self.document.get("code", ""))


def ask(url: str, method: str, body: bytes | None = None, **fields: str) -> Answer:
    """One request."""
    request = urllib.request.Request(url, body, fields)
    request.method = method
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            data = answer.read()
            return Answer(answer.status, dict(answer.headers), json.loads(data) if data else {})
    except urllib.error.HTTPError as error:
        data = error.read()
        return Answer(error.code, dict(error.headers), json.loads(data) if data else {})


def document(arrays: Arrays, way: str | Codec = "fp32") -> bytes:
    """An update of these tensors."""
    file = io.BytesIO()
    shapes = {tensor: array.shape for tensor, array in arrays.items()}
    write_update(
        file,
        shapes,
        lambda tensor, part: arrays[tensor].reshape(-1)[part.first : part.first + part.count],
        codec(way) if isinstance(way, str) else way,
    )
    return file.getvalue()


@dataclass
class Site:
    """One participant."""

    name: str
    key: NodeKey = field(default_factory=NodeKey.generate)

    def statement(self, opened: Round, body: bytes, **changes: Any) -> Statement:
        """What it says of a body for a round."""
        right = Statement(
            self.name,
            opened.model,
            opened.number,
            opened.base_revision,
            secrets.token_bytes(16),
            datetime.now(UTC),
            100,
            digest_of(body),
            len(body),
            ("fp32",),
        )
        return replace(right, **changes)

    def state(self, origin: Service, statement: Statement, key: NodeKey | None = None) -> Answer:
        """Send a statement."""
        body, signature = sign_statement(statement, key or self.key)
        url = origin.url + updates_path(statement.model)
        return ask(url, "POST", body, **{SIGNATURE_FIELD: signature, "Content-Type": STATEMENT_TYPE})

    def send(self, origin: Service, opened: Round, body: bytes, **changes: Any) -> Answer:
        """State a body and send it whole; the last answer."""
        offered = self.state(origin, self.statement(opened, body, **changes))
        return append(origin, offered, body) if offered.status == 201 else offered


def append(origin: Service, offered: Answer, body: bytes, start: int | None = None, end: int | None = None) -> Answer:
    """Send a part of a body."""
    offset = offered.document["offset"] if start is None else start
    fields = {
        "Authorization": authorization(offered.document["token"]),
        "Content-Type": PART_TYPE,
        OFFSET_FIELD: str(offset),
    }
    return ask(origin.url + offered.document["upload"], "PATCH", body[offset:end], **fields)


def sites(count: int, prefix: str = "s") -> list[Site]:
    """So many, by their names."""
    return [Site(f"{prefix}{number}") for number in range(count)]


def sites_file(file: Path, named: list[Site]) -> Path:
    """The operator's file of them."""
    file.write_text("".join(f'[sites.{site.name}]\nkey = "{site.key.public.hex()}"\n' for site in named))
    return file


class Operator:
    """Who runs the origin of a lab, in this process: a command each would take a minute of the suite."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.told = lab, list[str]()

    def do(self, work: Callable[[Records, TrustStore, Closing], Coroutine[Any, Any, T]]) -> T:
        """Something with the store at hand."""

        async def run() -> T:
            settings = load(OriginSettings, ["--store", str(self.lab.store)])
            trust, ring = TrustStore(Storage(str(self.lab.store))), load_ring([self.lab.keys])
            records = Records(trust.storage, Seal(trust, lambda: list(ring.values())))
            closing = Closing(
                records,
                trust,
                lambda: ring,
                settings.federated,
                self.lab.folder / "operator",
                _Silent(),  # type: ignore[arg-type]
                self.told.append,
                SystemClock(),
                log.configure("error", "console", "operator"),
            )
            return await work(records, trust, closing)

        return asyncio.run(run())

    def open(self, model: str, named: list[Site], **options: Any) -> Round:
        """Open a round."""
        asked = Opening(
            **{
                "model": model,
                "sites": {site.name: site.key.public.hex() for site in named},
                "base": "main",
                "to_ref": "canary",
                "deadline": timedelta(hours=1),
                "min_sites": 3,
                "max_bytes": 8 << 20,
                **options,
            }
        )
        return self.do(lambda records, trust, closing: open_round(records, trust, closing, asked, datetime.now(UTC)))

    def newest(self, model: str) -> Round:
        """A model's last round."""
        return self.do(lambda records, trust, closing: records.newest(model))

    def close(self, model: str) -> Round:
        """End it now, and lead it on."""

        async def close(records: Records, trust: TrustStore, closing: Closing) -> Round:
            return await closing.lead(await closing.end_if_over(await records.newest(model), now=True))

        return self.do(close)

    def accept(self, model: str) -> Round:
        """Publish what is held."""

        async def accept(records: Records, trust: TrustStore, closing: Closing) -> Round:
            return await closing.accept(await records.newest(model))

        return self.do(accept)

    def discard(self, model: str) -> Round:
        """Give it up."""

        async def discard(records: Records, trust: TrustStore, closing: Closing) -> Round:
            return await closing.discard(await records.newest(model))

        return self.do(discard)

    def meaning(self, model: str) -> dict[str, Digest]:
        """The refs of a model."""

        async def refs(records: Records, trust: TrustStore, closing: Closing) -> dict[str, Digest]:
            return {name: ref.revision for name, ref in (await trust.refs(model)).items()}

        return self.do(refs)


class _Silent:
    """Writes nothing down."""

    def add(self, event: str, who: str, **what: object) -> None:
        """As ``origin.audit.Audit``."""


def rounds_url(origin: Service, model: str) -> str:
    """Where a model's rounds are told."""
    return origin.url + rounds_path(model)
