"""Starting services and other programs from the command line: the same few steps for each of them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

from aiohttp import web
from structlog.typing import FilteringBoundLogger
from uvloop import new_event_loop

from shared import log
from shared.clock import Clock, SystemClock
from shared.config import S, fail, load
from shared.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_USAGE, ConfigError, NearshardError
from shared.tracing import commanding
from shared.web.server import run
from shared.web.tls import Certificates

Build = Callable[[S, str, Certificates, Clock, FilteringBoundLogger], web.Application]
"""A composition root: settings, own base URL, certificates, clock, logger."""


def serve(settings_type: type[S], build: Build[S], argv: list[str] | None = None) -> None:
    """Read the settings, run the service until it is told to stop, and end the process."""
    try:
        settings = load(settings_type, sys.argv[1:] if argv is None else argv)
        logger = log.configure(settings.log_level, settings.log_format, settings_type.service)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(run(lambda url, tls: build(settings, url, tls, SystemClock(), logger), settings, logger))
    except ConfigError as error:
        fail(error)


def run_program(app: Callable[..., object], name: str) -> None:
    """Run a command of a typer app; an error is one line, and its exit code."""
    try:
        with commanding(name.removeprefix("nearshard "), os.environ):
            app(prog_name=name)
    except NearshardError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(EXIT_CONFIG if isinstance(error, ConfigError) else error.exit_code or EXIT_USAGE) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
