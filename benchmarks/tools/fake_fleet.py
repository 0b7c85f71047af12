"""Fake prefill and decode workers for the router benchmark: the real session protocol, no model, hardly any CPU.

    python fake_fleet.py PREFILL DECODE TTFT_MS ITL_MS [CACHED_BLOCKS]

All workers live in one process on ports of their own. A worker gives a prompt's first token TTFT_MS after its
submission, with one announced chunk if it is to be handed over; a decode worker waits for ticket, final manifest and
first token. Then every running request gets one token each ITL_MS, all in one message, as an engine's steps are. Each
keeps the keys of the blocks it has seen, says how much of a prompt it had, and tells what is new, as engines do; it
begins with CACHED_BLOCKS that no prompt has. Tickets and manifests are real messages of plausible size; no KV moves.
Prints one JSON line with the addresses.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import deque

import uvloop

from pdserve.models import model_info, resolve
from pdserve.rpc import RpcServer, ServerStream
from pdserve.types import (
    CacheDelta,
    Finish,
    FinishReason,
    KVManifest,
    KVTicket,
    ModelInfo,
    Phase,
    PromptStats,
    Role,
    StepOutput,
    WorkerInfo,
)
from pdserve.wire.handover import encode_manifest, encode_ticket
from pdserve.wire.session import (
    SESSION,
    Announcement,
    RouterUpdate,
    Submission,
    WorkerHello,
    WorkerUpdate,
    step_columns,
)

BLOCK_TOKENS = 16
KEY_BYTES = 16
TOKEN_ID = 5345
"""A plain word of the embedded vocabulary."""

Stream = ServerStream[RouterUpdate, WorkerUpdate]


class FakeWorker:
    """One worker; the load's single router is its only client."""

    def __init__(
        self, role: Role, index: int, model: ModelInfo, ttft_s: float, itl_s: float, num_cached: int = 0
    ) -> None:
        self.role, self._model, self._ttft_s, self._itl_s = role, model, ttft_s, itl_s
        self._name = f"{role.value}-{index}"
        rng = random.Random(index)
        self._keys = dict.fromkeys(rng.randbytes(KEY_BYTES) for _ in range(num_cached))
        self._due: deque[tuple[float, Submission]] = deque()
        self._waiting: dict[int, Submission] = {}
        self._running: dict[int, list[int]] = {}
        self._work = asyncio.Event()
        self._started = asyncio.Event()

    async def start(self) -> str:
        server = RpcServer("127.0.0.1:0")
        server.add(SESSION, self._serve)
        self.address = f"127.0.0.1:{await server.start()}"
        self._server = server
        return self.address

    async def _serve(self, stream: Stream) -> None:
        info = WorkerInfo(
            self._name, time.time_ns(), self.role, self.address, self._model, b"f" * 16, BLOCK_TOKENS, 1 << 21, 4096,
            transports=("shm", "tcp"), host_id="fake",
        )  # fmt: skip
        await stream.write(WorkerUpdate(hello=WorkerHello(info)))
        await stream.write(WorkerUpdate(cache=CacheDelta(tuple(self._keys), reset=True)))
        tasks = [asyncio.create_task(self._prompts(stream)), asyncio.create_task(self._steps(stream))]
        try:
            while (update := await stream.read()) is not None:
                self._take(update)
                if not self._ttft_s:
                    await self._answer_due(stream)  # with no task in between: its time would be taken for the router's
        finally:
            for task in tasks:
                task.cancel()

    def _take(self, update: RouterUpdate) -> None:
        now = time.monotonic()
        for submission in update.submissions:
            if submission.phase is Phase.DECODE:
                self._waiting[submission.handle] = submission
            else:
                self._due.append((now + self._ttft_s, submission))
        for relay in update.relays:
            if relay.outputs and (submission := self._waiting.pop(relay.handle, None)) is not None:
                self._run(submission)
        for handle in update.cancels:
            self._waiting.pop(handle, None)
            self._running.pop(handle, None)
        if self._due and self._ttft_s:
            self._work.set()

    def _run(self, submission: Submission) -> None:
        request = submission.request
        assert request is not None
        self._running[submission.handle] = [1, request.params.max_tokens or 1]
        self._started.set()

    def _look_up(self, keys: bytes, new: list[bytes]) -> int:
        """Blocks that were there; the others are there from now on."""
        split = [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
        found = next((i for i, key in enumerate(split) if key not in self._keys), len(split))
        new += split[found:]
        self._keys.update(dict.fromkeys(split[found:]))
        return found

    async def _prompts(self, stream: Stream) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._due:
                await asyncio.sleep(max(0.0, self._due[0][0] - time.monotonic()))
                await self._answer_due(stream)

    async def _answer_due(self, stream: Stream) -> None:
        output, announcements, new = StepOutput(), [], list[bytes]()
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            self._first_token(self._due.popleft()[1], output, announcements, new)
        if output:
            await stream.write(
                WorkerUpdate(step=step_columns(output, announcements), cache=CacheDelta(tuple(new)) or None)
            )

    def _first_token(
        self, submission: Submission, output: StepOutput, announcements: list[Announcement], new: list[bytes]
    ) -> None:
        request = submission.request
        assert request is not None
        length = len(request.prompt_token_ids)
        cached = min(self._look_up(request.block_keys, new) * BLOCK_TOKENS, length - 1)
        output.add(submission.handle, 0, TOKEN_ID)
        output.prompts.append(PromptStats(submission.handle, length, cached))
        if request.params.max_tokens == 1:
            output.finishes.append(Finish(submission.handle, FinishReason.LENGTH, 1))
            return
        if submission.phase is Phase.FULL:
            self._run(submission)
            return
        count = -(-length // BLOCK_TOKENS)
        ticket = KVTicket(request.request_id, self._name, 1, b"n" * 16, b"f" * 16, self.address, 30_000, length)
        manifest = KVManifest(0, 0, length, tuple(range(count)), (1,) * count, (b"d" * 16,) * count, final=True)
        announcements.append(Announcement(submission.handle, encode_ticket(ticket), (encode_manifest(manifest),)))

    async def _steps(self, stream: Stream) -> None:
        while True:
            if not self._running:
                self._started.clear()
                await self._started.wait()
            await asyncio.sleep(self._itl_s)
            output = StepOutput()
            for handle, progress in list(self._running.items()):
                output.add(handle, progress[0], TOKEN_ID)
                progress[0] += 1
                if progress[0] >= progress[1]:
                    del self._running[handle]
                    output.finishes.append(Finish(handle, FinishReason.LENGTH, progress[0]))
            if output:
                await stream.write(WorkerUpdate(step=step_columns(output)))


async def main(prefill: int, decode: int, ttft_ms: float, itl_ms: float, num_cached: int = 0) -> None:
    model = model_info(resolve("embedded"))
    roles = [(Role.PREFILL, i) for i in range(prefill)] + [(Role.DECODE, i) for i in range(decode)]
    share = num_cached // max(1, len(roles))
    workers = [FakeWorker(role, at, model, ttft_ms / 1000, itl_ms / 1000, share) for at, (role, _) in enumerate(roles)]
    addresses = [await worker.start() for worker in workers]
    print(json.dumps({"event": "ready", "addresses": addresses}), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(
        main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), *map(int, sys.argv[5:]))
    )
