"""The stream between a router and a worker: one message a step, columns passed through.

Hot path: a worker encodes and a router decodes one `Step` for each engine step, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from msgspec import Struct, field

from pdserve.errors import EngineFailed, InvalidRequest, PdserveError, ProtocolMismatch
from pdserve.types import (
    CacheDelta,
    EngineLoad,
    Finish,
    FinishReason,
    Logprobs,
    Phase,
    PromptStats,
    Request,
    StepOutput,
    WorkerInfo,
)
from pdserve.v1 import worker_service_pb2 as pb
from pdserve.wire import PROTOCOL_MAX, PROTOCOL_MIN, Method
from pdserve.wire.columns import pack_f32, pack_u32, unpack_f32, unpack_u32
from pdserve.wire.common import (
    decode_error,
    decode_model,
    decode_params,
    decode_rank,
    decode_role,
    encode_error,
    encode_model,
    encode_params,
    encode_rank,
    encode_role,
)

KEY_BYTES = 16
"""Of a block key."""
_PHASES = {phase: pb.Submission(phase=int(phase)).phase for phase in Phase}  # type: ignore[arg-type]
_RARE = ("lora", "deterministic", "timeout_ms", "priority", "traceparent")
"""Fields of a request that mostly have their defaults, which are the wire's."""
_REASONS = {reason: pb.Finish(reason=int(reason)).reason for reason in FinishReason}  # type: ignore[arg-type]
_REASONS_BACK = {int(reason): reason for reason in FinishReason}


@dataclass(frozen=True, slots=True)
class RouterHello:
    router_id: str
    incarnation: int
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX


@dataclass(frozen=True, slots=True)
class WorkerHello:
    worker: WorkerInfo
    protocol_min: int = PROTOCOL_MIN
    protocol_max: int = PROTOCOL_MAX


class Submission(Struct, frozen=True):
    """`error` is set instead of a usable request when it could not be read: the worker answers it by name."""

    handle: int
    phase: Phase
    request: Request | None
    error: PdserveError | None = None
    prefix_store: str = ""
    """host:port of another node's store that, as far as the router knows, holds more of this prompt's prefix than the
    worker's own node."""


class FirstOutput(Struct, frozen=True):
    """What prefill sampled for one choice."""

    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Relay:
    """Prefill's announcements on their way to decode. Ticket and manifests are `pdserve.wire.handover`'s bytes."""

    handle: int
    ticket: bytes = b""
    manifests: tuple[bytes, ...] = ()
    outputs: tuple[FirstOutput, ...] = ()


class Announcement(Struct, frozen=True):
    """Exported chunks of a request, from the worker that prefills it."""

    handle: int
    ticket: bytes
    manifests: tuple[bytes, ...]


class RouterUpdate(Struct):
    """What a router tells a worker in one loop tick."""

    hello: RouterHello | None = None
    submissions: list[Submission] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    choice_cancels: list[int] = field(default_factory=list)
    relays: list[Relay] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.submissions or self.cancels or self.choice_cancels or self.relays or self.hello)


class StepColumns(Struct):
    """A step as the router reads it: see `pdserve.types.StepOutput`; `counts` empty means all are 1."""

    handles: Sequence[int]
    first_indexes: Sequence[int]
    counts: Sequence[int]
    token_ids: Sequence[int]
    finishes: list[Finish] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    prompts: list[PromptStats] = field(default_factory=list)
    announcements: list[Announcement] = field(default_factory=list)


class WorkerUpdate(Struct):
    """What a worker tells a router: a step, or what has changed beside."""

    hello: WorkerHello | None = None
    step: StepColumns | None = None
    load: EngineLoad | None = None
    draining: bool = False
    cache: CacheDelta | None = None


def encode_router_update(update: RouterUpdate) -> bytes:
    message = pb.RouterMessage()
    if update.cancels:
        message.cancels = pack_u32(update.cancels)
    if update.choice_cancels:
        message.choice_cancels = pack_u32(update.choice_cancels)
    if update.hello is not None:
        message.hello.protocol_min = update.hello.protocol_min
        message.hello.protocol_max = update.hello.protocol_max
        message.hello.router_id = update.hello.router_id
        message.hello.incarnation = update.hello.incarnation
    for submission in update.submissions:
        _encode_submission(submission, message.submissions.add())
    for relay in update.relays:
        message.relays.append(_encode_relay(relay))
    return message.SerializeToString()


def decode_router_update(data: bytes) -> RouterUpdate:
    message = pb.RouterMessage.FromString(data)
    hello = None
    if message.HasField("hello"):
        received = message.hello
        hello = RouterHello(received.router_id, received.incarnation, received.protocol_min, received.protocol_max)
    return RouterUpdate(
        hello=hello,
        submissions=[_decode_submission(submission) for submission in message.submissions],
        cancels=list(unpack_u32(message.cancels)),
        choice_cancels=list(unpack_u32(message.choice_cancels)),
        relays=[_decode_relay(relay) for relay in message.relays],
    )


