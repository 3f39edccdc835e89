"""The federated rounds of public models, asked of the origins while somebody looks at the dashboard.

Which models have rounds nobody lists, so each is asked: seldom, until it has some.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from shared import codec
from shared.clock import Clock
from shared.errors import DecodeError, NotFound, UpstreamError
from shared.web.asking import Asking
from shared.web.session import Sessions, fetch

LIVELY, QUIET = 10.0, 300.0
"""Seconds between two questions about a model that has rounds, and about one that has none."""
AT_ONCE = 16
"""Models asked about in one look."""
MAX_MODELS = 1000
MAX_LAST = 5
"""Past rounds of a model that are shown."""
_OPEN = ("number", "state", "deadline", "counted", "sites", "min_sites", "rule")
_PAST = ("number", "state", "counted", "revision", "ended")


def parse_rounds(document: object) -> dict[str, Any] | None:
    """What is shown of an origin's answer: ``open`` and ``last``; None where there are no rounds. Pure."""
    if not isinstance(document, dict):
        return None
    past = document.get("last")
    last = [_fields(one, _PAST) for one in past[:MAX_LAST] if isinstance(one, dict)] if isinstance(past, list) else []
    current = document.get("open")
    shown = _fields(current, _OPEN) if isinstance(current, dict) else None
    return {"open": shown, "last": last} if shown or last else None


def _fields(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Numbers and short texts."""
    return {
        name: value[:200] if isinstance(value, str) else value
        for name in names
        if isinstance(value := found.get(name), str | int) and not isinstance(value, bool)
    }


class FederatedRounds:
    """The rounds that are known, by model."""

    def __init__(
        self,
        sessions: Sessions,
        origins: Sequence[str],
        models: Callable[[], Awaitable[Sequence[str]]],
        is_public: Callable[[str], bool],
        clock: Clock,
    ) -> None:
        """``models`` gives names of models, of which those that ``is_public`` may be shown."""
        self._sessions, self._origins = sessions, origins
        self._models, self._is_public, self._clock = models, is_public, clock
        self._known: dict[str, tuple[float, dict[str, Any] | None]] = {}
        """By model when it was asked about, and what was said."""
        self._asking = Asking()

    async def close(self) -> None:
        """Stop."""
        await self._asking.close()

    def look(self) -> list[dict[str, Any]]:
        """What is known now, by model; asks for what is older in the background."""
        self._asking.begin("rounds", self._refresh)
        return [{"model": model, **rounds} for model, (_, rounds) in sorted(self._known.items()) if rounds]

    async def _refresh(self) -> None:
        """Raises UpstreamError, which the next look tries again."""
        now = self._clock.monotonic()
        models = [model for model in (await self._models())[:MAX_MODELS] if self._is_public(model)]
        self._known = {model: self._known.get(model, (float("-inf"), None)) for model in models}
        due = [model for model, (asked, rounds) in self._known.items() if now - asked >= (LIVELY if rounds else QUIET)]
        for model in sorted(due, key=lambda model: self._known[model][0])[:AT_ONCE]:
            self._known[model] = now, await self._ask(model)

    async def _ask(self, model: str) -> dict[str, Any] | None:
        """Of the first origin that answers. Raises UpstreamError where none does."""
        failure = UpstreamError("there is no origin")
        for base in self._origins:
            try:
                answer = await fetch(self._sessions.of(base), f"{base}/federated/{model}", limit=codec.MAX_JSON)
                return parse_rounds(codec.decode_json(answer.body))
            except (NotFound, DecodeError):
                return None
            except UpstreamError as error:
                failure = error
        raise failure
