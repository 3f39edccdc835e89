"""What the pages tell people to type is what the commands take, and their links lead somewhere.

Nothing is run: each line is read by the parser of the command that it is for.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer._click.exceptions import BadOptionUsage, MissingParameter, NoArgsIsHelpError, UsageError
from typer.core import TyperGroup
from typer.main import get_command

from edge_node.config import EdgeSettings
from nearshard.cli import MODULES, PROGRAMS, make_app, program_of
from origin.config import OriginSettings
from router.config import RouterSettings
from shared.config import ServiceSettings, load
from shared.errors import ConfigError
from tests.pages import PAGES, ROOT, RUN, anchors, blocks, links, runnable, typed

SERVICES: dict[str, type[ServiceSettings]] = {"origin": OriginSettings, "router": RouterSettings, "edge": EdgeSettings}
WORDS = {*PROGRAMS, *(word for words in MODULES.values() for word in words)}
LEFT_OUT = (MissingParameter, BadOptionUsage, NoArgsIsHelpError, ConfigError)
"""What is wrong with a command in a sentence that leaves arguments, settings or an option's value to the reader."""


def read(words: tuple[str, ...]) -> None:
    """Parse a command line as the command would. Raises UsageError, ConfigError."""
    word, rest = words[0], list(words[1:])
    assert word in WORDS, f"there is no word {word}"
    if word in SERVICES:
        load(SERVICES[word], rest)
        return
    program = program_of(words)
    app = import_module(program).app if program else make_app(word)
    command, args = get_command(app), rest if program else list(words)
    context = command.make_context("nearshard", args)
    while isinstance(command, TyperGroup):
        _, found, args = command.resolve_command(context, [*context._protected_args, *context.args])
        assert found is not None
        command = found
        context = command.make_context(command.name, args, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_has_people_type_is_what_the_commands_take(page: Path) -> None:
    wrong = []
    for line in typed(page):
        try:
            read(line.words)
        except typer.Exit:  # --help
            continue
        except (UsageError, ConfigError, AssertionError, SystemExit) as error:
            if line.whole or not isinstance(error, LEFT_OUT):
                wrong.append(f"{line}: {getattr(error, 'message', '') or error}")
    assert not wrong, "\n".join(wrong)


def test_lines_are_found_and_what_is_wrong_with_one_too(tmp_path: Path) -> None:
    assert sum(1 for page in PAGES for _ in typed(page)) > 200
    for words in (("get",), ("get", "a/b", "--nope"), ("publish", "x"), ("trust", "nope"), ("delta", "show", "--x")):
        with pytest.raises(UsageError):
            read(words)
    with pytest.raises(SystemExit):
        read(("edge", "--nope", "1"))
    with pytest.raises(AssertionError):
        read(("nope",))
    page = tmp_path / "page.md"
    page.write_text("```\n$ A=1 sudo nearshard get \\\n   a/b  # c\nx && nearshard ls | cat\n```\n`nearshard nodes`\n")
    assert [line.words for line in typed(page)] == [("get", "a/b"), ("ls",), ("nodes",)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", ["README", "docs/tutorial"])
def test_the_chinese_page_has_the_commands_of_the_english_one(name: str) -> None:
    english, chinese = (
        [[re.sub(r" *#.*", "", line) for line in lines] for _, lines in blocks(ROOT / f"{name}{language}.md")]
        for language in ("", ".zh")
    )
    assert english == chinese
    assert len(runnable(ROOT / f"{name}.md")) == len(runnable(ROOT / f"{name}.zh.md")) > 0, RUN
