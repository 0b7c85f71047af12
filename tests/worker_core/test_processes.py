"""Workers as processes: started, probed, drained, killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from session_client import RouterSession
from worker_pair import Gate, Pair, expected, make_request, running, until, until_free
from worker_process import WorkerProcess, spawn, worker_process

from pdserve.errors import Draining, PeerLost
from pdserve.types import Phase, Role

SLOW = {"sim.timing": "llama-3.1-8b-h100-tp1"}


async def _sessions(*workers: WorkerProcess) -> list[RouterSession]:
    return [await RouterSession.open(worker.address) for worker in workers]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_a_pair_of_processes_gives_the_expected_tokens(transport: str) -> None:
    async with (
        worker_process("prefill", transports=[transport]) as p,
        worker_process("decode", transports=[transport]) as d,
    ):
        assert (p.ready["role"], d.ready["role"]) == ("prefill", "decode")
        prefill, decode = await _sessions(p, d)
        pair = Pair(None, None, prefill, decode)
        handed = [pair.start(make_request(f"p{i}", length=1 + 97 * i)) for i in range(8)]
        for one in handed:
            assert await one.result() == expected(one.request)
        await prefill.close()
        await decode.close()
        for worker in (p, d):
            worker.signal(signal.SIGTERM)
            assert await worker.exit_code() == 0


async def test_probes_and_metrics_tell_the_truth() -> None:
    async with worker_process("decode") as worker:
        assert await worker.get("/healthz") == (200, "ok\n")
        assert await worker.get("/readyz") == (200, "ready\n")
        assert (await worker.get("/nothing"))[0] == 404
        assert (await worker.get("/readyz", "POST"))[0] == 405
        async with grpc.aio.insecure_channel(worker.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            assert (await check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        (router,) = await _sessions(worker)
        await router.submit(make_request(length=30, max_tokens=7), Phase.FULL).result()
        _, text = await worker.get("/metrics")
        assert 'vllm:generation_tokens_total{model_name="smollm2-135m"} 7.0' in text
        assert 'vllm:prompt_tokens_total{model_name="smollm2-135m"} 30.0' in text
        assert 'vllm:request_success_total{finished_reason="length",model_name="smollm2-135m"} 1.0' in text
        assert "pdserve_router_sessions 1.0" in text
        await router.close()


async def test_sigterm_lets_what_runs_finish() -> None:
    async with worker_process("decode", **SLOW) as worker:
        (router,) = await _sessions(worker)
        request = make_request(max_tokens=60)
        reply = router.submit(request, Phase.FULL)
        await reply.until(lambda: len(reply.tokens[0]) > 2)
        worker.signal(signal.SIGTERM)
        await router.until(lambda: router.draining)
        assert (await worker.get("/readyz"))[0] == 503
        assert (await worker.get("/healthz"))[0] == 200
        with pytest.raises(Draining):
            await router.submit(make_request("late"), Phase.FULL).result()
        assert await reply.result() == expected(request)
        assert await worker.exit_code() == 0
        assert await router.ended is None
        await router.close()


async def test_a_prefill_worker_waits_with_its_end_for_the_pulls() -> None:
    async with worker_process("prefill") as p, running(Role.DECODE) as decode_worker:
        prefill, decode = await RouterSession.open(p.address), await RouterSession.open(decode_worker.address)
        gate = Gate().install(decode_worker)
        request = make_request(length=400)
        handed = Pair(None, decode_worker, prefill, decode).start(request)
        await gate.reached()
        p.signal(signal.SIGTERM)
        await prefill.until(lambda: prefill.draining)
        gate.open.set()
        assert await handed.result() == expected(request)
        assert await p.exit_code() == 0
        await prefill.close()
        await decode.close()


async def test_a_second_sigterm_ends_the_worker_at_once() -> None:
    async with worker_process("decode", drain_timeout_s=100, **SLOW) as worker:
        (router,) = await _sessions(worker)
        reply = router.submit(make_request(max_tokens=7000), Phase.FULL)
        await reply.until(lambda: len(reply.tokens[0]) > 2)
        worker.signal(signal.SIGTERM)
        await router.until(lambda: router.draining)
        worker.signal(signal.SIGTERM)
        with pytest.raises(Draining):
            await reply.result()
        assert await worker.exit_code() == 0
        await router.close()


async def test_a_killed_prefill_worker_gives_a_typed_error_quickly_and_never_a_token() -> None:
    for transport in ("shm", "tcp"):
        async with (
            worker_process("prefill", transports=[transport]) as p,
            running(Role.DECODE, transports=[transport]) as decode_worker,
        ):
            prefill = await RouterSession.open(p.address)
            decode = await RouterSession.open(decode_worker.address)
            gate = Gate().install(decode_worker)
            handed = Pair(None, decode_worker, prefill, decode).start(make_request(length=400))
            await gate.reached()
            p.signal(signal.SIGKILL)
            await p.exit_code()
            gate.open.set()
            with pytest.raises(PeerLost) as caught:
                await handed.rest.result()
            assert caught.value.retryable
            assert not handed.rest.tokens[0]
            await until_free(decode_worker)
            await prefill.close()
            await decode.close()


async def test_a_prefill_worker_that_dies_between_two_chunks_is_found_out_by_the_lease() -> None:
    async with (
        worker_process("prefill", ticket_lease_s=3.0, **SLOW) as p,
        running(Role.DECODE) as decode_worker,
    ):
        prefill = await RouterSession.open(p.address)
        decode = await RouterSession.open(decode_worker.address)
        handed = Pair(None, decode_worker, prefill, decode).start(make_request(length=8000))
        await handed.first.until(lambda: bool(handed.first.announcements))
        handed.hold_back = True  # decode hears nothing more, as if prefill were busy
        await until(lambda: decode_worker.kv_bytes_pulled > 0)
        p.signal(signal.SIGKILL)
        with pytest.raises(PeerLost):
            await handed.rest.result()
        await until_free(decode_worker)
        await prefill.close()
        await decode.close()


async def test_a_killed_workers_shared_memory_is_swept_by_the_next() -> None:
    async with worker_process("prefill") as worker:
        names = _segments(worker.process.pid)
        assert len(names) == 1
        worker.signal(signal.SIGKILL)
        await worker.exit_code()
    async with worker_process("prefill") as successor:
        assert not _segments(worker.process.pid)
        assert _segments(successor.process.pid)
        successor.signal(signal.SIGTERM)
        assert await successor.exit_code() == 0
    assert not _segments(successor.process.pid)


def _segments(pid: int) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"pdserve-kv-{pid}-*")]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--set", "engin=sim"], "engin"),
        (["--set", "engine=sim", "--set", "listen=0.0.0.0:0"], "advertise"),
        (["--set", "engine=sim", "--set", "tls.cert_file=/nonexistent"], "tls"),
    ],
)
async def test_a_config_error_names_its_key(arguments: list[str], key: str) -> None:
    process = await spawn("prefill", *arguments)
    stdout, stderr = await process.communicate()
    assert process.returncode == 2
    assert not stdout
    assert f"{key}:" in stderr.decode().splitlines()[-1]


async def test_the_logs_are_json_and_hold_no_prompt() -> None:
    async with worker_process("decode", log_level="debug", relay_timeout_s=0.2) as worker:
        (router,) = await _sessions(worker)
        reply = router.submit(make_request("secret-request"), Phase.DECODE)
        await reply.until(lambda: reply.done)
        await router.close()
        worker.signal(signal.SIGTERM)
        await worker.exit_code()
        lines = (await worker.process.stderr.read()).decode().splitlines()
    entries = [json.loads(line) for line in lines]
    failed = next(entry for entry in entries if entry["message"] == "request failed")
    assert (failed["request_id"], failed["reason"], failed["role"]) == ("secret-request", "transfer_timeout", "decode")
