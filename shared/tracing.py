"""What goes along with a request from tier to tier: an id for the logs, and the trace that it is part of.

Both are taken from a request's fields and sent on with every question that is asked for it (``shared.web.session``).
The trace is W3C's (https://www.w3.org/TR/trace-context/): who calls begins it, and without a ``Tracer`` it is passed on
as it came. With one (``shared.otel``), what is done for the request is recorded as spans.

The context is a context variable, since that is what tasks inherit: a fill, or a question that several wait for, goes
by the request that began it, and nothing in between has to know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from secrets import token_hex
from typing import Protocol

from shared.errors import ConfigError

REQUEST_ID, TRACEPARENT, TRACESTATE = "X-Request-Id", "traceparent", "tracestate"
MAX_STATE = 512
"""Characters of ``tracestate`` that are passed on (§3.3.1.5)."""
_ID = re.compile(r"[A-Za-z0-9-]{8,64}")
"""Ids that are taken over. Without dots, so that no access token is one."""
_PARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,200})?")
_STATE = re.compile(r"[ -~]+")

Attributes = Mapping[str, str | int | bool | tuple[str, ...]]


class Kind(Enum):
    """The side of a request that a span is."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What is known of a request wherever something is done for it."""

    id: str
    parent: str = ""
    """``traceparent``: the trace and the span that it is done within; empty where nobody traces it."""
    state: str = ""
    """``tracestate``, as it came."""
    tracer: Tracer | None = None

    @property
    def trace_id(self) -> str:
        """32 hex digits; empty where nobody traces it."""
        return self.parent[3:35]

    def fields(self) -> dict[str, str]:
        """What is sent along with a question to another service."""
        fields = {REQUEST_ID: self.id}
        if self.parent:
            fields[TRACEPARENT] = self.parent
            if self.state:
                fields[TRACESTATE] = self.state
        return fields


CURRENT: ContextVar[RequestContext | None] = ContextVar("request", default=None)
"""Of the request that this task works for; None for what a service does by itself."""


class Span(Protocol):
    """One thing that is done for a request, from its beginning to its end."""

    context: RequestContext
    """What is asked within it goes by this."""

    def name(self, name: str) -> None:
        """Call it otherwise: what it is may be known later than its beginning."""
        ...

    def set(self, attributes: Attributes) -> None:
        """Say more of it."""
        ...

    def fail(self, kind: str) -> None:
        """It came to nothing: ``kind`` is an error's code, or an HTTP status."""
        ...

    def end(self) -> None:
        """It is over."""
        ...


class Tracer(Protocol):
    """Where spans go."""

    def begin(self, name: str, kind: Kind, within: RequestContext, attributes: Attributes) -> Span:
        """A span begins now."""
        ...

    def close(self) -> None:
        """Send what is left (blocking: for a thread)."""
        ...


def open_tracer(endpoint: str | None, service: str, instance: str = "") -> Tracer | None:
    """Where spans go: to the collector at ``endpoint``, None: nowhere. Raises ConfigError where the extra that it needs
    is not installed."""
    if not endpoint:
        return None
    try:  # an optional extra, that takes a quarter of a second to import
        from shared.otel import OtelTracer
    except ImportError as error:
        raise ConfigError(f"otlp: needs the extra 'otel' (pip install 'nearshard[otel]'): {error}") from error
    return OtelTracer(endpoint.rstrip("/"), service, instance)


def new_id() -> str:
    """An id for a request that came without one."""
    return token_hex(8)


def context_of(
    fields: Mapping[str, str], make_id: Callable[[], str] = new_id, tracer: Tracer | None = None
) -> RequestContext:
    """The context of a request that came with these fields. What is not as it should be is as if it were not there:
    a request is served whatever its caller says about traces (§3.2.4)."""
    given = fields.get(REQUEST_ID, "")
    parent = fields.get(TRACEPARENT, "")
    if parent:
        match = _PARENT.fullmatch(parent)
        if match is None or (match[1] == "00" and match[2]):
            parent = ""
    state = fields.get(TRACESTATE, "") if parent else ""
    if state and (len(state) > MAX_STATE or not _STATE.fullmatch(state)):
        state = ""
    return RequestContext(given if _ID.fullmatch(given) else make_id(), parent, state, tracer)


@contextmanager
def span(name: str, kind: Kind, attributes: Callable[[], Attributes]) -> Iterator[Span | None]:
    """A span around what is done within; None where nobody records it, and then ``attributes`` is not called."""
    context = CURRENT.get()
    if context is None or context.tracer is None:
        yield None
        return
    made = context.tracer.begin(name, kind, context, attributes())
    token = CURRENT.set(made.context)
    try:
        yield made
    except SystemExit as ended:
        if ended.code:
            made.fail(f"exit {ended.code}")
        raise
    except BaseException as error:
        made.fail(str(getattr(error, "error_code", type(error).__name__)))
        raise
    finally:
        CURRENT.reset(token)
        made.end()


@contextmanager
def commanding(word: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Around a command: whatever it asks goes by one id, and is part of the trace in ``TRACEPARENT`` where its caller
    has one. ``NEARSHARD_OTLP`` is the collector that its own spans go to. Raises ConfigError."""
    tracer = open_tracer(environment.get("NEARSHARD_OTLP"), "nearshard")
    given = {name: environment.get(name.upper(), "") for name in (TRACEPARENT, TRACESTATE)}
    token = CURRENT.set(context_of(given, tracer=tracer))
    try:
        with span(f"nearshard {word}", Kind.INTERNAL, dict):
            yield
    finally:
        CURRENT.reset(token)
        if tracer:
            tracer.close()
