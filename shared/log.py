"""Logging: structlog, one line an event, for people or as JSON."""

from __future__ import annotations

import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

from shared.clock import SystemClock
from shared.tracing import CURRENT

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(level: str, form: str, service: str) -> FilteringBoundLogger:
    """Set logging up for this process (once, at its composition root) and give its logger."""
    renderer: structlog.typing.Processor
    if form == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0, pad_level=False)
    structlog.configure(
        processors=[
            name_request,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if form == "console" else "iso", utc=form == "json"),
            structlog.processors.format_exc_info,
            redact,
            Recent(SystemClock().time),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    # aiohttp and asyncio speak through the standard library: only what should wake someone is let through.
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    return get(service)


def name_request(_: Any, __: str, event: EventDict) -> EventDict:
    """What is logged for a request has its id, and its trace where it is part of one."""
    if context := CURRENT.get():
        event.setdefault("request_id", context.id)
        if context.parent:
            event.setdefault("trace_id", context.trace_id)
    return event


_SECRET = re.compile(r"eyJ[A-Za-z0-9_-]*\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*|(?<=[?&]token=)[^&\s\"'>]+")
"""A token, or what stands for one in a URL."""


def redact(_: Any, __: str, event: EventDict) -> EventDict:
    """The last look at a line: no token is ever in it, whoever put it there."""
    return {name: _SECRET.sub("[token]", value) if isinstance(value, str) else value for name, value in event.items()}


MAX_RECENT = 32
"""Kinds of warnings and errors of which the last is kept."""
_SHOWN = ("event", "code", "node", "region")


class Recent:
    """A processor of the log that keeps the last warnings and errors, for ``/status``: what is said again counts up.

    Anybody may read a status, so of a line there is only what never names a model, a path or a client.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        """``now``: seconds since 1970."""
        self._now = now
        self._kept: OrderedDict[tuple[str, ...], dict[str, Any]] = OrderedDict()

    def __call__(self, _: Any, __: str, event: EventDict) -> EventDict:
        """Note the line where it is one, and pass it on."""
        if event.get("level") in ("warning", "error"):
            said = {name: str(event[name])[:200] for name in _SHOWN if name in event}
            key = tuple(said.get(name, "") for name in _SHOWN)
            count = self._kept.pop(key, {}).get("count", 0) + 1
            self._kept[key] = {"time": round(self._now()), "level": event["level"], "count": count, **said}
            while len(self._kept) > MAX_RECENT:
                self._kept.popitem(last=False)
        return event

    def kept(self) -> list[dict[str, Any]]:
        """Them, the latest first: ``time`` in seconds since 1970, ``level``, ``count``, ``event``; ``code``, ``node``
        and ``region`` where there are any."""
        return list(reversed(self._kept.values()))


def recent() -> list[dict[str, Any]]:
    """The last warnings and errors of this process (``Recent.kept``); none before ``configure``."""
    kept = next((known for known in structlog.get_config()["processors"] if isinstance(known, Recent)), None)
    return kept.kept() if kept else []


def get(service: str) -> FilteringBoundLogger:
    """A logger bound to a service's name."""
    logger: FilteringBoundLogger = structlog.get_logger(service=service)
    return logger
