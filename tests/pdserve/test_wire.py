"""What goes over the wire comes back equal, what is malformed is refused, and a newer peer is understood."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.errors import DigestMismatch, InvalidRequest, PdserveError, ProtocolMismatch, ServiceError, from_fields
from pdserve.types import (
    CacheDelta,
    EngineLoad,
    Finish,
    FinishReason,
    Grammar,
    GrammarKind,
    KVManifest,
    KVTicket,
    Logprobs,
    ModelInfo,
    ParallelRank,
    Phase,
    PromptStats,
    Request,
    Role,
    SamplingParams,
    StepOutput,
    WorkerInfo,
)
from pdserve.v1 import common_pb2, kv_handover_service_pb2, worker_service_pb2
from pdserve.wire import PROTOCOL_MAX, PROTOCOL_MIN, common_version
from pdserve.wire.handover import decode_manifest, decode_ticket, encode_manifest, encode_ticket
from pdserve.wire.session import (
    Announcement,
    FirstOutput,
    Relay,
    RouterHello,
    RouterUpdate,
    Submission,
    WorkerHello,
    WorkerUpdate,
    decode_router_update,
    decode_worker_update,
    encode_router_update,
    encode_worker_update,
    step_columns,
)

u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
token_ids = st.lists(u32, max_size=5).map(tuple)
ranks = st.builds(
    ParallelRank, st.integers(0, 7), st.integers(1, 8), st.integers(0, 3), st.integers(1, 4), st.integers(0, 3)
)


def unit(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


params = st.builds(
    SamplingParams,
    n=st.integers(1, 4),
    temperature=unit(0, 2),
    top_p=unit(0.01, 1),
    top_k=st.integers(-1, 100),
    min_p=unit(0, 1),
    presence_penalty=unit(-2, 2),
    frequency_penalty=unit(-2, 2),
    repetition_penalty=unit(0.1, 10),
    logit_bias=st.dictionaries(u32, unit(-100, 100), max_size=3).map(lambda d: tuple(sorted(d.items()))),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3).map(tuple),
    stop_token_ids=token_ids,
    max_tokens=st.none() | st.integers(5, 100),
    min_tokens=st.integers(0, 5),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    grammar=st.none() | st.builds(Grammar, st.sampled_from(GrammarKind), st.text(max_size=5)),
)
requests = st.builds(
    Request,
    request_id=st.text(max_size=5),
    model=st.text(max_size=5),
    prompt_token_ids=token_ids,
    params=params,
    lora=st.text(max_size=3),
    cache_root=st.binary(min_size=16, max_size=16),
    block_keys=st.binary(max_size=32),
    output_token_ids=st.lists(token_ids, max_size=3).map(tuple),
    deterministic=st.booleans(),
    timeout_ms=u32,
    priority=st.integers(-5, 5),
    traceparent=st.text(max_size=5),
)


@given(
    st.builds(Submission, u32, st.sampled_from(Phase), requests, st.none(), st.text(max_size=5)),
    st.lists(u32, max_size=4),
    token_ids,
)
def test_a_router_update_comes_back_equal(submission: Submission, cancels: list[int], ids: tuple[int, ...]) -> None:
    update = RouterUpdate(
        hello=RouterHello("router", 7),
        submissions=[submission],
        cancels=cancels,
        choice_cancels=cancels[:1],
        relays=[Relay(3, b"ticket", (b"a", b""), (FirstOutput(ids, True), FirstOutput((), False)))],
    )
    assert decode_router_update(encode_router_update(update)) == update


@given(st.lists(st.tuples(u32, u32, st.lists(u32, max_size=3)), max_size=6), st.booleans())
def test_a_step_comes_back_equal(deltas: list[tuple[int, int, list[int]]], single: bool) -> None:
    output = StepOutput(
        finishes=[Finish(4, FinishReason.STOP, 2, 0), Finish(5, FinishReason.LENGTH, 3)],
        logprobs=[Logprobs(4, 1, -0.5, 2, (7, 9), (-0.25, -0.5))],
        prompts=[PromptStats(4, 10, 5, 3)],
    )
    for handle, first, ids in deltas:
        chosen = (ids or [0])[:1] if single else ids
        output.handles.append(handle)
        output.first_indexes.append(first)
        output.counts.append(len(chosen))
        output.token_ids += chosen
    announced = [Announcement(4, b"ticket", (b"manifest",))]
    step = decode_worker_update(encode_worker_update(WorkerUpdate(step=step_columns(output, announced)))).step
    assert step is not None
    assert list(step.handles) == output.handles
    assert list(step.first_indexes) == output.first_indexes
    assert list(step.counts or [1] * len(output.handles)) == output.counts
    assert list(step.token_ids) == output.token_ids
    assert (step.finishes, step.logprobs, step.prompts) == (output.finishes, output.logprobs, output.prompts)
    assert step.announcements == announced


def test_a_failed_choice_carries_its_typed_error() -> None:
    error = DigestMismatch("block 7 differs", work_done=True)
    output = StepOutput(finishes=[Finish(1, FinishReason.ERROR, 0, error=error)])
    step = decode_worker_update(encode_worker_update(WorkerUpdate(step=step_columns(output)))).step
    assert step is not None
    back = step.finishes[0].error
    assert isinstance(back, DigestMismatch)
    assert back.to_fields() == error.to_fields()


def test_hello_load_and_draining_come_back_equal() -> None:
    worker = WorkerInfo(
        "w", 2**60, Role.DECODE, "127.0.0.1:1", ModelInfo("m", "r", "t", 100, 50, (2, 3)), b"f" * 16, 16, 9, 8,
        ParallelRank(1, 2), ("shm", "tcp"), "host", (("rack", "a"),), "10.0.0.1:9",
    )  # fmt: skip
    update = WorkerUpdate(hello=WorkerHello(worker), load=EngineLoad(1, 2, 3, 4, 5, 6, 7, 8, 9, 10), draining=True)
    assert decode_worker_update(encode_worker_update(update)) == update


nonces = st.binary(min_size=16, max_size=16)
block_key_columns = st.lists(nonces, max_size=4).map(tuple)


@given(st.builds(CacheDelta, block_key_columns, block_key_columns, st.booleans()))
def test_what_changed_in_a_cache_comes_back_equal_beside_a_step(delta: CacheDelta) -> None:
    output = StepOutput()
    output.add(4, 0, 99)
    back = decode_worker_update(encode_worker_update(WorkerUpdate(step=step_columns(output), cache=delta)))
    assert back.cache == delta
    assert back.step is not None
    assert list(back.step.token_ids) == [99]
    assert decode_worker_update(encode_worker_update(WorkerUpdate())).cache is None


@pytest.mark.parametrize("column", ["stored", "removed"])
def test_a_column_of_cut_keys_is_refused(column: str) -> None:
    message = worker_service_pb2.WorkerMessage()
    setattr(message.cache, column, b"x" * 17)
    with pytest.raises(ProtocolMismatch, match="17 bytes"):
        decode_worker_update(message.SerializeToString())


@given(st.builds(KVTicket, st.text(), st.text(), u64, nonces, st.binary(), st.text(), u32, u32, ranks))
def test_a_ticket_comes_back_equal(ticket: KVTicket) -> None:
    assert decode_ticket(encode_ticket(ticket)) == ticket


@given(st.lists(st.tuples(u32, u64, st.binary(min_size=16, max_size=16)), max_size=4), u32, ranks)
def test_a_manifest_comes_back_equal(rows: list[tuple[int, int, bytes]], chunk: int, rank: ParallelRank) -> None:
    blocks, generations, digests = (tuple(column) for column in zip(*rows, strict=True)) if rows else ((), (), ())
    manifest = KVManifest(chunk, 16, 30, blocks, generations, digests, True, rank)  # type: ignore[arg-type]
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_ragged_columns_are_refused() -> None:
    step = worker_service_pb2.Step(handles=struct.pack("<2I", 1, 2), first_indexes=struct.pack("<I", 0))
    with pytest.raises(ProtocolMismatch):
        decode_worker_update(worker_service_pb2.WorkerMessage(step=step).SerializeToString())
    with pytest.raises(ProtocolMismatch):
        decode_worker_update(
            worker_service_pb2.WorkerMessage(step=worker_service_pb2.Step(handles=b"abc")).SerializeToString()
        )
    manifest = kv_handover_service_pb2.KvManifest(version=1, blocks=struct.pack("<I", 1))
    with pytest.raises(ProtocolMismatch):
        decode_manifest(manifest.SerializeToString())


@pytest.mark.parametrize("decode", [decode_ticket, decode_manifest])
def test_garbage_and_foreign_versions_are_refused(decode: type) -> None:
    for data in (b"\xff\xff\xff", b"", kv_handover_service_pb2.KvTicket(version=99).SerializeToString()):
        with pytest.raises(ProtocolMismatch):
            decode(data)


def test_an_unreadable_submission_costs_only_itself() -> None:
    good = Submission(1, Phase.FULL, Request("a", "m", (1,), SamplingParams()))
    message = worker_service_pb2.RouterMessage.FromString(encode_router_update(RouterUpdate(submissions=[good])))
    message.submissions.add(handle=5, phase=worker_service_pb2.Submission(phase=1).phase).params.temperature = 9.0  # type: ignore[arg-type]
    message.submissions.add(handle=6)
    first, second, third = decode_router_update(message.SerializeToString()).submissions
    assert first == good
    assert isinstance(second.error, InvalidRequest)
    assert (second.handle, second.error.param) == (5, "temperature")
    assert isinstance(third.error, InvalidRequest)
    assert (third.handle, third.error.param) == (6, "phase")


def test_fields_of_a_newer_release_are_skipped() -> None:
    unknown = b"\xfa\x3f\x03new"  # field 1023, length-delimited
    update = decode_router_update(encode_router_update(RouterUpdate(cancels=[1])) + unknown)
    assert update.cancels == [1]
    assert "new" not in str(update)


def test_one_release_apart_is_understood_two_are_not() -> None:
    assert common_version(PROTOCOL_MIN, PROTOCOL_MAX) == PROTOCOL_MAX
    assert common_version(PROTOCOL_MAX, PROTOCOL_MAX + 1) == PROTOCOL_MAX
    with pytest.raises(ProtocolMismatch):
        common_version(PROTOCOL_MAX + 1, PROTOCOL_MAX + 2)
    with pytest.raises(ProtocolMismatch):
        common_version(0, PROTOCOL_MIN - 1)


def _all_errors(cls: type[PdserveError]) -> list[type[PdserveError]]:
    return [cls, *(below for sub in cls.__subclasses__() for below in _all_errors(sub))]


def test_error_reasons_are_unique_and_drawn_in_the_docstring() -> None:
    import pdserve.errors as module

    classes = [cls for cls in _all_errors(PdserveError) if cls.__module__ == module.__name__]
    reasons = [cls.reason for cls in classes]
    assert len(set(reasons)) == len(reasons)
    assert all(cls.__name__ in (module.__doc__ or "") for cls in classes)


def test_an_unknown_reason_of_a_newer_peer_is_still_an_error() -> None:
    error = from_fields({"reason": "from_the_future", "message": "hm", "leg": "decode"})
    assert type(error) is ServiceError
    assert (error.message, error.leg) == ("hm", "decode")


def test_generated_enums_equal_ours() -> None:
    assert {phase.name: int(phase) for phase in Phase} == {
        name.removeprefix("PHASE_"): number for name, number in common_pb2.Phase.items() if number
    }
    assert {reason.name: int(reason) for reason in FinishReason} == {
        name.removeprefix("FINISH_REASON_"): number for name, number in common_pb2.FinishReason.items() if number
    }
