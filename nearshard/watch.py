"""The network in a terminal, as a router sees it: ``nearshard nodes`` and ``nearshard top``.

A state is a word and a shape; the colour only goes with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shared.errors import UpstreamError

EVERY = 2.0
"""Seconds between two questions to a router, which asks its nodes less often."""
MODELS, ROLLOUTS, ERRORS = 10, 8, 6
"""Lines of each that ``top`` shows."""
_MARKS = {
    "well": ("●", "green"), "draining": ("◐", "blue"), "failing": ("▲", "yellow"), "impaired": ("▲", "yellow"),
    "ejected": ("✕", "bold red"), "lost": ("✕", "bold red"), "away": ("○", "dim"), "empty": ("○", "dim"),
}  # fmt: skip
_FIGURES = ("in flight", "served", "link", "saved", "hits", "now")
_NODE = ("served", "link", "hits")

Ask = Callable[[], Coroutine[None, None, Mapping[str, Any]]]


def show_nodes(found: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """A table of the nodes."""
    table = _table("node", "region", "state", "share", "load", *_NODE, text=3)
    table.add_column("url", overflow="fold")
    for node in sorted(found, key=lambda node: (node["region"], node["id"])):
        about = _percent(node.get("share")), _text(node.get("load"))
        figures = _figures(node)
        shown = [figures[_FIGURES.index(name)] for name in _NODE]
        table.add_row(node["id"], node["region"], _state(node), *about, *shown, node["url"])
    (console or wide()).print(table)


def wide() -> Console:
    """Standard output; where that is no terminal, nothing is cut off there."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


async def top(ask: Ask, console: Console) -> None:
    """Show what ``ask`` gives, until the task is cancelled; once where nobody can see it change. Raises UpstreamError
    where the first question fails; afterwards that is said, and asked again."""
    document = await ask()
    if not console.is_terminal:
        console.print(draw(document))
        return
    with Live(draw(document, console.height), console=console, screen=True, auto_refresh=False) as live:
        while True:
            await asyncio.sleep(EVERY)
            trouble = ""
            try:
                document = await ask()
            except UpstreamError as error:
                trouble = f"not live: {error}"
            live.update(draw(document, console.height, trouble), refresh=True)


def draw(document: Mapping[str, Any], height: int = 1000, trouble: str = "") -> RenderableType:
    """The whole of it in about so many lines; nodes that are well go first where there is no room."""
    models, rollouts = document["models"][:MODELS], list(_rollouts(document))[:ROLLOUTS]
    rounds, errors = list(_rounds(document))[:ROLLOUTS], document["errors"][:ERRORS]
    others = sum(len(part) + 3 for part in (models, rollouts, rounds, errors) if part)
    parts: list[RenderableType] = [_head(document, trouble), Text()]
    parts.append(_regions(document, max(4, height - others - 5)))
    if models:
        table = _table("model", *_FIGURES[1:-1], "requests", "errors", text=1)
        for model in models:
            table.add_row(
                model["model"], *_figures({"today": model})[1:-1], *map(_text, (model["requests"], model["errors"]))
            )
        parts += [Text(), table]
    for title, lines in (("rollouts", rollouts), ("federated rounds", rounds)):
        if lines:
            parts += [Text(), Text(title, "bold"), *lines]
    if errors:
        parts += [Text(), Text("last errors and warnings", "bold")]
        parts += [_error(error, document["time"]) for error in errors]
    return Group(*parts)


def _head(document: Mapping[str, Any], trouble: str) -> Text:
    total, today = document["total"], document["total"]["today"] or {}
    line = Text.assemble(("nearshard  ", "bold"), f"{total['up']} of {total['nodes']} nodes up   ")
    if today:
        line.append(f"today: served {_size(today['served'])}, over links {_size(today['link'])}, ")
        line.append(f"saved {_size(today['spared'])}", "bold")
        line.append(f", hits {_percent(today['hit_ratio'])}   ")
    line.append(f"asked {document['age']:.0f} s ago", "dim")
    for bad in (trouble, document["degraded"]):
        if bad:
            line.append(f"\n▲ {bad}", "bold red")
    return line


