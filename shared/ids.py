"""Names and ids, each with one strict pattern: models, refs, tasks, regions, nodes, task ids.

A task id is ``<model>[:<task>][@<ref or revision>]``; task defaults to ``all``, ref to ``main``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.digest import Digest, hex_of, parse_digest
from shared.errors import BadId

MAX_MODEL = 128
MAX_NAME = 64
DEFAULT_TASK = "all"
DEFAULT_REF = "main"

_WORD = r"[a-z0-9][a-z0-9._-]*"
_MODEL = re.compile(rf"{_WORD}/{_WORD}")
_NAME = re.compile(_WORD)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LIKE_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def parse_model(text: str) -> str:
    """A model name ``org/name``. Raises BadId."""
    if len(text) > MAX_MODEL or not _MODEL.fullmatch(text):
        raise BadId(f"a model is 'org/name', lower case, at most {MAX_MODEL} characters")
    return text


def parse_name(text: str, what: str = "a name") -> str:
    """A task, region or node name. Raises BadId."""
    if len(text) > MAX_NAME or not _NAME.fullmatch(text):
        raise BadId(f"{what} has lower-case letters, digits, '.', '_' and '-', at most {MAX_NAME}")
    return text


def parse_ref(text: str) -> str:
    """A movable name for a revision. 40 or 64 hex digits are kept for commits. Raises BadId."""
    parse_name(text, "a ref")
    if _LIKE_COMMIT.fullmatch(text):
        raise BadId("a ref does not look like a commit")
    return text


def parse_ref_or_revision(text: str) -> str:
    """A ref, or the digest of a revision. Raises BadId."""
    return parse_digest(text) if text.startswith("sha256:") else parse_ref(text)


def is_commit(ref: str) -> bool:
    """Whether this is what other people's clients call a revision: the first 40 hex digits of its digest."""
    return _COMMIT.fullmatch(ref) is not None


def commit_of(revision: Digest) -> str:
    """What other people's clients call a revision."""
    return hex_of(revision)[:40]


def is_revision(ref: str) -> bool:
    """Whether a checked ref or revision is a revision: immutable, and its own manifest's digest."""
    return ref.startswith("sha256:")


def as_revision(ref: str) -> Digest:
    """The digest behind a revision that ``is_revision`` accepted."""
    return parse_digest(ref)


@dataclass(frozen=True, slots=True)
class TaskId:
    """A parsed task id. ``str()`` gives the canonical spelling, with task and ref written out."""

    model: str
    task: str = DEFAULT_TASK
    ref: str = DEFAULT_REF

    def __str__(self) -> str:
        return f"{self.model}:{self.task}@{self.ref}"

    @property
    def ring_key(self) -> str:
        """What the ring hashes: without the revision, so that a new version lands where the old one is."""
        return f"{self.model}:{self.task}"


def parse_task_id(text: str) -> TaskId:
    """The task id that ``text`` spells. Raises BadId."""
    head, at, ref = text.partition("@")
    model, colon, task = head.partition(":")
    return TaskId(
        parse_model(model),
        parse_name(task, "a task") if colon else DEFAULT_TASK,
        parse_ref_or_revision(ref) if at else DEFAULT_REF,
    )
