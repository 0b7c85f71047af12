"""Typed errors on gRPC's wire: an `ErrorInfo` in the status carries all fields of ours, so it arrives as it left."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status

from pdserve.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PdserveError,
    RequestCancelled,
    ServiceError,
    WorkerLost,
    from_fields,
)

ERROR_DOMAIN = "pdserve"
"""`google.rpc.ErrorInfo.domain` of every error of ours."""
DETAILS_KEY = "grpc-status-details-bin"
_UNTYPED: dict[grpc.StatusCode, type[PdserveError]] = {
    grpc.StatusCode.UNAVAILABLE: WorkerLost,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: RequestCancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
}


def error_status(error: PdserveError) -> Status:
    """`google.rpc.Status` with an `ErrorInfo` that carries `to_fields`."""
    detail = AnyMessage()
    detail.Pack(ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN, metadata=error.to_fields()))
    code: int = grpc.StatusCode[error.grpc_code].value[0]
    return Status(code=code, message=error.message, details=[detail])


def error_from_call(error: grpc.RpcError) -> PdserveError:
    """The typed error that a failed call of `grpc` means."""
    details = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), b"")
    return error_from_status(error.code(), error.details(), details)


def error_from_status(code: grpc.StatusCode, message: str, details: bytes) -> PdserveError:
    """The peer's own error where `details` (a `google.rpc.Status`, or nothing) holds one, else by status code."""
    try:
        found = Status.FromString(details).details
    except DecodeError:
        found = ()
    for detail in found:
        info = ErrorInfo()
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return from_fields(dict(info.metadata))
    cls = _UNTYPED.get(code, ServiceError)
    return cls(f"{code.name}: {message}")
