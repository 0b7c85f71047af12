"""The one place where an error of ours becomes what an HTTP client sees: body and headers."""

from __future__ import annotations

import math

import msgspec

from pdserve.errors import PdserveError, RequestError
from router.http.responses import ErrorBody, ErrorDetail


def error_body(error: PdserveError) -> bytes:
    """OpenAI's error object, as JSON. `code` is the machine-readable reason, the same as over gRPC."""
    detail = ErrorDetail(message=error.message, type=error.openai_type, param=error.param, code=error.reason)
    return msgspec.json.encode(ErrorBody(error=detail))


def error_headers(error: PdserveError) -> list[tuple[str, str]]:
    """`x-should-retry` and `retry-after-ms` are what OpenAI's clients obey; `retry-after` is for everyone else."""
    if isinstance(error, RequestError):
        return [("x-should-retry", "false")]
    headers = [("x-should-retry", "true" if error.retryable else "false")]
    if error.retry_after_s is not None:
        headers.append(("retry-after", str(math.ceil(error.retry_after_s))))
        headers.append(("retry-after-ms", str(math.ceil(error.retry_after_s * 1000))))
    return headers