def _encode_submission(submission: Submission, message: pb.Submission) -> None:
    """Only what differs from the defaults is written: hot path, once a request and leg."""
    request = submission.request
    if request is None:
        raise ValueError("a submission without a request cannot be sent")
    message.handle = submission.handle
    message.request_id = request.request_id
    message.phase = _PHASES[submission.phase]
    message.model = request.model
    message.prompt_token_ids = pack_u32(request.prompt_token_ids)
    encode_params(request.params, message.params)
    message.cache_root = request.cache_root
    message.block_keys = request.block_keys
    for ids in request.output_token_ids:
        message.output_token_ids.add(token_ids=pack_u32(ids))
    for name in _RARE:
        if value := getattr(request, name):
            setattr(message, name, value)
    if submission.prefix_store:
        message.prefix_store = submission.prefix_store


def _decode_submission(message: pb.Submission) -> Submission:
    """A submission that cannot be read becomes one with an error: it must not cost the stream its other requests."""
    try:
        phase = Phase(message.phase)
    except ValueError:
        error = InvalidRequest(f"unknown phase {message.phase}", param="phase")
        return Submission(message.handle, Phase.FULL, None, error)
    try:
        return Submission(message.handle, phase, _decode_request(message), prefix_store=message.prefix_store)
    except PdserveError as error:
        return Submission(message.handle, phase, None, error)


def _decode_request(message: pb.Submission) -> Request:
    return Request(
        request_id=message.request_id,
        model=message.model,
        prompt_token_ids=tuple(unpack_u32(message.prompt_token_ids)),
        params=decode_params(message.params),
        lora=message.lora,
        cache_root=message.cache_root,
        block_keys=message.block_keys,
        output_token_ids=tuple(tuple(unpack_u32(ids.token_ids)) for ids in message.output_token_ids),
        deterministic=message.deterministic,
        timeout_ms=message.timeout_ms,
        priority=message.priority,
        traceparent=message.traceparent,
    )


def _encode_relay(relay: Relay) -> pb.Relay:
    return pb.Relay(
        handle=relay.handle,
        ticket=relay.ticket,
        manifests=relay.manifests,
        outputs=[pb.FirstOutput(token_ids=pack_u32(o.token_ids), finished=o.finished) for o in relay.outputs],
    )


def _decode_relay(message: pb.Relay) -> Relay:
    outputs = tuple(FirstOutput(tuple(unpack_u32(o.token_ids)), o.finished) for o in message.outputs)
    return Relay(message.handle, message.ticket, tuple(message.manifests), outputs)


def encode_worker_update(update: WorkerUpdate) -> bytes:
    """For a worker's Hello, load and draining; steps go by `encode_step`."""
    message = pb.WorkerMessage(draining=update.draining)
    if update.hello is not None:
        message.hello.CopyFrom(_encode_hello(update.hello))
    if update.load is not None:
        message.load.CopyFrom(_encode_load(update.load))
    if update.step is not None:
        message.step.CopyFrom(_encode_columns(update.step))
    if update.cache is not None:
        message.cache.reset = update.cache.reset
        message.cache.stored = b"".join(update.cache.stored)
        message.cache.removed = b"".join(update.cache.removed)
    return message.SerializeToString()


def step_columns(output: StepOutput, announcements: Iterable[Announcement] = ()) -> StepColumns:
    """An engine's step as columns; `counts` is left out where every entry has one token."""
    single = all(count == 1 for count in output.counts)
    return StepColumns(
        handles=output.handles,
        first_indexes=output.first_indexes,
        counts=() if single else output.counts,
        token_ids=output.token_ids,
        finishes=output.finishes,
        logprobs=output.logprobs,
        prompts=output.prompts,
        announcements=list(announcements),
    )


def _encode_columns(step: StepColumns) -> pb.Step:
    return pb.Step(
        handles=pack_u32(step.handles),
        first_indexes=pack_u32(step.first_indexes),
        counts=pack_u32(step.counts),
        token_ids=pack_u32(step.token_ids),
        finishes=[_encode_finish(finish) for finish in step.finishes],
        logprobs=[_encode_logprobs(entry) for entry in step.logprobs],
        prompts=[
            pb.PromptStats(
                handle=p.handle,
                num_prompt_tokens=p.num_prompt_tokens,
                num_cached_tokens=p.num_cached_tokens,
                num_fetched_tokens=p.num_fetched_tokens,
            )
            for p in step.prompts
        ],
        announcements=[
            pb.Announcement(handle=a.handle, ticket=a.ticket, manifests=a.manifests) for a in step.announcements
        ],
    )


def _encode_finish(finish: Finish) -> pb.Finish:
    message = pb.Finish(
        handle=finish.handle,
        reason=_REASONS[finish.reason],
        num_output_tokens=finish.num_output_tokens,
        stop_token_id=finish.stop_token_id,
    )
    if finish.error is not None:
        error = finish.error
        if not isinstance(error, PdserveError):
            error = EngineFailed(f"{type(error).__name__}: {error}")
        message.error.CopyFrom(encode_error(error))
    return message


