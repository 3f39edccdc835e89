"""The pages that users read, and what can be checked of them: their commands and their links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "infra" / "README.md"])
RUN = "sh run"
"""Behind the fence of a block whose commands a test runs: what is shown of it is the same."""
_FENCE = re.compile(r"^ *```([^`\n]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`(nearshard [^`]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_OPERATORS = {"&&", "||", "|", ";", ">", ">>", "<", "(", ")", "&"}


class Typed(NamedTuple):
    """A command line of ``nearshard`` as a page has it."""

    page: Path
    words: tuple[str, ...]
    """Behind ``nearshard``."""
    whole: bool
    """Whether it is a line to type; in a sentence, arguments may be left out."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: nearshard {' '.join(self.words)}"


def blocks(page: Path) -> list[tuple[str, list[str]]]:
    """The fenced blocks: what is behind the fence, and the lines, with those joined that a backslash breaks."""
    found = _FENCE.findall(page.read_text())
    return [(info.strip(), re.sub(r"\\\n\s*", "", body).splitlines()) for info, body in found]


def runnable(page: Path) -> list[list[str]]:
    """The commands of each block that is marked to be run, without what their comments say."""
    return [[re.sub(r" +#.*", "", line) for line in lines] for info, lines in blocks(page) if info == RUN]


def typed(page: Path) -> Iterator[Typed]:
    """All lines that begin ``nearshard``, or have it behind an operator of the shell or another program."""
    for info, lines in blocks(page):
        if info in ("", "sh", "console", RUN):
            for line in lines:
                yield from (Typed(page, words, True) for words in _commands(line.removeprefix("$ ")))
    for text in _INLINE.findall(_FENCE.sub("", page.read_text())):
        yield from (Typed(page, words, False) for words in _commands(text))


def _commands(line: str) -> Iterator[tuple[str, ...]]:
    if "nearshard " not in line:
        return
    line = re.sub(r"<[^<>]+>", "X", re.sub(r"(?<=\s)#.*", "", line))
    try:
        reader = shlex.shlex(line, posix=True, punctuation_chars=True)
        reader.whitespace_split, reader.commenters = True, ""
        words = list(reader)
    except ValueError:  # output that is shown, with a quote in it
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in _OPERATORS:
            command.append(word)
            continue
        begins = _begin(command)
        if begins is not None:
            yield tuple(command[begins:])
        command = []


def _begin(command: list[str]) -> int | None:
    """Where the words behind ``nearshard`` begin, where that is run: behind settings, sudo, or times of cron."""
    before = r"(?:[A-Z_]+=.*|sudo|[0-9*]+)"
    for place, word in enumerate(command):
        if word == "nearshard":
            return place + 1
        if not re.fullmatch(before, word):
            return None
    return None


def links(page: Path) -> Iterator[str]:
    """Where a page leads to within the project: a path, relative to it, and what is behind ``#``."""
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """What can be behind ``#`` of a page: its headings, as GitHub and others name them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
