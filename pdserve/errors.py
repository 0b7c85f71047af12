"""Every error that a user or a peer can meet.

    PdserveError
    +- RequestError            the caller's fault: never retry unchanged
    |  +- InvalidRequest       400  INVALID_ARGUMENT     a field is wrong; `param` names it
    |  +- ContextLengthExceeded 400 INVALID_ARGUMENT     prompt (and max_tokens) do not fit the model
    |  +- PayloadTooLarge      413  RESOURCE_EXHAUSTED   body or message over the limit
    |  +- ModelNotFound        404  NOT_FOUND            no such model here
    |  +- NotFound             404  NOT_FOUND            no such path or object
    |  +- MethodNotAllowed     405  UNIMPLEMENTED        the path exists, the method does not
    |  +- NotSupported         400  UNIMPLEMENTED        known, and refused on purpose
    |  +- RequestCancelled     499  CANCELLED            the caller went away or cancelled
    +- ServiceError            ours: `retryable` says whether the same request may be sent again
    |  +- Overloaded           429  RESOURCE_EXHAUSTED   no room; `retry_after_s`
    |  +- QuotaExceeded        429  RESOURCE_EXHAUSTED   a tenant's share of the KV store is used up
    |  +- NoWorker             503  UNAVAILABLE          no worker of the needed role
    |  +- Draining             503  UNAVAILABLE          this process is going away
    |  +- WorkerLost           503  UNAVAILABLE          a worker died with the request on it
    |  +- DeadlineExceeded     504  DEADLINE_EXCEEDED    a leg ran out of its time
    |  +- EngineFailed         500  INTERNAL             the engine raised
    |  +- DiskError            503  UNAVAILABLE          the store's disk tier could not: recompute
    |     +- DiskBlockCorrupt  503  DATA_LOSS            a record on disk is not what was written; it was dropped
    |     +- DiskFull          503  RESOURCE_EXHAUSTED   no room on the disk; `retry_after_s`
    |     +- DiskReadOnly      503  FAILED_PRECONDITION  the disk takes no writes; `retry_after_s`
    +- HandoverError           the KV did not arrive; fails closed, retryable
    |  +- TicketRefused        503  FAILED_PRECONDITION  unknown, expired or foreign ticket
    |  +- FingerprintMismatch  503  FAILED_PRECONDITION  layouts differ
    |  +- StaleBlock           503  ABORTED              a block was reused before or during the read
    |  +- DigestMismatch       503  DATA_LOSS            bytes differ from those exported
    |  +- PeerLost             503  UNAVAILABLE          the peer died or closed mid-transfer
    |  +- TransferTimeout      503  DEADLINE_EXCEEDED    no progress within the bound
    +- ProtocolMismatch        503  FAILED_PRECONDITION  no common protocol version
    +- ConfigError             a config key is unknown or wrong; `key` names it (processes only, never a reply)

`reason` is the machine-readable name (gRPC `ErrorInfo.reason`, OpenAI `code`), `leg` tells where it happened,
`work_done` whether tokens were produced. `to_fields` / `from_fields` carry an error across the wire unchanged.
"""

from __future__ import annotations

from typing import ClassVar


class PdserveError(Exception):
    """Base of all; not raised itself."""

    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"
    """Name of the `grpc.StatusCode`; a name, so that this module needs no grpc."""
    reason: ClassVar[str] = "internal_error"
    openai_type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        leg: str | None = None,
        work_done: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.leg = leg
        self.work_done = work_done
        self.retry_after_s = retry_after_s

    def to_fields(self) -> dict[str, str]:
        """Flat strings for the wire and for gRPC `ErrorInfo.metadata`."""
        fields = {"reason": self.reason, "message": self.message, "retryable": str(self.retryable).lower()}
        if self.param is not None:
            fields["param"] = self.param
        if self.leg is not None:
            fields["leg"] = self.leg
        if self.work_done:
            fields["work_done"] = "true"
        if self.retry_after_s is not None:
            fields["retry_after_s"] = f"{self.retry_after_s:.3f}"
        return fields


class RequestError(PdserveError):
    """The caller's fault."""

    http_status = 400
    grpc_code = "INVALID_ARGUMENT"
    reason = "bad_request"
    openai_type = "invalid_request_error"


class InvalidRequest(RequestError):
    """A field is missing, unknown, of the wrong type or out of range."""

    reason = "invalid_value"


class ContextLengthExceeded(RequestError):
    """Prompt, or prompt and max_tokens, exceed what the model takes."""

    reason = "context_length_exceeded"


class PayloadTooLarge(RequestError):
    """The body or message is over the limit."""

    http_status = 413
    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "payload_too_large"