def _encode_logprobs(entry: Logprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        handle=entry.handle,
        index=entry.index,
        logprob=entry.logprob,
        rank=entry.rank,
        top_ids=pack_u32(entry.top_ids),
        top_logprobs=pack_f32(entry.top_logprobs),
    )


def decode_worker_update(data: bytes) -> WorkerUpdate:
    """Raises `ProtocolMismatch` when a step's columns differ in length."""
    message = pb.WorkerMessage.FromString(data)
    return WorkerUpdate(
        hello=_decode_hello(message.hello) if message.HasField("hello") else None,
        step=_decode_step(message.step) if message.HasField("step") else None,
        load=_decode_load(message.load) if message.HasField("load") else None,
        draining=message.draining,
        cache=_decode_cache(message.cache) if message.HasField("cache") else None,
    )


def _decode_cache(message: pb.CacheDelta) -> CacheDelta:
    return CacheDelta(_keys(message.stored), _keys(message.removed), message.reset)


def _keys(column: bytes) -> tuple[bytes, ...]:
    if len(column) % KEY_BYTES:
        raise ProtocolMismatch(f"a column of {KEY_BYTES}-byte keys has {len(column)} bytes")
    return tuple(column[i : i + KEY_BYTES] for i in range(0, len(column), KEY_BYTES))


def _decode_step(message: pb.Step) -> StepColumns:
    handles = unpack_u32(message.handles)
    columns = StepColumns(
        handles,
        unpack_u32(message.first_indexes),
        unpack_u32(message.counts),
        unpack_u32(message.token_ids),
    )
    num_tokens = sum(columns.counts) if columns.counts else len(handles)
    if len(columns.first_indexes) != len(handles) or len(columns.token_ids) != num_tokens:
        raise ProtocolMismatch("a step's columns differ in length")
    if message.finishes:
        columns.finishes = [_decode_finish(finish) for finish in message.finishes]
    if message.logprobs:
        columns.logprobs = [_decode_logprobs(entry) for entry in message.logprobs]
    if message.prompts:
        columns.prompts = [
            PromptStats(p.handle, p.num_prompt_tokens, p.num_cached_tokens, p.num_fetched_tokens)
            for p in message.prompts
        ]
    if message.announcements:
        columns.announcements = [Announcement(a.handle, a.ticket, tuple(a.manifests)) for a in message.announcements]
    return columns


def _decode_finish(message: pb.Finish) -> Finish:
    return Finish(
        handle=message.handle,
        reason=_REASONS_BACK.get(message.reason) or FinishReason(message.reason),
        num_output_tokens=message.num_output_tokens,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error=decode_error(message.error) if message.HasField("error") else None,
    )


def _decode_logprobs(message: pb.TokenLogprobs) -> Logprobs:
    return Logprobs(
        handle=message.handle,
        index=message.index,
        logprob=message.logprob,
        rank=message.rank,
        top_ids=tuple(unpack_u32(message.top_ids)),
        top_logprobs=tuple(unpack_f32(message.top_logprobs)),
    )


def _encode_hello(hello: WorkerHello) -> pb.WorkerHello:
    worker = hello.worker
    return pb.WorkerHello(
        protocol_min=hello.protocol_min,
        protocol_max=hello.protocol_max,
        worker_id=worker.worker_id,
        incarnation=worker.incarnation,
        role=encode_role(worker.role),
        address=worker.address,
        model=encode_model(worker.model),
        fingerprint=worker.fingerprint,
        block_tokens=worker.block_tokens,
        num_blocks=worker.num_blocks,
        max_num_seqs=worker.max_num_seqs,
        rank=encode_rank(worker.rank),
        transports=worker.transports,
        host_id=worker.host_id,
        labels=dict(worker.labels),
        store_address=worker.store_address,
    )


def _decode_hello(message: pb.WorkerHello) -> WorkerHello:
    worker = WorkerInfo(
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        role=decode_role(message.role),
        address=message.address,
        model=decode_model(message.model),
        fingerprint=message.fingerprint,
        block_tokens=message.block_tokens,
        num_blocks=message.num_blocks,
        max_num_seqs=message.max_num_seqs,
        rank=decode_rank(message.rank),
        transports=tuple(message.transports),
        host_id=message.host_id,
        labels=tuple(sorted(message.labels.items())),
        store_address=message.store_address,
    )
    return WorkerHello(worker, message.protocol_min, message.protocol_max)


_LOAD_FIELDS = tuple(pb.Load.DESCRIPTOR.fields_by_name)


def _encode_load(load: EngineLoad) -> pb.Load:
    return pb.Load(**{name: getattr(load, name) for name in _LOAD_FIELDS})


def _decode_load(message: pb.Load) -> EngineLoad:
    return EngineLoad(**{name: getattr(message, name) for name in _LOAD_FIELDS})


SESSION: Method[RouterUpdate, WorkerUpdate] = Method(
    "/" + pb.DESCRIPTOR.services_by_name["WorkerService"].full_name + "/Session",
    True,
    True,
    encode_router_update,
    decode_router_update,
    encode_worker_update,
    decode_worker_update,
)
