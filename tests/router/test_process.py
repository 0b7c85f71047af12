"""The router as a process, over worker processes with the sim engine."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from pdserve.config import RouterConfig, from_mapping
from pdserve.errors import ConfigError
from router.app import Router, placement_options


class Fleet:
    """Processes of one test."""

    def __init__(self):
        self.processes = []

    async def start(self, module, **config):
        sets = [part for key, value in config.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, *sets, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.processes.append(process)
        process.ready = json.loads(await asyncio.wait_for(process.stdout.readline(), 60))
        return process

    async def workers(self, **config):
        starts = (
            self.start(f"{role}_worker", engine="sim", worker_id=role, **config) for role in ("prefill", "decode")
        )
        return await asyncio.gather(*starts)

    async def router(self, workers, **config):
        addresses = [worker.ready["address"] for worker in workers]
        router = await self.start(
            "router", workers=addresses, http_listen="127.0.0.1:0", grpc_listen="127.0.0.1:0", **config
        )
        router.url = f"http://127.0.0.1:{router.ready['http_port']}"
        return router

    async def close(self):
        for process in self.processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.fixture
async def fleet():
    built = Fleet()
    yield built
    await built.close()


def get(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def status(url, body=None):
    return await asyncio.to_thread(get, url, body)


async def wait_answer(url, wanted):
    async with asyncio.timeout(60):
        while not wanted(*await status(url)):  # noqa: ASYNC110 - another process changes it
            await asyncio.sleep(0.02)


async def wait_status(url, code):
    await wait_answer(url, lambda got, _: got == code)


def ask(max_tokens, **more):
    return {"model": "smollm2-135m", "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True, **more}


@pytest.mark.e2e
async def test_a_worker_killed_outright_is_a_typed_error_and_its_successor_serves(fleet):
    prefill, decode = await fleet.workers(**{"sim.timing": "llama-3.1-8b-h100-tp1"})
    router = await fleet.router([prefill, decode])
    await wait_status(f"{router.url}/readyz", 200)
    asking = asyncio.ensure_future(status(f"{router.url}/v1/completions", ask(5000)))
    await wait_answer(f"{router.url}/metrics", lambda code, body: "pdserve_requests_inflight 1.0" in body)
    decode.send_signal(signal.SIGKILL)
    code, body = await asyncio.wait_for(asking, 60)
    assert code == 503
    assert json.loads(body)["error"]["code"] == "worker_lost"
    await wait_status(f"{router.url}/readyz", 503)
    await fleet.start("decode_worker", engine="sim", listen=decode.ready["address"], worker_id="again")
    await wait_status(f"{router.url}/readyz", 200)
    code, body = await status(f"{router.url}/v1/completions", ask(5))
    assert code == 200
    metrics = (await status(f"{router.url}/metrics"))[1]
    assert 'pdserve_worker_lost_total{role="decode"} 1.0' in metrics
    assert 'reason="worker_lost",status="503"' in metrics


@pytest.mark.e2e
async def test_sigterm_finishes_what_runs_and_then_ends(fleet):
    workers = await fleet.workers(**{"sim.timing": "llama-3.1-8b-h100-tp1"})
    router = await fleet.router(workers)
    await wait_status(f"{router.url}/readyz", 200)
    asking = asyncio.ensure_future(status(f"{router.url}/v1/completions", ask(400)))
    await wait_answer(f"{router.url}/metrics", lambda code, body: "pdserve_requests_inflight 1.0" in body)
    router.send_signal(signal.SIGTERM)
    code, body = await asyncio.wait_for(asking, 60)
    assert (code, json.loads(body)["usage"]["completion_tokens"]) == (200, 400)
    assert await asyncio.wait_for(router.wait(), 60) == 0


@pytest.mark.e2e
async def test_a_second_signal_ends_the_drain(fleet):
    workers = await fleet.workers(**{"sim.timing": "llama-3.1-8b-h100-tp1"})
    router = await fleet.router(workers)
    await wait_status(f"{router.url}/readyz", 200)
    asking = asyncio.ensure_future(status(f"{router.url}/v1/completions", ask(5000)))
    await wait_answer(f"{router.url}/metrics", lambda code, body: "pdserve_requests_inflight 1.0" in body)
    router.send_signal(signal.SIGTERM)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{router.ready['grpc_port']}")
    watching = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    async for answer in watching:
        if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
            break
    await channel.close()
    router.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(router.wait(), 60) == 0
    with contextlib.suppress(OSError):
        assert (await asking)[0] == 503


@pytest.mark.e2e
async def test_health_and_reflection_are_served(fleet):
    workers = await fleet.workers()
    router = await fleet.router(workers)
    await wait_status(f"{router.url}/readyz", 200)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{router.ready['grpc_port']}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]))
        names = {service.name for service in (await call.read()).list_services_response.service}
    assert {"pdserve.v1.InferenceService", "inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names


async def test_a_router_without_workers_is_alive_but_not_ready(fleet):
    router = await fleet.router([])
    assert (await status(f"{router.url}/healthz"))[0] == 200
    assert (await status(f"{router.url}/readyz"))[0] == 503
    async with grpc.aio.insecure_channel(f"127.0.0.1:{router.ready['grpc_port']}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    code, body = await status(f"{router.url}/v1/completions", ask(5))
    assert (code, json.loads(body)["error"]["code"]) == (503, "no_worker")


async def test_the_router_never_imports_torch():
    code = "import router.__main__, sys; print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0].strip() == b"[]"


BAD_CONFIGS = {
    "workrs=[]": "workrs",
    "workers=[nonsense]": "workers",
    "http_listen=nonsense": "http_listen",
    "aliases.a=b": "aliases.a",
    "model=/nowhere.gguf": "model",
    "disaggregate=sometimes": "disaggregate",
    "policy=best": "policy",
    "timing=fast": "timing",
    "models={a: {aliases: [b]}, b: {}}": "models.b.aliases",
}


async def test_a_config_error_names_the_key_and_ends_with_2():
    code = (
        "import sys, router.__main__ as r; "
        "print([r.main(['--set', 'grpc_listen=127.0.0.1:0', '--set', each]) for each in sys.argv[1:]])"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *BAD_CONFIGS, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    stdout, stderr = await process.communicate()
    assert json.loads(stdout) == [2] * len(BAD_CONFIGS)
    assert [line.split(": ")[1] for line in stderr.decode().splitlines()] == list(BAD_CONFIGS.values())


async def test_a_port_in_use_is_a_config_error():
    first = Router(from_mapping(RouterConfig, {"http_listen": "127.0.0.1:0", "grpc_listen": "127.0.0.1:0"}))
    await first.start()
    taken = f"127.0.0.1:{first.http_port}"
    second = Router(from_mapping(RouterConfig, {"http_listen": taken, "grpc_listen": "127.0.0.1:0"}))
    with pytest.raises(ConfigError) as caught:
        await second.start()
    assert caught.value.key == "http_listen"
    await second.stop()
    await first.stop()


def test_an_empty_secret_is_drawn_anew_at_each_start():
    config = from_mapping(RouterConfig, {})
    assert placement_options(config, 1).secret != placement_options(config, 1).secret
    fixed = from_mapping(RouterConfig, {"server_secret": "x"})
    assert placement_options(fixed, 1).secret == b"x"
