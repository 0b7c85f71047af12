"""What the whole-cluster tests share: bounded waits, raw HTTP, server-sent events, the sim engine's known answers."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from pdserve.engine.sim import DEFAULT_MODEL, SimEngineConfig, expected_tokens
from pdserve.types import Request, SamplingParams
from pdserve_cli.cluster import Cluster

MODEL = "smollm2-135m"
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
WAIT_S = 60.0
"""Bound of every wait: far beyond what is ever needed, so that a busy machine fails no test."""
_IDLE = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "pdserve_exported_blocks",
)


async def eventually(predicate: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
    """The predicate's first truthy value; it may be a coroutine function. Raises `TimeoutError`."""
    async with asyncio.timeout(timeout_s):
        while True:
            found = predicate()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(0.02)


async def busy_figures(cluster: Cluster) -> dict[str, dict[str, float]]:
    """What is not zero of a worker's figures that are zero when it is idle, by worker."""
    found = {}
    for member in [member for member in cluster.workers if member.alive]:
        values = {name: await cluster.metric(member, name) for name in _IDLE}
        if any(values.values()):
            found[member.name] = values
    return found


async def all_blocks_free(cluster: Cluster) -> None:
    """Every worker is back at rest: no request, no block in use, none exported."""
    figures: dict[str, dict[str, float]] = {}

    async def idle() -> bool:
        nonlocal figures
        figures = await busy_figures(cluster)
        return not figures

    try:
        await eventually(idle)
    except TimeoutError:
        raise AssertionError(f"blocks are still held: {figures}") from None


@dataclass
class Events:
    """A streamed answer: what came, and how it ended."""

    status: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: dict[str, Any] | None = None
    done: bool = False
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def take(self, line: str) -> None:
        if line == "data: [DONE]":
            self.done = True
        elif line.startswith("data: "):
            event = json.loads(line[6:])
            self.error = event.get("error")
            for choice in event.get("choices", ()):
                self.texts.append(choice.get("text") or "")
                self.token_ids += choice.get("token_ids") or ()
                self.finish_reason = choice["finish_reason"] or self.finish_reason


class Streaming:
    """A completion that streams in the background of a test."""

    def __init__(self, http: httpx.AsyncClient, body: dict[str, Any], request_id: str = "") -> None:
        self.events = Events(0)
        self._headers = {"x-request-id": request_id} if request_id else {}
        self._body = {**body, "stream": True, "return_token_ids": True}
        self._http = http
        self.task = asyncio.create_task(self._run())
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run(self) -> None:
        async with self._http.stream("POST", TEXT, json=self._body, headers=self._headers) as response:
            self.events.status = response.status_code
            if response.status_code != 200:
                self.events.error = json.loads(await response.aread())["error"]
                return
            try:
                async for line in response.aiter_lines():
                    self.events.take(line)
            except httpx.RemoteProtocolError:
                assert self.events.error is not None, "the connection broke without an error event"

    async def has(self, num_tokens: int) -> None:
        await eventually(lambda: len(self.events.token_ids) >= num_tokens or self.task.done())
        assert len(self.events.token_ids) >= num_tokens, self.events

    async def result(self) -> Events:
        async with asyncio.timeout(WAIT_S):
            await self.task
        return self.events

    async def drop(self) -> None:
        """The client goes away: its connection is closed."""
        self.task.cancel()
        await asyncio.wait([self.task])


def sim_tokens(prompt: list[int], **params: Any) -> list[int]:
    """What the sim engine must answer, computed with no engine."""
    choice = params.pop("choice", 0)
    request = Request("r", MODEL, tuple(prompt), SamplingParams(**params))
    return expected_tokens(SimEngineConfig(model=replace(DEFAULT_MODEL, name=MODEL)), request, choice)


def completion(prompt: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, **fields}