def _regions(document: Mapping[str, Any], room: int) -> Table:
    """Each region, and those of its nodes that there is room for: first those that are not well."""
    table = _table("region, node", "state", "share", *_FIGURES, text=2)
    order = sorted(document["nodes"], key=lambda node: (node["state"] == "well", node["region"], node["id"]))
    shown = {node["id"] for node in order[: max(0, room - len(document["regions"]))]}
    for region in document["regions"]:
        table.add_row(Text(region["region"], "bold"), _state(region), "", *_figures(region))
        for node in document["nodes"]:
            if node["region"] == region["region"] and node["id"] in shown:
                table.add_row(
                    Text(f"  {node['id']}"), _state(node), _percent(node["share"]), *_figures(node, saved=False)
                )
    if left := document["left_off"] + len(document["nodes"]) - len(shown):
        table.add_row(Text(f"  and {left} more nodes", "dim"))
    return table


def _table(*columns: str, text: int) -> Table:
    """The first so many columns are text, the others figures."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < text else "right", no_wrap=True)
    return table


def _figures(one: Mapping[str, Any], *, saved: bool = True) -> list[str]:
    """As in _FIGURES. What a node alone has saved says little, since its peers had from it what it fetched."""
    today = one.get("today") or {}
    rate = one.get("rate")
    return [
        _text(one.get("in_flight")),
        _size(today.get("served")),
        _size(today.get("link")),
        _size(today.get("spared")) if saved else "",
        _percent(today.get("hit_ratio")),
        "-" if rate is None else f"{_size(rate)}/s",
    ]


def _state(one: Mapping[str, Any]) -> Text:
    mark, style = _MARKS.get(one["state"], ("?", ""))
    health = one.get("health") or {}
    more = ""
    if one["state"] == "ejected":
        more = f" for {health['seconds_left']:.0f} s"
    elif one["state"] == "failing":
        more = f": {health['failures']} probes"
    elif one.get("trouble"):
        more = f" ({one['trouble']})"
    return Text.assemble((f"{mark} {one['state']}", style), more)


def _rollouts(document: Mapping[str, Any]) -> Iterator[Text]:
    for one in document["rollouts"]:
        sites = f" at {', '.join(one['sites'])}" if one.get("sites") else ""
        yield Text(f"{one['model']}@{one['ref']}: {one.get('percent', 0)} % of clients{sites}")
        for seen in one["results"]:
            which = "candidate" if seen["revision"] == one.get("revision") else "current"
            ready = seen["ready_p50_ms"]
            timed = "" if ready is None else f", ready in {ready:.0f} ms"
            yield Text(f"  {seen['site']} {which}: {seen['requests']} requests, {seen['errors']} errors{timed}")


def _rounds(document: Mapping[str, Any]) -> Iterator[Text]:
    for one in document["federated"]:
        if current := one["open"]:
            counted, sites = current.get("counted", 0), current.get("sites", 0)
            yield Text(f"{one['model']}: round {current.get('number')}, {counted} of {sites} sites counted")


def _error(error: Mapping[str, Any], now: float) -> Text:
    about = [error[name] for name in ("code", "node", "region") if name in error]
    times = f" ({error['count']} times)" if error["count"] > 1 else ""
    said = f"{max(0, now - error['time']):.0f} s ago  {error['from'] or 'router'}: {error['event']}"
    return Text(" ".join([said, *about]) + times, "red" if error["level"] == "error" else "")


def _size(value: int | None) -> str:
    if value is None:
        return "-"
    return ("-" if value < 0 else "") + decimal(abs(value)).replace(" bytes", " B")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _text(value: object) -> str:
    return "-" if value is None else str(value)
