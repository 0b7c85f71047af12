"""Workers over the optional transports: real processes, right tokens, typed refusals at start, a peer that dies."""

from __future__ import annotations

import signal

import pytest
from session_client import RouterSession
from worker_pair import Gate, Pair, expected, make_request, running, running_pair, until_free
from worker_process import worker_process

from kvstore.transports.opening import open_transports
from kvstore.transports.registry import OPTIONAL, make_transport
from kvstore.transports.tcp import TcpOptions
from pdserve.config import MooncakeConfig
from pdserve.errors import ConfigError, PeerLost
from pdserve.types import Role


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.transports) for name in OPTIONAL])
def transport(request: pytest.FixtureRequest) -> str:
    try:
        make_transport(request.param).close()
    except ConfigError as error:
        pytest.skip(error.message)
    return str(request.param)


async def test_a_pair_of_processes_hands_over_and_ends_cleanly(transport: str) -> None:
    async with (
        worker_process("prefill", transports=[transport]) as p,
        worker_process("decode", transports=[transport]) as d,
    ):
        prefill, decode = await RouterSession.open(p.address), await RouterSession.open(d.address)
        pair = Pair(None, None, prefill, decode)
        handed = [pair.start(make_request(f"p{i}", length=1 + 97 * i)) for i in range(6)]
        for one in handed:
            assert await one.result() == expected(one.request)
        _, text = await d.get("/metrics")
        assert f'pdserve_kv_pulled_bytes_total{{transport="{transport}"}}' in text
        await prefill.close()
        await decode.close()
        for worker in (p, d):
            worker.signal(signal.SIGTERM)
            assert await worker.exit_code() == 0


async def test_a_prefill_worker_that_was_killed_is_a_lost_peer(transport: str) -> None:
    async with (
        worker_process("prefill", transports=[transport]) as p,
        running(Role.DECODE, transports=[transport]) as decode_worker,
    ):
        prefill, decode = await RouterSession.open(p.address), await RouterSession.open(decode_worker.address)
        gate = Gate().install(decode_worker)
        handed = Pair(None, decode_worker, prefill, decode).start(make_request(length=400))
        await gate.reached()
        p.signal(signal.SIGKILL)
        await p.exit_code()
        gate.open.set()
        with pytest.raises(PeerLost):
            await handed.rest.result()
        await until_free(decode_worker)
        await prefill.close()
        await decode.close()


async def test_decodes_first_choice_that_prefill_has_too_is_taken(transport: str) -> None:
    async with running_pair([transport, "tcp"], prefill_overrides={"transports": ["tcp", transport]}) as pair:
        request = make_request(length=100)
        assert await pair.run(request) == expected(request)
        moved = pair.decode_worker.registry.get_sample_value("pdserve_kv_pulled_bytes_total", {"transport": transport})
        assert moved == pair.decode_worker.kv_bytes_pulled > 0


@pytest.mark.parametrize("name", ["mooncake", "nixl"])
def test_beyond_loopback_keys_go_to_identified_peers_only(name: str) -> None:
    options = TcpOptions(host="127.0.0.1", advertise_host="10.0.0.7")
    with pytest.raises(ConfigError, match="needs tls") as caught:
        open_transports(["tcp", name], options, MooncakeConfig())
    assert caught.value.key == "tls"


def test_when_one_transport_cannot_be_had_the_others_are_closed_again() -> None:
    taken = make_transport("tcp")
    options = TcpOptions(port=taken.port)
    with pytest.raises(ConfigError, match="cannot listen") as caught:
        open_transports(["shm", "tcp"], options, MooncakeConfig())
    assert caught.value.key == "transport_host"
    with pytest.raises(ConfigError, match="no RDMA device"):
        open_transports(["tcp", "mooncake"], TcpOptions(), MooncakeConfig(protocol="rdma"))
    taken.close()
