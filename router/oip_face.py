"""Open Inference Protocol v2: `inference.GRPCInferenceService`, as KServe and Triton clients speak it.

A model has the inputs `text_input` (BYTES[1]) and `streaming` (BOOL[1]) and the outputs `text_output` and
`finish_reason`, one element a choice. On a stream each request is answered by a run of answers, of which the last has
the parameter `triton_final_response`; several requests may be under way on one stream, told apart by `id`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from pdserve.errors import InvalidRequest, ModelNotFound, PdserveError
from pdserve.rpc import RpcServer, ServerStream
from pdserve.types import FinishReason, ModelInfo
from pdserve.wire.oip import (
    MODEL_INFER,
    MODEL_METADATA,
    MODEL_READY,
    MODEL_STREAM_INFER,
    SERVER_LIVE,
    SERVER_METADATA,
    SERVER_READY,
    InferAnswer,
    InferCall,
    ModelCall,
    ModelMetadata,
    Parameter,
    ServerCall,
    ServerMetadata,
    StreamAnswer,
    Tensor,
    TensorSpec,
    UnreadableCall,
)
from router.base import Core, Usage, prepared
from router.grpc_sink import Batch, BatchSink, Delta
from router.oip_params import InferRequest, read_call

MAX_CONCURRENT = 256
"""Requests under way on one stream; beyond it the next is read when one has ended."""
FINAL = "triton_final_response"
_INPUTS = (
    TensorSpec("text_input", "BYTES", (1,)),
    TensorSpec("streaming", "BOOL", (1,)),
    TensorSpec("sampling_parameters", "BYTES", (1,)),
)
_OUTPUTS = (TensorSpec("text_output", "BYTES", (-1,)), TensorSpec("finish_reason", "BYTES", (-1,)))
_NAMES = {
    FinishReason.STOP: b"stop",
    FinishReason.LENGTH: b"length",
    FinishReason.CANCELLED: b"cancelled",
    FinishReason.ERROR: b"error",
}

_Stream = ServerStream[InferCall | UnreadableCall, StreamAnswer]


class OpenInferenceFace:
    """`version` is the platform's own, for server metadata."""

    def __init__(self, core: Core, max_unsent_bytes: int, version: str) -> None:
        self._core = core
        self._max_unsent_bytes = max_unsent_bytes
        self._version = version

    def add_to(self, server: RpcServer) -> None:
        server.add(SERVER_LIVE, self.server_live)
        server.add(SERVER_READY, self.server_ready)
        server.add(SERVER_METADATA, self.server_metadata)
        server.add(MODEL_READY, self.model_ready)
        server.add(MODEL_METADATA, self.model_metadata)
        server.add(MODEL_INFER, self.infer)
        server.add(MODEL_STREAM_INFER, self.stream_infer)

    # ---- the server and its models ----

    async def server_live(self, call: ServerCall) -> bool:
        return True

    async def server_ready(self, call: ServerCall) -> bool:
        return self._core.ready() is None

    async def server_metadata(self, call: ServerCall) -> ServerMetadata:
        return ServerMetadata("pdserve", self._version, ("model_stream_infer",))

    async def model_ready(self, call: ModelCall) -> bool:
        return self._find(call.name, call.version) is not None

    async def model_metadata(self, call: ModelCall) -> ModelMetadata:
        model = self._find(call.name, call.version)
        if model is None:
            raise ModelNotFound(f"no model {call.name!r} is ready here", param="name")
        return ModelMetadata(call.name, (model.revision,), "pdserve", _INPUTS, _OUTPUTS)

    def _find(self, name: str, version: str) -> ModelInfo | None:
        """A version is the model's revision; an empty one means the one that is served."""
        models = (model for model in self._core.models() if model.name == name)
        return next((model for model in models if version in ("", model.revision)), None)

    # ---- one answer ----

    async def infer(self, call: InferCall) -> InferAnswer:
        request = self._read(call)
        if request.stream:
            raise InvalidRequest("streaming needs ModelStreamInfer; ModelInfer answers once", param="streaming")
        sink = await self._submit(request, None)
        try:
            return _answer(call, await sink.rest(), final=False)
        finally:
            _cancel(sink)

    def _read(self, call: InferCall) -> InferRequest:
        if call.model_version and self._find(call.model_name, call.model_version) is None:
            raise ModelNotFound(
                f"no version {call.model_version!r} of {call.model_name!r} is ready here", param="model_version"
            )
        return read_call(call, timeout_ms=0)

    async def _submit(self, request: InferRequest, max_unsent_bytes: int | None) -> BatchSink:
        sink = BatchSink(max_unsent_bytes)
        incoming = await prepared(self._core, request.incoming)
        sink.handle = self._core.submit(incoming, sink)
        return sink

    # ---- a stream ----

    async def stream_infer(self, stream: _Stream) -> None:
        """Reads requests while earlier ones are answered. The stream's end, or its client's going, ends them all."""
        session = _StreamSession(stream)
        unreadable: PdserveError | None = None
        async with asyncio.TaskGroup() as tasks:
            try:
                while (call := await session.read()) is not None:
                    tasks.create_task(self._serve(session, call))
            except PdserveError as error:
                unreadable = error
        if unreadable is not None:
            raise unreadable

    async def _serve(self, session: _StreamSession, call: InferCall | UnreadableCall) -> None:
        """One request of a stream; its failure is its own."""
        try:
            if isinstance(call, UnreadableCall):
                raise call.error
            await self._run(session, call)
        except PdserveError as error:
            await session.write(_failure(call, error))
        finally:
            session.leave()

    async def _run(self, session: _StreamSession, call: InferCall) -> None:
        request = self._read(call)
        sink = await self._submit(request, self._max_unsent_bytes if request.stream else None)
        try:
            if request.stream:
                while (batch := await sink.next()) is not None:
                    await session.write(StreamAnswer(_answer(call, batch, final=batch.usage is not None)))
            else:
                await session.write(StreamAnswer(_answer(call, await sink.rest(), final=True)))
        finally:
            _cancel(sink)


