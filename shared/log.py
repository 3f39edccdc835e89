"""Logging: structlog, one line an event, for people or as JSON."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog
from structlog.typing import EventDict, FilteringBoundLogger

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


def get(service: str) -> FilteringBoundLogger:
    """A logger bound to a service's name."""
    logger: FilteringBoundLogger = structlog.get_logger(service=service)
    return logger
