"""A router in miniature: sessions with workers over the real wire, and one that joins a prefill and a decode worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from pdserve.errors import PdserveError
from pdserve.rpc import Channel, Tls
from pdserve.types import CacheDelta, EngineLoad, Finish, FinishReason, Logprobs, Phase, PromptStats, Request
from pdserve.wire.session import (
    SESSION,
    Announcement,
    FirstOutput,
    Relay,
    RouterHello,
    RouterUpdate,
    StepColumns,
    Submission,
    WorkerHello,
    WorkerUpdate,
)


@dataclass(eq=False)
class Reply:
    """What has come of one submission."""

    handle: int
    n: int
    tokens: list[dict[int, int]] = field(default_factory=list)
    """By choice: output index to token id."""
    finishes: dict[int, Finish] = field(default_factory=dict)
    logprobs: list[Logprobs] = field(default_factory=list)
    announcements: list[Announcement] = field(default_factory=list)
    prompt: PromptStats | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    on_change: Callable[[], None] = lambda: None

    @property
    def error(self) -> Exception | None:
        return next((f.error for f in self.finishes.values() if f.error is not None), None)

    @property
    def done(self) -> bool:
        return len(self.finishes) == self.n or self.error is not None

    def output(self, choice: int = 0) -> list[int]:
        got = self.tokens[choice]
        return [got[i] for i in sorted(got)]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def result(self, choice: int = 0) -> list[int]:
        """All tokens, once every choice has ended. Raises the error that it ended with."""
        await self.until(lambda: self.done)
        if self.error is not None:
            raise self.error
        return self.output(choice)


class RouterSession:
    """One stream to one worker."""

    def __init__(self, address: str, router_id: str = "test-router", tls: Tls | None = None) -> None:
        self.channel = Channel(address, tls=tls)
        self.router_id = router_id
        self.hello: WorkerHello | None = None
        self.hellos: list[WorkerHello] = []
        self.load: EngineLoad | None = None
        self.draining = False
        self.cache: set[bytes] | None = None
        """Keys in the worker's prefix cache, once it told."""
        self.num_cache_resets = 0
        self.num_steps = 0
        self.ended: asyncio.Future[PdserveError | None] = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Event()
        self._replies: dict[int, Reply] = {}
        self._handles = count(1, 200)
        self._stream = None
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._unsent: asyncio.Queue[RouterUpdate] = asyncio.Queue()

    @classmethod
    async def open(
        cls, address: str, router_id: str = "test-router", tls: Tls | None = None, **versions: int
    ) -> RouterSession:
        session = cls(address, router_id, tls)
        await session.start(**versions)
        return session

    async def start(self, **versions: int) -> None:
        self._stream = self.channel.open(SESSION)
        first = await self._stream.read()
        assert first is not None
        self.hello = first.hello
        await self._stream.write(RouterUpdate(hello=RouterHello(self.router_id, 1, **versions)))
        self._reader = asyncio.create_task(self._read())
        self._writer = asyncio.create_task(self._write())

    async def _read(self) -> None:
        try:
            while (update := await self._stream.read()) is not None:
                self._take(update)
            self._end(None)
        except PdserveError as error:
            self._end(error)

    def _end(self, error: PdserveError | None) -> None:
        if not self.ended.done():
            self.ended.set_result(error)
        self.changed.set()

    def _take(self, update: WorkerUpdate) -> None:
        if update.hello is not None:
            self.hellos.append(update.hello)
        if update.load is not None:
            self.load = update.load
        self.draining = self.draining or update.draining
        if update.cache is not None:
            self._take_cache(update.cache)
        if update.step is not None:
            self.num_steps += 1
            self._take_step(update.step)
        self.changed.set()

    def _take_cache(self, delta: CacheDelta) -> None:
        if delta.reset:
            self.cache = set()
            self.num_cache_resets += 1
        assert self.cache is not None, "the first delta of a stream is a reset"
        self.cache -= set(delta.removed)
        self.cache |= set(delta.stored)

    def _take_step(self, step: StepColumns) -> None:
        touched = set()
        position = 0
        for i, handle in enumerate(step.handles):
            num = step.counts[i] if step.counts else 1
            reply = self._of(handle)
            for k in range(num):
                if reply is not None:
                    index = step.first_indexes[i] + k
                    assert index not in reply.tokens[handle - reply.handle], "a token came twice"
                    reply.tokens[handle - reply.handle][index] = step.token_ids[position]
                position += 1
            touched.add(reply)
        for finish in step.finishes:
            reply = self._of(finish.handle)
            if reply is not None:
                reply.finishes[finish.handle - reply.handle] = finish
            touched.add(reply)
        for name, entries in (("logprobs", step.logprobs), ("announcements", step.announcements)):
            for entry in entries:
                reply = self._of(entry.handle)
                if reply is not None:
                    getattr(reply, name).append(entry)
                touched.add(reply)
        for stats in step.prompts:
            reply = self._of(stats.handle)
            if reply is not None:
                reply.prompt = stats
            touched.add(reply)
        for reply in touched - {None}:
            reply.changed.set()
            reply.on_change()

    def _of(self, handle: int) -> Reply | None:
        return self._replies.get(handle) or next(
            (r for r in self._replies.values() if r.handle <= handle < r.handle + r.n), None
        )

    def send(self, update: RouterUpdate) -> None:
        """In order, by one task: gRPC allows one write at a time, and a write whose task is cancelled ends the call."""
        self._unsent.put_nowait(update)

    async def _write(self) -> None:
        try:
            while True:
                await self._stream.write(await self._unsent.get())
        except PdserveError:
            pass  # the reader tells

    def expect(self, n: int) -> Reply:
        handle = next(self._handles)
        reply = self._replies[handle] = Reply(handle, n, [{} for _ in range(n)])
        return reply

    def submit(self, request: Request, phase: Phase, on_change: Callable[[], None] = lambda: None) -> Reply:
        reply = self.expect(request.params.n)
        reply.on_change = on_change
        self.send(RouterUpdate(submissions=[Submission(reply.handle, phase, request)]))
        return reply

    def cancel(self, reply: Reply) -> None:
        """No further answer is expected."""
        self._replies.pop(reply.handle, None)
        self.send(RouterUpdate(cancels=[reply.handle]))

    def cancel_choice(self, reply: Reply, choice: int) -> None:
        self.send(RouterUpdate(choice_cancels=[reply.handle + choice]))

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def break_off(self) -> None:
        """As if this router's process had died."""
        self._stream.cancel()

    async def half_close(self) -> None:
        """No more requests; reading goes on."""
        await self._stream.done_writing()

    async def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
            self._writer.cancel()
            await asyncio.gather(self._reader, self._writer, return_exceptions=True)
        await self.channel.close()