class _StreamSession:
    """A stream with one writer at a time and a bound on the requests under way."""

    def __init__(self, stream: _Stream) -> None:
        self._stream = stream
        self._writing = asyncio.Lock()
        self._seats = asyncio.Semaphore(MAX_CONCURRENT)

    async def read(self) -> InferCall | UnreadableCall | None:
        await self._seats.acquire()
        return await self._stream.read()

    def leave(self) -> None:
        self._seats.release()

    async def write(self, answer: StreamAnswer) -> None:
        async with self._writing:
            await self._stream.write(answer)


def _cancel(sink: BatchSink) -> None:
    """Nothing happens if the request has ended."""
    if sink.handle is not None:
        sink.handle.cancel()


def _answer(call: InferCall, batch: Batch, *, final: bool) -> InferAnswer:
    deltas = [batch.deltas[index] for index in sorted(batch.deltas)]
    shape = (len(deltas),)
    parameters: dict[str, Parameter] = {FINAL: final} if final else {}
    if batch.usage is not None:
        parameters |= _usage(batch.usage)
    if any(delta.index for delta in deltas):
        parameters["choices"] = ",".join(str(delta.index) for delta in deltas)
    outputs = (
        Tensor("text_output", "BYTES", shape, tuple(delta.text.encode() for delta in deltas)),
        Tensor("finish_reason", "BYTES", shape, tuple(_finish(delta) for delta in deltas)),
    )
    return InferAnswer(call.model_name, outputs, call.model_version, call.id, parameters)


def _finish(delta: Delta) -> bytes:
    return b"" if delta.finish is None else _NAMES[delta.finish]


def _usage(usage: Usage) -> Mapping[str, Parameter]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
    }


def _failure(call: InferCall | UnreadableCall, error: PdserveError) -> StreamAnswer:
    """The error's fields are parameters, so that a client need not read the message."""
    name = "" if isinstance(call, UnreadableCall) else call.model_name
    parameters: dict[str, Parameter] = {FINAL: True, **error.to_fields()}
    return StreamAnswer(InferAnswer(name, (), id=call.id, parameters=parameters), f"{error.reason}: {error.message}")
