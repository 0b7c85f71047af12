"""Which path does what. Everything is answered here at once, or handed to the core with a reply as its sink."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any
from urllib.parse import unquote

import msgspec
from msgspec.structs import replace

from pdserve.errors import InvalidRequest, MethodNotAllowed, ModelNotFound, NotFound, NotSupported, PdserveError
from pdserve.types import ModelInfo
from router.base import Core, Incoming
from router.http.exchange import Exchange
from router.http.limits import HttpLimits
from router.http.openapi import openapi_document
from router.http.parse import Call, RequestHead, parse_chat, parse_completion
from router.http.replies import Reply, StreamReply, WholeReply
from router.http.responses import ModelCard, ModelList
from router.http.shapes import ChatShape, Envelope, Shape, TextShape

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], None]

_TRACEPARENT = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_MODEL_PREFIX = "/v1/models/"
_RECORD_PREFIX = "/v1/requests/"
_MAX_SESSION_CHARS = 128
_MAX_TIMEOUT_MS = 2**31 - 1
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Routes:
    """The table of paths, over one core."""

    def __init__(self, core: Core, limits: HttpLimits, *, metrics: Callable[[], bytes], version: str) -> None:
        self._core = core
        self._limits = limits
        self._metrics = metrics
        self._version = version
        self._started_s = int(time.time())
        self._fingerprints: dict[str, str] = {}
        self._openapi = openapi_document(version)
        self._get: dict[str, Handler] = {
            "/v1/models": self._models,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._metrics_page,
            "/version": self._version_page,
            "/openapi.json": self._openapi_page,
        }
        self._post: dict[str, Handler] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completion,
            "/v1/embeddings": self._embeddings,
        }

    def dispatch(self, exchange: Exchange) -> None:
        """Answer, now or later. A fault of ours costs this request a 500, and no other anything."""
        try:
            self._handler(exchange)(exchange)
        except Exception as error:  # noqa: BLE001 - the client gets what it may know of it
            self._answer_fault(exchange, error)

    def _handler(self, exchange: Exchange) -> Handler:
        path, method = exchange.path, exchange.method
        handler = self._post.get(path)
        if handler is not None:
            return handler if method == "POST" else partial(_refuse_method, allow="POST")
        handler = self._get.get(path)
        if handler is None and path.startswith(_MODEL_PREFIX):
            handler = self._model
        if handler is None and path.startswith(_RECORD_PREFIX):
            handler = self._record
        if handler is None:
            raise NotFound(f"There is no {path[:200]} here")
        return handler if method in ("GET", "HEAD") else partial(_refuse_method, allow="GET, HEAD")

    # generation

    def _chat(self, exchange: Exchange) -> None:
        call = parse_chat(exchange.body, self._request_head(exchange))
        self._generate(exchange, call, ChatShape(self._envelope(call, "chatcmpl-")))

    def _completion(self, exchange: Exchange) -> None:
        call = parse_completion(exchange.body, self._request_head(exchange), self._limits.max_prompts)
        self._generate(exchange, call, TextShape(self._envelope(call, "cmpl-")))

    def _generate(self, exchange: Exchange, call: Call, shape: Shape) -> None:
        exchange.body = b""
        later = [self._core.prepare(incoming) for incoming in call.prompts]
        if later.count(None) == len(later):
            self._begin(exchange, call, shape)
        else:
            exchange.responder = _Preparing(exchange, self._prepare(exchange, call, shape, later))

    async def _prepare(
        self, exchange: Exchange, call: Call, shape: Shape, later: list[asyncio.Future[Incoming] | None]
    ) -> None:
        """Long prompts are tokenised off the loop; then all goes on as usual."""
        try:
            prompts = [now if soon is None else await soon for now, soon in zip(call.prompts, later, strict=True)]
            self._begin(exchange, replace(call, prompts=tuple(prompts)), shape)
        except Exception as error:  # noqa: BLE001 - answered as one from `dispatch` is
            self._answer_fault(exchange, error)

    def _answer_fault(self, exchange: Exchange, error: Exception) -> None:
        if not isinstance(error, PdserveError):
            log.error("request %s failed inside the HTTP face", exchange.request_id, exc_info=error)
            error = PdserveError("Internal error; the server's log has it under this request's id")
        exchange.reply_error(error)

    def _begin(self, exchange: Exchange, call: Call, shape: Shape) -> None:
        kind = StreamReply if call.stream else WholeReply
        reply = kind(exchange, shape, len(call.prompts), call.params.n)
        try:
            self._submit(reply, call)
        except BaseException:
            reply.cancel()
            raise
        exchange.responder = reply

    def _submit(self, reply: Reply, call: Call) -> None:
        for position, incoming in enumerate(call.prompts):
            reply.attach(self._core.submit(incoming, reply.sink(position)))

    def _request_head(self, exchange: Exchange) -> RequestHead:
        traceparent = exchange.header(b"traceparent")
        return RequestHead(
            exchange.request_id,
            _timeout_ms(exchange.header(b"x-request-timeout-ms")),
            traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else "",
            exchange.header(b"x-session-id")[:_MAX_SESSION_CHARS],
        )

    def _envelope(self, call: Call, prefix: str) -> Envelope:
        return Envelope(
            id=prefix + call.request_id,
            created=int(time.time()),
            model=call.model,
            system_fingerprint=self._fingerprint(call.model),
            token_text=partial(self._core.token_text, call.model),
            with_logprobs=call.params.logprobs is not None,
            with_token_ids=call.return_token_ids,
            with_usage=call.include_usage,
        )

    def _fingerprint(self, model: str) -> str:
        """Changes when the model's revision or our release does: then equal seeds may give other tokens."""
        revision = ""
        for info in self._core.models():
            if info.name == model:
                revision = info.revision
                break
        known = self._fingerprints.get(revision)
        if known is None:
            digest = hashlib.sha256(f"{self._version}\n{revision}".encode()).hexdigest()
            known = self._fingerprints[revision] = f"fp_{digest[:10]}"
        return known

    def _embeddings(self, exchange: Exchange) -> None:
        raise NotSupported("Embeddings are not served: pdserve generates text only")

    # models

    def _models(self, exchange: Exchange) -> None:
        cards = [self._card(info) for info in self._core.models()]
        exchange.reply(200, msgspec.json.encode(ModelList(data=cards)))

    def _model(self, exchange: Exchange) -> None:
        name = unquote(exchange.path.removeprefix(_MODEL_PREFIX))
        for info in self._core.models():
            if info.name == name:
                exchange.reply(200, msgspec.json.encode(self._card(info)))
                return
        raise ModelNotFound(f"The model {name[:200]!r} is not served here; GET /v1/models lists those that are")

    def _card(self, info: ModelInfo) -> ModelCard:
        return ModelCard(id=info.name, created=self._started_s, max_model_len=info.max_model_len)

    def _record(self, exchange: Exchange) -> None:
        request_id = unquote(exchange.path.removeprefix(_RECORD_PREFIX))
        record = self._core.record(request_id)
        if record is None:
            raise NotFound(f"No record of the request {request_id[:200]!r}: it never came here, or was long ago")
        exchange.reply(200, msgspec.json.encode(record))

    # operations

    def _healthz(self, exchange: Exchange) -> None:
        exchange.reply(200, b'{"status":"ok"}')

    def _readyz(self, exchange: Exchange) -> None:
        reason = "draining" if exchange.wire.closing else self._core.ready()
        status = {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
        exchange.reply(200 if reason is None else 503, msgspec.json.encode(status))

    def _metrics_page(self, exchange: Exchange) -> None:
        exchange.reply(200, self._metrics(), _METRICS_TYPE)

    def _version_page(self, exchange: Exchange) -> None:
        exchange.reply(200, msgspec.json.encode({"version": self._version}))

    def _openapi_page(self, exchange: Exchange) -> None:
        exchange.reply(200, self._openapi)


class _Preparing:
    """A `Responder` while long prompts are tokenised."""

    def __init__(self, exchange: Exchange, work: Coroutine[Any, Any, None]) -> None:
        self._exchange = exchange
        self._task = asyncio.get_running_loop().create_task(work)

    def cancel(self) -> None:
        self._task.cancel()

    def fail(self, error: PdserveError) -> None:
        self._task.cancel()
        self._exchange.reply_error(error)


def _refuse_method(exchange: Exchange, allow: str) -> None:
    error = MethodNotAllowed(f"{exchange.path} takes {allow}, not {exchange.method}")
    exchange.reply_error(error, headers=[("allow", allow)])


def _timeout_ms(text: str) -> int:
    """Of the header x-request-timeout-ms; 0: none."""
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and 0 < int(text[:12]) <= _MAX_TIMEOUT_MS):
        raise InvalidRequest("x-request-timeout-ms must be a number of milliseconds", param="x-request-timeout-ms")
    return int(text)