class ModelNotFound(RequestError):
    """No worker serves a model of that name."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    reason = "model_not_found"


class NotFound(RequestError):
    """No such path or object."""

    http_status = 404
    grpc_code = "NOT_FOUND"
    reason = "not_found"


class MethodNotAllowed(RequestError):
    """The path exists, the method does not."""

    http_status = 405
    grpc_code = "UNIMPLEMENTED"
    reason = "method_not_allowed"


class NotSupported(RequestError):
    """Known to us and refused on purpose."""

    grpc_code = "UNIMPLEMENTED"
    reason = "not_supported"


class RequestCancelled(RequestError):
    """The caller cancelled or went away."""

    http_status = 499
    grpc_code = "CANCELLED"
    reason = "cancelled"


class ServiceError(PdserveError):
    """Our fault, or our lack of room."""

    http_status = 503
    grpc_code = "UNAVAILABLE"
    reason = "unavailable"


class Overloaded(ServiceError):
    """No room now; `retry_after_s` tells when there should be."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "overloaded"
    openai_type = "rate_limit_error"
    retryable = True


class QuotaExceeded(ServiceError):
    """A tenant may keep no more in the KV store now: what it has there is in use. Serving goes on without a copy."""

    http_status = 429
    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "quota_exceeded"
    openai_type = "rate_limit_error"
    retryable = True


class NoWorker(ServiceError):
    """No ready worker of the needed role."""

    reason = "no_worker"
    retryable = True


class Draining(ServiceError):
    """This process takes no new requests: it is going away."""

    reason = "draining"
    retryable = True


class WorkerLost(ServiceError):
    """A worker died, or its stream broke, with the request on it."""

    reason = "worker_lost"
    retryable = True


class DeadlineExceeded(ServiceError):
    """A leg ran out of its own time."""

    http_status = 504
    grpc_code = "DEADLINE_EXCEEDED"
    reason = "deadline_exceeded"
    retryable = True


class EngineFailed(ServiceError):
    """The engine raised while it ran this request."""

    http_status = 500
    grpc_code = "INTERNAL"
    reason = "engine_failed"


class DiskError(ServiceError):
    """The store's disk tier is off, or an input or output of it failed: the block is to be computed again."""

    reason = "disk_unavailable"
    retryable = True


class DiskBlockCorrupt(DiskError):
    """A record on disk is torn, or differs from what was written. It was dropped, and nothing of it was served."""

    grpc_code = "DATA_LOSS"
    reason = "disk_block_corrupt"


class DiskFull(DiskError):
    """The disk has no room, less than the tier was given; reads go on. `retry_after_s` tells when it tries again."""

    grpc_code = "RESOURCE_EXHAUSTED"
    reason = "disk_full"


class DiskReadOnly(DiskError):
    """The disk takes no writes; reads go on."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "disk_read_only"


class HandoverError(PdserveError):
    """The KV did not arrive whole and right; nothing of it was decoded."""

    http_status = 503
    grpc_code = "ABORTED"
    reason = "handover_failed"
    retryable = True

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        leg: str | None = "transfer",
        work_done: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, param=param, leg=leg, work_done=work_done, retry_after_s=retry_after_s)


class TicketRefused(HandoverError):
    """The exporter does not know the ticket, or it expired, or it was bound by another decode worker."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "ticket_refused"


class FingerprintMismatch(HandoverError):
    """The two workers' KV layouts differ."""

    grpc_code = "FAILED_PRECONDITION"
    reason = "fingerprint_mismatch"


class StaleBlock(HandoverError):
    """A block's generation changed before or during the read: it was reused."""

    reason = "stale_block"


class DigestMismatch(HandoverError):
    """The bytes read differ from the bytes exported."""

    grpc_code = "DATA_LOSS"
    reason = "digest_mismatch"


class PeerLost(HandoverError):
    """The peer died or closed the connection."""

    grpc_code = "UNAVAILABLE"
    reason = "peer_lost"


class TransferTimeout(HandoverError):
    """A transfer, or a step of its control path, made no progress within its bound."""

    grpc_code = "DEADLINE_EXCEEDED"
    reason = "transfer_timeout"


class ProtocolMismatch(PdserveError):
    """The peer speaks no protocol version that we speak."""

    http_status = 503
    grpc_code = "FAILED_PRECONDITION"
    reason = "protocol_mismatch"


class ConfigError(PdserveError):
    """A config key is unknown, missing or wrong. `key` is its dotted path."""

    reason = "config_error"

    def __init__(self, message: str, *, key: str) -> None:
        super().__init__(message, param=key)
        self.key = key


def _tree(cls: type[PdserveError]) -> dict[str, type[PdserveError]]:
    found = {cls.reason: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


def from_fields(fields: dict[str, str]) -> PdserveError:
    """The error that `to_fields` described. An unknown reason (a newer peer) becomes a `ServiceError`."""
    cls = _tree(PdserveError).get(fields.get("reason", ""), ServiceError)
    message = fields.get("message", "")
    if cls is ConfigError:
        return ConfigError(message, key=fields.get("param", ""))
    retry_after = fields.get("retry_after_s")
    return cls(
        message,
        param=fields.get("param"),
        leg=fields.get("leg"),
        work_done=fields.get("work_done") == "true",
        retry_after_s=float(retry_after) if retry_after else None,
    )