class PairRequest:
    """One request on both workers, with the router's relaying between them."""

    def __init__(self, prefill: RouterSession, decode: RouterSession, request: Request) -> None:
        self._prefill, self._decode, self.request = prefill, decode, request
        self.first: Reply
        self.rest: Reply
        self._num_relayed = 0
        self._outputs_sent = False
        self.hold_back = False
        """Set to stop relaying."""
        self.change_relay: Callable[[Relay], Relay] = lambda relay: relay

    def start(self, rest: Reply | None = None) -> PairRequest:
        """Submit to both workers; with `rest`, only to prefill, for a decode submission that waits already."""
        self.rest = rest or self._decode.submit(self.request, Phase.DECODE)
        self.first = self._prefill.submit(self.request, Phase.PREFILL, self.pump)
        return self

    def pump(self) -> None:
        """Relay what prefill has announced, and its first tokens."""
        if self.hold_back:
            return
        for announcement in self.first.announcements[self._num_relayed :]:
            self._num_relayed += 1
            self._relay(Relay(self.rest.handle, announcement.ticket, announcement.manifests))
        if self.first.prompt is not None and not self._outputs_sent and not self.first.done:
            self._outputs_sent = True
            outputs = tuple(
                FirstOutput(tuple(self.first.output(c)), c in self.first.finishes) for c in range(self.first.n)
            )
            self._relay(Relay(self.rest.handle, outputs=outputs))

    def _relay(self, relay: Relay) -> None:
        self._decode.send(RouterUpdate(relays=[self.change_relay(relay)]))

    @property
    def all_finished(self) -> bool:
        return all(c in self.first.finishes or c in self.rest.finishes for c in range(self.first.n))

    async def result(self, choice: int = 0) -> list[int]:
        """All tokens of a choice, prefill's and decode's, each once. Raises the error of either side."""
        async with asyncio.timeout(60):
            while not self.all_finished:
                for reply in (self.first, self.rest):
                    if reply.error is not None:
                        raise reply.error
                waits = [asyncio.create_task(self.first.changed.wait()), asyncio.create_task(self.rest.changed.wait())]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
                self.first.changed.clear()
                self.rest.changed.clear()
        for reply in (self.first, self.rest):
            if reply.error is not None:
                raise reply.error
        tokens = {**self.first.tokens[choice]}
        for index, token in self.rest.tokens[choice].items():
            assert index not in tokens, "both workers gave this token"
            tokens[index] = token
        if self.first.done:  # every choice ended at prefill: decode is not needed
            self._decode.cancel(self.rest)
        assert sorted(tokens) == list(range(min(tokens), min(tokens) + len(tokens)))
        return [tokens[i] for i in sorted(tokens)]

    def cancel(self) -> None:
        self._prefill.cancel(self.first)
        self._decode.cancel(self.rest)


def finish_reason(reply: Reply, choice: int = 0) -> FinishReason:
    return reply.finishes[choice].reason
