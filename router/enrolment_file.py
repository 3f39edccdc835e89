"""The enrolment file of a router: read at start, and again whenever it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from shared.enrolment import Enrolled, parse_enrolment
from shared.errors import ConfigError, DecodeError
from shared.files import stamp


class EnrolmentFile:
    """``nodes`` is what it says. While it cannot be read, or is no TOML, what it said last holds (``trouble`` says
    so), and while it is empty: ``nearshard enroll --remove`` leaves a comment. A single node that is not acceptable is
    out, so that a slip in one line does not keep another one in."""

    def __init__(self, file: Path, log: FilteringBoundLogger) -> None:
        """Raises ConfigError where the file is not wholly right: a start is when somebody looks."""
        self._file, self._log = file, log
        self.trouble = ""
        try:
            self._stamp = stamp(file)
            nodes, wrong = parse_enrolment(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, DecodeError) as error:
            raise ConfigError(f"router.enrolled: {file}: {error}") from error
        if wrong:
            raise ConfigError(f"router.enrolled: {file}: " + "; ".join(f"{n}: {why}" for n, why in wrong.items()))
        self.nodes: Mapping[str, Enrolled] = nodes

    async def changed(self) -> bool:
        """Look whether the file is another one than last time, and read it then. Gives whether ``nodes`` is new."""
        try:
            new = stamp(self._file)
            if new == self._stamp:
                return False
            text = await asyncio.to_thread(self._file.read_text, encoding="utf-8")
            if not text.strip() and self.nodes:
                raise DecodeError("it is empty")  # somebody is writing it: an editor empties a file first
            nodes, wrong = await asyncio.to_thread(parse_enrolment, text)
        except (OSError, UnicodeDecodeError, DecodeError) as error:
            if not self.trouble:
                self._log.warning("the enrolment file cannot be read; what it said last holds", reason=str(error))
            self.trouble = f"the enrolment file cannot be read: {type(error).__name__}"
            return False
        for node, why in wrong.items():
            self._log.warning("a node of the enrolment file is not acceptable, and out", node=node[:64], reason=why)
        self.trouble = "nodes of the enrolment file are not acceptable" if wrong else ""
        self._stamp, self.nodes = new, nodes
        self._log.info("enrolment read", nodes=len(nodes))
        return True
