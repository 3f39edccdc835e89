"""The ``nearshard`` command.

Services, ``publish`` and ``trust`` are programs of their own packages (the parts never import each other), so those
words replace this process by ``python -m <package>``; the rest is in ``nearshard.commands``. Little is imported here:
a command should not take longer to start than its work takes.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # takes long to import, and services are started without it
    import typer

PROGRAMS: Mapping[str, tuple[str, str]] = {
    "token": ("origin.token_command", "Make, show, replace and revoke access tokens."),
    "import": ("origin.import_command", "Publish a model from another hub, network or directory."),
    "publish": ("origin.publish_command", "Publish a model directory."),
    "rollout": ("origin.rollout_command", "Let a ref mean a new revision to some, then more, then all."),
    "federated": ("origin.federated_command", "Improve a model by signed updates of sites, round by round."),
    "trust": ("origin.trust_command", "Make keys, and say who may sign what."),
    "gc": ("origin.gc_command", "Remove what no revision that is kept refers to."),
    "origin": ("origin", "Run an origin."),
    "router": ("router", "Run a router."),
    "edge": ("edge_node", "Run an edge node."),
}

MODULES: Mapping[str, tuple[str, ...]] = {
    "nearshard.commands.fetch": ("get", "pull", "repair"),
    "nearshard.commands.sync": ("sync",),
    "nearshard.commands.bundle": ("bundle",),
    "nearshard.commands.repository": ("ls", "show", "verify", "activate", "rollback", "rm"),
    "nearshard.commands.up": ("up",),
    "nearshard.commands.nodes": ("preheat", "pin", "purge", "link", "drain"),
    "nearshard.commands.delta": ("delta",),
    "nearshard.commands.network": ("nodes", "top", "locate", "enroll"),
    "nearshard.commands.report": ("report",),
    "nearshard.commands.doctor": ("doctor",),
    "nearshard.commands.accept": ("trust",),
    "nearshard.commands.federated": ("federated",),
}
"""Modules in the order of ``--help``, and the words of each."""
OWN: Mapping[str, tuple[str, ...]] = {"trust": ("accept",), "federated": ("enroll", "submit", "rounds")}
"""Second words after those of another program that are this command's."""


def program_of(words: Sequence[str]) -> str:
    """The module of another package that runs these words; empty for the words of this command."""
    word, *rest = [*words, ""]
    return PROGRAMS[word][0] if word in PROGRAMS and rest[0] not in OWN.get(word, ()) else ""


def main() -> None:
    """Run the command; an error is one line on stderr, and its exit code."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if module := program_of(sys.argv[1:]):
        os.execv(sys.executable, [sys.executable, "-m", module, *sys.argv[2:]])  # noqa: S606
    try:
        run(word)
    except SystemExit as ended:
        if ended.code is not None and not isinstance(ended.code, int):
            raise
        _leave(ended.code or 0)


def _leave(code: int) -> NoReturn:
    """End at once: all is written and closed, and to take the interpreter apart takes longer than to start it."""
    atexit._run_exitfuncs()
    with suppress(OSError):  # nobody reads what is written
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def make_app(word: str) -> typer.Typer:
    """What reads the rest of the line behind ``word``; all words, with their help, for any that is not one of them."""
    import typer

    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Deliver AI models from the nearest cache, shard by shard.",
        epilog="Example: nearshard up   (then, elsewhere)   nearshard get demo/minilm:embed-3l",
    )
    app.callback()(lambda: None)  # so that an only word is still typed
    wanted = [module for module, words in MODULES.items() if word in words]
    for module in wanted or MODULES:
        import_module(module).add_to(app)
    for name, (_, about) in PROGRAMS.items() if not wanted else ():
        if name not in OWN:
            app.command(name, help=about, add_help_option=False)(_elsewhere)
    return app


def run(word: str) -> None:
    """Run ``word`` with what else was typed; any other than a word of this command gets the whole of its help."""
    from shared.errors import EXIT_INTERRUPTED, EXIT_USAGE, NearshardError
    from shared.tracing import commanding

    try:
        with commanding(word, os.environ):
            make_app(word)(prog_name="nearshard", standalone_mode=True)
    except NearshardError as error:
        sys.stderr.write(f"error: {error}\n")
        if names := error.public.get("tasks"):
            sys.stderr.write(f"tasks: {', '.join(str(name) for name in names)}\n")  # type: ignore[attr-defined]
        raise SystemExit(error.exit_code or EXIT_USAGE) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


def _elsewhere() -> None:
    """Never run: ``main`` hands these words over before typer sees them."""
