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
EXIT_BROKEN = 9
"""Of ``nearshard doctor``: it has done its work, and found something that makes transfers fail."""
EXIT_INTERRUPTED = 130

CODES: Mapping[str, Meaning] = {
    # their mistake
    "bad_id": Meaning(400, EXIT_USAGE, "The path or id is not in its canonical form."),
    "bad_request": Meaning(400, EXIT_USAGE, "The request is not valid HTTP."),
    "bad_json": Meaning(400, EXIT_USAGE, "The body is not acceptable JSON."),
    "bad_body": Meaning(400, EXIT_USAGE, "The body is not acceptable msgpack."),
    "bad_region": Meaning(400, EXIT_USAGE, "The region name is not in its canonical form."),
    "bad_node": Meaning(422, EXIT_USAGE, "The node record is not acceptable."),
    "bad_metadata": Meaning(422, EXIT_INTEGRITY, "The signed metadata is not acceptable."),
    "bad_manifest": Meaning(422, EXIT_INTEGRITY, "The manifest is not acceptable."),
    "digest_mismatch": Meaning(422, EXIT_INTEGRITY, "The bytes do not match their digest."),
    "bad_bundle": Meaning(422, EXIT_INTEGRITY, "The bundle is damaged, incomplete or none."),
    "base_missing": Meaning(404, EXIT_NOT_FOUND, "The revision that the bundle is upon is not held here whole."),
    "incomplete": Meaning(422, EXIT_USAGE, "A shard or the manifest of what is published is missing."),
    "bad_key": Meaning(422, EXIT_USAGE, "The public key is not acceptable."),
    "unauthorized": Meaning(401, EXIT_AUTH, "A valid token is needed."),
    "token_missing": Meaning(401, EXIT_AUTH, "A token is needed here."),
    "token_invalid": Meaning(401, EXIT_AUTH, "The token is not valid."),
    "token_expired": Meaning(401, EXIT_AUTH, "The token has expired."),
    "token_early": Meaning(401, EXIT_AUTH, "The token is from the future: its issuer's clock or this one's is wrong."),
    "token_revoked": Meaning(401, EXIT_AUTH, "The token was revoked."),
    "forbidden": Meaning(403, EXIT_AUTH, "The token is not for this."),
    "no_session": Meaning(401, EXIT_AUTH, "A publishing session is needed; it has ended or was never there."),
    "not_publisher": Meaning(403, EXIT_AUTH, "This key may not publish for this organisation."),
    "bad_signature": Meaning(401, EXIT_AUTH, "The signature is not valid."),
    "stale_nonce": Meaning(401, EXIT_AUTH, "Sign again with the nonce that is given here."),
    "not_enrolled": Meaning(403, EXIT_AUTH, "The node is not enrolled."),
    "not_as_enrolled": Meaning(403, EXIT_AUTH, "The node's URL, region or weight is not as it was enrolled."),
    "unknown_site": Meaning(401, EXIT_AUTH, "The site is not enrolled here."),
    "not_in_round": Meaning(403, EXIT_AUTH, "The site is enrolled, but not for a round of this model."),
    "quarantined": Meaning(403, EXIT_AUTH, "The site's updates were refused too often; the operator can pardon it."),
    "certificate_needed": Meaning(403, EXIT_AUTH, "The certificate of the node that asks is needed here."),
    "unknown_path": Meaning(404, EXIT_NOT_FOUND, "Nothing is served at this path."),
    "unknown_model": Meaning(404, EXIT_NOT_FOUND, "There is no such model."),
    "unknown_revision": Meaning(404, EXIT_NOT_FOUND, "The model has no such ref or revision."),
    "unknown_task": Meaning(404, EXIT_NOT_FOUND, "The model has no such task at this revision."),
    "unknown_file": Meaning(404, EXIT_NOT_FOUND, "The model has no such file at this revision."),
    "unknown_blob": Meaning(404, EXIT_NOT_FOUND, "There is no such shard."),
    "unknown_node": Meaning(404, EXIT_NOT_FOUND, "There is no such node."),
    "unknown_metadata": Meaning(404, EXIT_NOT_FOUND, "There is no such metadata."),
    "unknown_role": Meaning(404, EXIT_NOT_FOUND, "Nobody is delegated to sign this."),
    "unknown_upload": Meaning(404, EXIT_NOT_FOUND, "There is no such upload; send the statement again."),
    "no_round": Meaning(404, EXIT_NOT_FOUND, "The model has no such round."),
    "method_not_allowed": Meaning(405, EXIT_USAGE, "The method is not allowed here; see Allow."),
    "not_acceptable": Meaning(406, EXIT_USAGE, "No representation matches Accept."),
    "timed_out": Meaning(408, EXIT_NETWORK, "The request was not received in time."),
    "stale_heartbeat": Meaning(409, EXIT_USAGE, "A later heartbeat of the node was heard already."),
    "unknown_codec": Meaning(422, EXIT_USAGE, "The codec of an update is not known, or not accepted here."),
    "ref_conflict": Meaning(409, EXIT_USAGE, "Somebody else has moved this ref meanwhile."),
    "stale_metadata": Meaning(409, EXIT_USAGE, "Somebody else has signed meanwhile; sign again on top of that."),
    "other_visibility": Meaning(409, EXIT_USAGE, "The model is public where it should be private, or the other way."),
    "stale_round": Meaning(409, EXIT_USAGE, "The round is closed, or upon another revision; ask which one is open."),
    "other_update": Meaning(409, EXIT_USAGE, "The site has another update in this round."),
    "wrong_offset": Meaning(409, EXIT_USAGE, "The upload goes on at the offset that is given here."),
    "round_open": Meaning(409, EXIT_USAGE, "The model has a round that has not ended."),
    "round_state": Meaning(409, EXIT_USAGE, "The round is not in a state for this."),
    "too_few_sites": Meaning(409, EXIT_USAGE, "There are fewer updates than the rule of the round needs."),
    "precondition_failed": Meaning(412, EXIT_USAGE, "If-Match names another version."),
    "too_large": Meaning(413, EXIT_USAGE, "The body is larger than is allowed here."),
    "unsupported_type": Meaning(415, EXIT_USAGE, "The body's type or encoding is not accepted here."),
    "range_not_satisfiable": Meaning(416, EXIT_USAGE, "The byte range cannot be satisfied."),
    "expectation_failed": Meaning(417, EXIT_USAGE, "The expectation cannot be met."),
    "bad_update": Meaning(422, EXIT_USAGE, "The statement or the update is not acceptable."),
    "schema_mismatch": Meaning(422, EXIT_USAGE, "The update's tensors are not those of the round."),
    "non_finite": Meaning(422, EXIT_USAGE, "The update has a value that is not finite."),
    "norm_exceeded": Meaning(422, EXIT_USAGE, "The update is far larger than those of other sites."),
    "slow_down": Meaning(429, EXIT_NETWORK, "Too many statements of one site; come back in a moment."),
    "try_again": Meaning(429, EXIT_NETWORK, "This cannot be had right now; come back in a moment."),
    "http_version": Meaning(505, EXIT_USAGE, "Only HTTP/1.0 and HTTP/1.1 are spoken here."),
    # a source's mistake
    "upstream_error": Meaning(502, EXIT_NETWORK, "No source could answer."),
    "upstream_missing": Meaning(502, EXIT_NETWORK, "A listed shard is missing at every source."),
    "integrity_error": Meaning(502, EXIT_INTEGRITY, "A source sent bytes that do not match their digest."),
    "signature_invalid": Meaning(502, EXIT_INTEGRITY, "Signed metadata has a signature that is not valid, or none."),
    "threshold_not_met": Meaning(502, EXIT_INTEGRITY, "Signed metadata has fewer good signatures than it needs."),
    "unknown_key": Meaning(502, EXIT_INTEGRITY, "Signed metadata is signed by a key that may not sign it."),
    "key_revoked": Meaning(502, EXIT_INTEGRITY, "Signed metadata is signed by a key that may sign it no longer."),
    "rollback_detected": Meaning(502, EXIT_INTEGRITY, "Signed metadata is older than what was known already."),
    "equivocation_detected": Meaning(502, EXIT_INTEGRITY, "Two different metadata were signed as the same version."),
    "mixed_metadata": Meaning(502, EXIT_INTEGRITY, "Signed metadata is put together from different states."),
    "metadata_expired": Meaning(502, EXIT_INTEGRITY, "The signed metadata has expired, and nobody has newer."),
    "clock_skew": Meaning(502, EXIT_INTEGRITY, "A clock is wrong, so what is signed with a time cannot be judged."),
    "metadata_invalid": Meaning(502, EXIT_INTEGRITY, "Signed metadata breaks its own rules."),
    "metadata_too_large": Meaning(502, EXIT_INTEGRITY, "Signed metadata is larger than is allowed."),
    "bad_certificate": Meaning(502, EXIT_NETWORK, "A source's certificate, or the one shown to it, is not accepted."),
    "mirroring": Meaning(503, EXIT_NETWORK, "The model is being fetched from another hub; come back in a moment."),
    "upstream_timeout": Meaning(504, EXIT_NETWORK, "No source answered in time."),
    "not_cached": Meaning(504, EXIT_NETWORK, "This node does not hold it, and was not to fetch it."),
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
    "model_signature_invalid": Meaning(422, EXIT_INTEGRITY, "The model is not signed as it would be published."),
    "bad_tasks": Meaning(422, EXIT_USAGE, "The tasks file is not valid."),
    "no_metadata": Meaning(503, EXIT_CONFIG, "There is no signed metadata yet."),
    "no_online_key": Meaning(503, EXIT_CONFIG, "The origin has no key to sign with."),
    "bad_config": Meaning(500, EXIT_CONFIG, "The settings are not valid."),
    "disk": Meaning(507, EXIT_DISK, "The disk refused to store this."),
    "disk_full": Meaning(507, EXIT_DISK, "There is not enough room on the disk for this."),
    "store_denied": Meaning(502, EXIT_AUTH, "The object store refuses these credentials."),
    "store_timeout": Meaning(504, EXIT_NETWORK, "The object store did not answer in time."),
    "store_failed": Meaning(502, EXIT_NETWORK, "The object store failed, or could not be reached."),
    "in_use": Meaning(409, EXIT_USAGE, "Another process is using this."),
    "missing_package": Meaning(500, EXIT_CONFIG, "A Python package that this needs is not installed."),
    "unknown_dtype": Meaning(422, EXIT_USAGE, "A tensor has a type that this library has no array for."),
    "exists": Meaning(409, EXIT_USAGE, "The target is there already."),
    "needs_root": Meaning(403, EXIT_USAGE, "Only root may change this machine."),
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


class NonFinite(RequestError):
    """Values that are NaN or infinite, or would be where they are decoded."""

    code = "non_finite"


class MetadataInvalid(RequestError):
    """Signed metadata that is malformed, or not signed by whom it must be."""

    code = "bad_metadata"


class Conflict(RequestError):
    """Somebody else was first; the code says whether signing again helps."""

    code = "stale_metadata"


class SiteClock(RequestError):
    """A statement of a site whose clock, or this one's, is wrong. The code is that of ``ClockSkew``; here it is the
    request that is not taken, so the status is another."""

    code = "clock_skew"

    def __init__(self, message: str = "", *, public: Mapping[str, object] | None = None) -> None:
        super().__init__(message, public=public)
        self.meaning = self.meaning._replace(status=401, exit_code=EXIT_AUTH)


class SchemaMismatch(RequestError):
    """An update whose tensors have other names, types or shapes than the round's."""

    code = "schema_mismatch"


class UpstreamError(NearshardError):
    """A source could not answer, or answered wrongly: another one may do better."""

    code = "upstream_error"


class Mirroring(UpstreamError):
    """Not here yet: an origin is fetching it from the hub that it mirrors."""

    code = "mirroring"

    def __init__(self, message: str = "", *, done: int, total: int, retry_after: int = 1) -> None:
        """``done`` of ``total`` bytes are here. ``retry_after``: seconds until it is worth asking again."""
        self.done, self.total, self.retry_after = done, total, retry_after
        public = {"done": done, "total": total}
        super().__init__(message, public=public, headers={"Retry-After": str(retry_after)})


class IntegrityError(UpstreamError):
    """Bytes that do not match the digest they were asked for."""

    code = "integrity_error"


class TrustError(UpstreamError):
    """Metadata that is not to be believed; what was believed before goes on counting."""

    code = "metadata_invalid"


class SignatureInvalid(TrustError):
    """No signature, or one that does not fit what is signed."""

    code = "signature_invalid"


class ThresholdNotMet(TrustError):
    """Good signatures, but by fewer keys than are needed."""

    code = "threshold_not_met"


class UnknownKey(TrustError):
    """Signed by nobody who may."""

    code = "unknown_key"


class KeyRevoked(TrustError):
    """Signed by who once was allowed to, and is no longer."""

    code = "key_revoked"


class RollbackDetected(TrustError):
    """A lower version than was seen already."""

    code = "rollback_detected"


class EquivocationDetected(TrustError):
    """Good signatures on other content than was seen of the same version."""

    code = "equivocation_detected"


class MixedMetadata(TrustError):
    """Good signatures on files that do not belong together."""

    code = "mixed_metadata"


class MetadataExpired(TrustError):
    """Past its expiry: whoever sent it may be holding back what is new."""

    code = "metadata_expired"

    def __init__(self, message: str = "", *, expires: float = 0.0) -> None:
        """``expires``: when it did, in seconds since 1970; 0 where there is nothing."""
        self.expires = expires
        super().__init__(message)


class ClockSkew(TrustError):
    """Not to be judged, because this machine's clock is wrong; the message says by how much."""

    code = "clock_skew"


class MetadataTooLarge(TrustError):
    """Metadata over its limit; reading stopped there."""

    code = "metadata_too_large"


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


class MissingPackage(LocalError):
    """A package that is needed for what was asked, and is not installed."""

    code = "missing_package"


class DiskError(LocalError):
    """The disk refused: full, read-only or failing."""

    code = "disk"


class DiskFull(DiskError):
    """Not enough room; where that is known before the first byte, the message names both numbers."""

    code = "disk_full"


class StoreError(LocalError):
    """The object store behind an origin refused or failed; the code says which."""

    code = "store_failed"


class PublishError(LocalError):
    """A model directory that cannot be published; the message names the file."""

    code = "refused_file"


class ModelSignatureInvalid(PublishError):
    """A model directory whose signature is missing, by another key, or not of the files that are there."""

    code = "model_signature_invalid"


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
