"""The one error hierarchy, and the one table from a code to its HTTP status and exit code.

Three families, because callers treat them differently:

* ``RequestError``: their mistake. Never retried, never counted against a peer.
* ``UpstreamError``: a source failed. Retried elsewhere, counted against that source.
* ``LocalError``: this machine's mistake or trouble (settings, disk, input files).

The message is for logs and terminals. What goes over the wire is the code, its title from the table and
``public`` (values that we made ourselves), so that no error ever reflects input bytes (RFC 9457 §5).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple


class Meaning(NamedTuple):
    """What an error code means: HTTP status, exit code of a command, title for people."""

    status: int
    exit_code: int
    title: str


EXIT_USAGE, EXIT_CONFIG, EXIT_INTEGRITY, EXIT_AUTH, EXIT_NETWORK, EXIT_DISK, EXIT_NOT_FOUND = (
    2,
    3,
    4,
    5,
    6,
    7,
    8,
)
EXIT_INTERRUPTED = 130

CODES: Mapping[str, Meaning] = {
    # their mistake
    "bad_id": Meaning(400, EXIT_USAGE, "The path or id is not in its canonical form."),
    "bad_request": Meaning(400, EXIT_USAGE, "The request is not valid HTTP."),
    "bad_json": Meaning(400, EXIT_USAGE, "The body is not acceptable JSON."),
    "bad_body": Meaning(400, EXIT_USAGE, "The body is not acceptable msgpack."),
    "bad_region": Meaning(400, EXIT_USAGE, "The region name is not in its canonical form."),
    "bad_node": Meaning(422, EXIT_USAGE, "The node record is not acceptable."),
    "bad_key": Meaning(422, EXIT_USAGE, "The public key is not acceptable."),
    "unauthorized": Meaning(401, EXIT_AUTH, "A valid token is needed."),
    "bad_signature": Meaning(401, EXIT_AUTH, "The node's signature is not valid."),
    "stale_nonce": Meaning(401, EXIT_AUTH, "Sign again with the nonce that is given here."),
    "not_enrolled": Meaning(403, EXIT_AUTH, "The node is not enrolled."),
    "not_as_enrolled": Meaning(403, EXIT_AUTH, "The node's URL, region or weight is not as it was enrolled."),
    "certificate_needed": Meaning(403, EXIT_AUTH, "The certificate of the node that asks is needed here."),
    "unknown_path": Meaning(404, EXIT_NOT_FOUND, "Nothing is served at this path."),
    "unknown_model": Meaning(404, EXIT_NOT_FOUND, "There is no such model."),
    "unknown_revision": Meaning(404, EXIT_NOT_FOUND, "The model has no such ref or revision."),
    "unknown_task": Meaning(404, EXIT_NOT_FOUND, "The model has no such task at this revision."),
    "unknown_file": Meaning(404, EXIT_NOT_FOUND, "The model has no such file at this revision."),
    "unknown_blob": Meaning(404, EXIT_NOT_FOUND, "There is no such shard."),
    "unknown_node": Meaning(404, EXIT_NOT_FOUND, "There is no such node."),
    "method_not_allowed": Meaning(405, EXIT_USAGE, "The method is not allowed here; see Allow."),
    "not_acceptable": Meaning(406, EXIT_USAGE, "No representation matches Accept."),
    "timed_out": Meaning(408, EXIT_NETWORK, "The request was not received in time."),
    "stale_heartbeat": Meaning(409, EXIT_USAGE, "A later heartbeat of the node was heard already."),
    "precondition_failed": Meaning(412, EXIT_USAGE, "If-Match names another version."),
    "too_large": Meaning(413, EXIT_USAGE, "The body is larger than is allowed here."),
    "unsupported_type": Meaning(415, EXIT_USAGE, "The body's type or encoding is not accepted here."),
    "range_not_satisfiable": Meaning(416, EXIT_USAGE, "The byte range cannot be satisfied."),
    "expectation_failed": Meaning(417, EXIT_USAGE, "The expectation cannot be met."),
    "http_version": Meaning(505, EXIT_USAGE, "Only HTTP/1.0 and HTTP/1.1 are spoken here."),
    # a source's mistake
    "upstream_error": Meaning(502, EXIT_NETWORK, "No source could answer."),
    "upstream_missing": Meaning(502, EXIT_NETWORK, "A listed shard is missing at every source."),
    "integrity_error": Meaning(502, EXIT_INTEGRITY, "A source sent bytes that do not match their digest."),
    "bad_certificate": Meaning(502, EXIT_NETWORK, "A source's certificate, or the one shown to it, is not accepted."),
    "upstream_timeout": Meaning(504, EXIT_NETWORK, "No source answered in time."),
    "no_nodes": Meaning(503, EXIT_NETWORK, "No node and no origin can serve this now."),
    "no_room": Meaning(503, EXIT_DISK, "The node has no room for this now."),
    "busy": Meaning(503, EXIT_NETWORK, "Too many connections; come back in a moment."),
    "not_ready": Meaning(503, EXIT_NETWORK, "The service cannot serve yet."),
    # this machine's trouble
    "internal": Meaning(500, 1, "The service failed; the log has the request id."),
    "invalid_manifest": Meaning(502, EXIT_INTEGRITY, "The manifest is not valid."),
    "manifest_too_large": Meaning(502, EXIT_INTEGRITY, "The manifest is larger than is allowed."),
    "wrong_model": Meaning(502, EXIT_INTEGRITY, "The manifest is of another model."),
    "bad_tensor_file": Meaning(422, EXIT_USAGE, "A safetensors file is not valid."),
    "refused_file": Meaning(422, EXIT_USAGE, "A file of the model directory is refused."),
    "bad_tasks": Meaning(422, EXIT_USAGE, "The tasks file is not valid."),
    "bad_config": Meaning(500, EXIT_CONFIG, "The settings are not valid."),
    "disk": Meaning(507, EXIT_DISK, "The disk refused to store this."),
    "exists": Meaning(409, EXIT_USAGE, "The target is there already."),
}


class NearshardError(Exception):
    """The root. ``code`` picks status, exit code and title from ``CODES``.

    ``public`` is added to the problem document: only values that we made ourselves.
    ``headers`` are added to the HTTP answer.
    """

    code: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        public: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.error_code = code or type(self).code
        self.meaning = CODES[self.error_code]
        self.public = dict(public or {})
        self.headers = dict(headers or {})
        super().__init__(message or self.meaning.title)

    @property
    def status(self) -> int:
        """The HTTP status that renders this error."""
        return self.meaning.status

    @property
    def exit_code(self) -> int:
        """The exit code of a command that ends with this error."""
        return self.meaning.exit_code


class RequestError(NearshardError):
    """Their mistake: answered with a 4xx, never retried."""

    code = "bad_request"


class BadId(RequestError):
    """A path, id, digest or name that is not in its one canonical spelling."""

    code = "bad_id"


class DecodeError(RequestError, ValueError):
    """Bytes that are not what they claim to be (msgpack, JSON)."""

    code = "bad_body"


class NotFound(RequestError):
    """Something that is named correctly and is not there; the code says what."""

    code = "unknown_path"


class UpstreamError(NearshardError):
    """A source could not answer, or answered wrongly: another one may do better."""

    code = "upstream_error"


class IntegrityError(UpstreamError):
    """Bytes that do not match the digest they were asked for."""

    code = "integrity_error"


class ManifestInvalid(UpstreamError):
    """A manifest that breaks its own rules; never used, whoever sent it."""

    code = "invalid_manifest"


class ManifestTooLarge(ManifestInvalid):
    """A manifest over its size or shard limit; reading stopped there."""

    code = "manifest_too_large"


class WrongModel(ManifestInvalid):
    """A valid manifest of another model than was asked for."""

    code = "wrong_model"


class LocalError(NearshardError):
    """This machine's trouble: settings, disk, or files that were given to us."""

    code = "internal"


class ConfigError(LocalError):
    """A setting that cannot be used; the message names the file and the key."""

    code = "bad_config"


class DiskError(LocalError):
    """The disk refused: full, read-only or failing."""

    code = "disk"


class PublishError(LocalError):
    """A model directory that cannot be published; the message names the file."""

    code = "refused_file"


class TensorFileError(PublishError):
    """A safetensors file that is truncated, overlapping, oversized or otherwise not valid."""

    code = "bad_tensor_file"


class TasksError(PublishError):
    """A tasks file that names what is not there, or is malformed."""

    code = "bad_tasks"


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a task group: what one caller wants to hear of several workers."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
