"""What a publisher may do with a rollout, decided from what the refs mean now. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from tuf.api.metadata import Targets

from origin import signing
from origin.signing import Ref
from shared.errors import ConfigError, Conflict, NotFound
from shared.ids import is_revision
from shared.rollout import Rollout, next_step


@dataclass(frozen=True)
class Asked:
    """What is to be done with the rollout of a ref; nothing: it is only shown."""

    candidate: str = ""
    """A ref, or a revision that a ref means."""
    sites: tuple[str, ...] | None = None
    percent: int | None = None
    further: bool = False
    """To the next of ``STEPS``."""
    finish: bool = False
    rollback: bool = False

    def check(self) -> None:
        """Raises ConfigError for words that do not go together."""
        if self.percent is not None and not 1 <= self.percent <= 100:
            raise ConfigError("--percent is 1 to 100; --rollback ends a rollout")
        ways = [self.further, self.finish, self.rollback, self.percent is not None]
        if sum(ways) > 1 or ((self.finish or self.rollback) and (self.candidate or self.sites is not None)):
            raise ConfigError("of --percent, --continue, --finish and --rollback one at a time, the last two alone")

    def nothing(self) -> bool:
        """Whether it is only shown."""
        return self == Asked()


def decide(refs: Mapping[str, Ref], model: str, ref: str, asked: Asked) -> Ref:
    """What the ref is to mean, by what the refs of the model mean now. Raises NotFound, ConfigError, Conflict."""
    now = refs.get(ref)
    if now is None:
        raise NotFound(f"{model} has no ref {ref!r}", code="unknown_revision")
    if asked.rollback or asked.nothing():
        return now if asked.nothing() else replace(now, rollout=None)
    rule = _rule(refs, model, now, asked)
    if asked.finish:
        return Ref(rule.revision, now.published, rule.size, now.private)
    percent = next_step(rule.percent) if asked.further else rule.percent if asked.percent is None else asked.percent
    return replace(
        now, rollout=replace(rule, percent=percent, sites=rule.sites if asked.sites is None else asked.sites)
    )


def _rule(refs: Mapping[str, Ref], model: str, now: Ref, asked: Asked) -> Rollout:
    """The rule to go on from: the one there is, or one of the candidate."""
    if not asked.candidate:
        if now.rollout is None:
            raise NotFound(f"nothing is being rolled out of {model}: name a revision", code="unknown_revision")
        return now.rollout
    found = next((meant for name, meant in refs.items() if asked.candidate in (name, meant.revision)), None)
    if found is None:
        what = "revision that a ref means: publish it under one first" if is_revision(asked.candidate) else "ref"
        raise NotFound(f"{asked.candidate} is no {what}, like --ref canary", code="unknown_revision")
    if found.revision == now.revision:
        raise ConfigError("the ref means this revision already")
    if now.rollout and now.rollout.revision != found.revision:
        raise Conflict(f"{now.rollout.revision} is being rolled out: --finish or --rollback first", code="ref_conflict")
    if now.rollout:
        return now.rollout
    if asked.percent is None and asked.sites is None and not asked.further:
        raise ConfigError("--percent, --sites or both say to whom")
    return Rollout(found.revision, found.size, 0 if asked.further else 100)


def write(role: Targets, model: str, ref: str, meant: Ref, now: Ref, at: datetime) -> None:
    """Change a role so that a ref means what was decided."""
    if meant.revision != now.revision:
        signing.set_ref(role, model, ref, meant.revision, meant.size, at)
    else:
        signing.set_rollout(role, model, ref, meant.rollout)
