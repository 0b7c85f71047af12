"""`pdserve up` as a user runs it: a process with its standard streams, ports and signals."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import psutil
import pytest
from e2e_tools import CHAT, MODEL, WAIT_S

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

ONCE_KEYS = {"ready_s", "ttft_ms", "tokens", "text", "prefill_worker", "decode_worker", "kv_bytes_moved"}
FREE_PORTS = ("--http-port", "0", "--grpc-port", "0")
LAST_LINE = "pdserve kv stat --address"
"""Of what `up` prints before it waits."""
SCREEN_ROWS, SCREEN_COLUMNS = 40, 100


@asynccontextmanager
async def pdserve(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The command without a terminal; killed, with all that it started, if the test fails to end it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pdserve_cli", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": str(SCREEN_COLUMNS)},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            for child in children(process):
                child.kill()
            process.kill()
            await process.wait()


def sim_up(mark: str) -> tuple[str, ...]:
    """A sim cluster whose processes can be told from others' by their command lines."""
    marks = ("--set", f"labels.mark={mark}", "--router-set", f"router_id={mark}", "--store-set", f"node_id={mark}")
    return ("up", "--engine", "sim", *marks)


def marked(mark: str) -> list[str]:
    """Processes with the mark, whoever is their parent now."""
    found = psutil.process_iter(["cmdline"])
    return [str(process) for process in found if any(mark in part for part in process.info["cmdline"] or ())]


@pytest.fixture
def mark() -> str:
    return f"mark-{secrets.token_hex(6)}"


def children(process: asyncio.subprocess.Process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


async def finished(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = await asyncio.wait_for(process.communicate(), 3 * WAIT_S)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def lines_until(process: asyncio.subprocess.Process, wanted: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    async with asyncio.timeout(WAIT_S):
        async for raw in process.stdout:
            lines.append(raw.decode().rstrip("\n"))
            if wanted in lines[-1]:
                return lines
    raise AssertionError(f"{wanted!r} never came: {lines}")


@pytest.mark.torch_model
async def test_once_prints_one_json_object_and_goes() -> None:
    async with pdserve("up", "--once", "--prompt", "What is the capital of France?", "--json") as process:
        status, out, err = await finished(process)
    assert status == 0, err
    (line,) = out.splitlines()
    result = json.loads(line)
    assert set(result) == ONCE_KEYS
    assert "Paris" in result["text"]
    assert (result["prefill_worker"], result["decode_worker"]) == ("prefill-0", "decode-0")
    assert result["tokens"] > 0
    assert result["kv_bytes_moved"] > 0
    assert result["ttft_ms"] > 0
    assert result["ready_s"] > 0


async def test_up_without_a_terminal_prints_plain_lines_answers_and_drains(mark: str) -> None:
    async with pdserve(*sim_up(mark), *FREE_PORTS, "--prefill", "2") as process:
        lines = await lines_until(process, LAST_LINE)
        assert not any("\x1b" in line for line in lines)
        assert any(line.startswith("kvstore-0    http://") for line in lines)
        assert any(line.startswith("prefill on prefill-") for line in lines)
        (url,) = [line.split()[2] for line in lines if line.startswith("OpenAI API")]
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            response = await http.post(url.removesuffix("/v1") + CHAT, json=body)
        assert response.status_code == 200
        assert len(marked(mark)) == 6  # two prefill, decode, kvstore, router, and the command itself
        process.send_signal(signal.SIGTERM)
        status, out, err = await finished(process)
    assert (status, out.strip()) == (0, "draining"), err
    assert not marked(mark)


async def test_up_without_a_store_starts_none(mark: str) -> None:
    async with pdserve(*sim_up(mark), *FREE_PORTS, "--store", "off") as process:
        lines = await lines_until(process, "decode-0     http")
        assert not any("kvstore" in line for line in lines)
        assert len(marked(mark)) == 4
        process.send_signal(signal.SIGTERM)
        status, _, err = await finished(process)
    assert status == 0, err


async def test_a_signal_while_starting_leaves_nothing(mark: str) -> None:
    async with pdserve(*sim_up(mark), *FREE_PORTS) as process:
        await lines_until(process, "starting")
        process.send_signal(signal.SIGINT)
        status, _, err = await finished(process)
        assert status == 130, err
    assert not marked(mark)


async def test_a_worker_that_dies_ends_the_command_with_its_name(mark: str) -> None:
    async with pdserve(*sim_up(mark), *FREE_PORTS) as process:
        await lines_until(process, LAST_LINE)
        (decode,) = [child for child in children(process) if "decode_worker" in child.cmdline()]
        decode.kill()
        status, _, err = await finished(process)
    assert status == 1
    assert "decode-0 ended with -9" in err
    assert not marked(mark)


async def test_a_taken_port_is_a_clear_error_and_leaves_nothing_running(mark: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with pdserve(*sim_up(mark), "--http-port", str(port), "--grpc-port", "0") as process:
            status, _, err = await finished(process)
    assert status != 0
    assert str(port) in err
    assert "Traceback" not in err
    assert not marked(mark)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--set", "frobnicate=1"), "frobnicate"),
        (("--set", "num_blocks=-4"), "num_blocks"),
        (("--router-set", "disaggregate=perhaps"), "disaggregate"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
async def test_config_errors_name_the_key(arguments: tuple[str, ...], names: str, mark: str) -> None:
    async with pdserve(*sim_up(mark), *FREE_PORTS, *arguments) as process:
        status, _, err = await finished(process)
    assert status != 0
    assert names in err
    assert "Traceback" not in err
    assert not marked(mark)


@pytest.mark.parametrize("arguments", [(), ("up",), ("parity",), ("chaos",), ("kv",)])
async def test_help_fits_a_screen(arguments: tuple[str, ...]) -> None:
    async with pdserve(*arguments, "--help") as process:
        status, out, _ = await finished(process)
    lines = out.splitlines()
    assert status == 0
    assert len(lines) <= SCREEN_ROWS
    assert max(map(len, lines)) <= SCREEN_COLUMNS


@pytest.mark.parametrize("module", ["router", "prefill_worker", "decode_worker"])
async def test_help_of_each_process_fits_a_screen(module: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, "--help", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    status, out, _ = await finished(process)
    assert status == 0
    assert len(out.splitlines()) <= SCREEN_ROWS
