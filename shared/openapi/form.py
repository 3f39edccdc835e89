"""From operations to an OpenAPI 3.1 document. Pure.

An operation names the error codes that it may answer with; status, title and the form of the problem document come
from the one table (``shared.errors``). A GET is described with its HEAD, as both are routed by one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shared.errors import CODES

Schema = Mapping[str, Any]

JSON, BYTES, PROBLEM = "application/json", "application/octet-stream", "application/problem+json"
ANY = "*/*"
BEARER, QUERY_TOKEN, SESSION, UPLOAD = "bearer", "query_token", "publishing_session", "upload"
TOKEN = ("token_invalid", "token_expired", "token_early", "token_revoked")
"""What may be wrong with a token that is shown."""
SMALL_BODY = ("unsupported_type", "timed_out", "too_large", "bad_json")
"""What may be wrong with a small JSON body."""
EVERYWHERE = ("bad_request", "expectation_failed", "busy")
"""What any request may be answered with."""
OPEN: tuple[str, ...] = ()
"""Security of an operation that asks nobody who they are."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A value in the path, the query or a field of the head."""

    name: str
    where: str
    """``path``, ``query`` or ``header``."""
    about: str
    schema: Schema
    example: object = None
    required: bool = False

    def document(self) -> dict[str, Any]:
        """As OpenAPI has it."""
        required = {"required": True} if self.required or self.where == "path" else {}
        shown = {} if self.example is None else {"example": self.example}
        return {
            "name": self.name, "in": self.where, "description": self.about, **required, "schema": self.schema, **shown
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """What an operation answers where nothing is wrong: a status, and schemas by media type."""

    status: int
    about: str
    content: Mapping[str, Schema] = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    """Fields of the head that are always there, and what they say."""

    def document(self, *, head: bool) -> dict[str, Any]:
        """As OpenAPI has it; without the content for HEAD."""
        made: dict[str, Any] = {"description": self.about}
        if self.fields:
            made["headers"] = {
                name: {"description": about, "required": True, "schema": {"type": "string"}}
                for name, about in self.fields.items()
            }
        if self.content and not head:
            made["content"] = {media: {"schema": schema} for media, schema in self.content.items()}
        return made


@dataclass(frozen=True, slots=True)
class Body:
    """What a request carries."""

    about: str
    content: Mapping[str, Schema]
    example: object = None
    required: bool = True

    def document(self) -> dict[str, Any]:
        """As OpenAPI has it."""
        shown = {} if self.example is None else {"example": self.example}
        content = {media: {"schema": schema, **shown} for media, schema in self.content.items()}
        return {"description": self.about, "required": self.required, "content": content}


@dataclass(frozen=True, slots=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    name: str
    """Its ``operationId``."""
    about: str
    tag: str
    answers: tuple[Answer, ...]
    errors: tuple[str, ...] = ()
    """Codes of ``shared.errors``, beside those of ``EVERYWHERE``."""
    parameters: tuple[Parameter, ...] = ()
    body: Body | None = None
    security: tuple[str, ...] = (BEARER, QUERY_TOKEN)
    """Schemes of which one may be used."""
    needed: bool = False
    """Whether one has to be."""
    head: bool = True
    """Whether a GET has its HEAD."""
    statuses: Mapping[str, int] = field(default_factory=dict)
    """Of codes that have another one here than elsewhere."""

    @property
    def example(self) -> str:
        """The path with the examples of its parameters."""
        path = self.path
        for parameter in self.parameters:
            if parameter.where == "path":
                path = path.replace(f"{{{parameter.name}}}", str(parameter.example))
        return path

    @property
    def methods(self) -> tuple[str, ...]:
        """The method, with the one that comes along."""
        return ("GET", "HEAD") if self.method == "GET" and self.head else (self.method,)

    def document(self, method: str) -> dict[str, Any]:
        """As OpenAPI has it."""
        head = method == "HEAD"
        return {
            "operationId": f"{self.name}Head" if head else self.name,
            "tags": [self.tag],
            "summary": f"The head of the same GET: {self.name}." if head else self.about,
            **({"parameters": [item.document() for item in self.parameters]} if self.parameters else {}),
            **({"requestBody": self.body.document()} if self.body else {}),
            "security": [*([] if self.needed else [{}]), *({name: []} for name in self.security)],
            "responses": dict(sorted(self._responses(head=head).items())),
        }

    def _responses(self, *, head: bool) -> dict[str, dict[str, Any]]:
        """By status. One may be that of an answer and of several problems."""
        made = {str(answer.status): answer.document(head=head) for answer in self.answers}
        by_status: dict[int, list[str]] = {}
        for code in dict.fromkeys((*self.errors, *EVERYWHERE)):
            by_status.setdefault(self.statuses.get(code, CODES[code].status), []).append(code)
        for status, codes in by_status.items():
            about = "As to GET." if head else f"A problem: {', '.join(codes)}."
            own = made.get(str(status), {})
            one = made[str(status)] = {**own, "description": f"{own['description']} {about}" if own else about}
            if not head:
                one["content"] = {**own.get("content", {}), PROBLEM: {"schema": _problem(status, codes)}}
        return made


def _problem(status: int, codes: list[str]) -> dict[str, Any]:
    return {
        "allOf": [{"$ref": "#/components/schemas/Problem"}],
        "properties": {"code": {"enum": codes}, "status": {"const": status}},
    }


PROBLEM_SCHEMA: Schema = {
    "type": "object",
    "description": "A problem document (RFC 9457). `internal` (500) is listed at no operation: none means to.",
    "properties": {
        "type": {"type": "string", "pattern": "^urn:nearshard:error:[a-z_]+$"},
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "code": {"oneOf": [{"const": code, "title": meaning.title} for code, meaning in CODES.items()]},
        "request_id": {"type": "string", "description": "Names the request in the service's log."},
    },
    "required": ["type", "title", "status", "code", "request_id"],
}
_SCHEMES: Schema = {
    BEARER: {"type": "http", "scheme": "bearer", "description": "A token of `nearshard token`."},
    QUERY_TOKEN: {"type": "apiKey", "in": "query", "name": "token", "description": "The same in a signed URL."},
    SESSION: {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "`Nearshard-Session` and a session, as `beginPublishing` gives it.",
    },
    UPLOAD: {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "`Nearshard-Update` and a token, as `stateUpdate` gives it.",
    },
}


def document(title: str, about: str, version: str, operations: Iterable[Operation], schemas: Schema) -> dict[str, Any]:
    """The OpenAPI document of some operations. ``schemas``: those that they refer to, by name.

    An operation that is there twice (of two tiers) is described as the first one, with all their
    answers and errors."""
    merged: dict[tuple[str, str], Operation] = {}
    for operation in operations:
        key = (operation.method, operation.path)
        merged[key] = _joined(merged[key], operation) if key in merged else operation
    paths: dict[str, dict[str, Any]] = {}
    for operation in merged.values():
        for method in operation.methods:
            paths.setdefault(operation.path, {})[method.lower()] = operation.document(method)
    used = {scheme for operation in merged.values() for scheme in operation.security}
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "description": about, "version": version},
        "paths": paths,
        "components": {
            "schemas": {"Problem": PROBLEM_SCHEMA, **schemas},
            "securitySchemes": {name: scheme for name, scheme in _SCHEMES.items() if name in used},
        },
    }


def _joined(one: Operation, other: Operation) -> Operation:
    """One operation that answers as either."""
    answers = {answer.status: answer for answer in one.answers}
    for answer in other.answers:
        answers.setdefault(answer.status, answer)
    return Operation(
        one.method, one.path, one.name, one.about, one.tag, tuple(answers.values()),
        tuple(dict.fromkeys((*one.errors, *other.errors))), one.parameters, one.body, one.security,
        one.needed, one.head, one.statuses,
    )  # fmt: skip
