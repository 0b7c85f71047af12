"""A live HTTP server over a core twin: a small real core whose "engine" is a script chosen by the prompt.

Prompts: "raise:REASON" fails at submission, "fail:REASON" before the first token, "break:REASON" after two, "hang"
gives nothing, "flood" gives 4,000-character tokens until it is cancelled, "huge" one of 20 MB; anything else
is answered by words.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import uvloop

from pdserve.errors import ModelNotFound, PdserveError, from_fields
from pdserve.types import FinishReason, Logprobs, ModelInfo
from router.base import Incoming, Sink, Usage
from router.http import HttpLimits, HttpServer

MODEL = ModelInfo("twin", "rev-1", "tok", 4096, 1000, (0,))
WORDS = ["Hello", " world", ' "q"\n', " \u00e9\u4f60\U0001f600", " five", " six", " seven", " eight"]
CACHED = 3


@dataclass
class TwinHandle:
    """One request of the twin: its script is a generator, stepped once a loop tick."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    incoming: Incoming
    sink: Sink
    script: Iterator[None] | None = None
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)

    def cancel(self) -> None:
        self.script = None
        self.cancelled.set()

    def step(self) -> None:
        if self.script is not None:
            try:
                next(self.script)
            except StopIteration:
                self.script = None
            else:
                asyncio.get_running_loop().call_soon(self.step)


class TwinCore:
    """A core without workers."""

    def __init__(self) -> None:
        self.handles: list[TwinHandle] = []
        self.not_ready: str | None = None
        self._arrival = asyncio.Event()
        self.preparing: list[tuple[asyncio.Future[Incoming], Incoming]] = []

    async def handle(self, number: int = 0) -> TwinHandle:
        """The handle of the request with this number, once it is there."""
        while len(self.handles) <= number:
            self._arrival.clear()
            await self._arrival.wait()
        return self.handles[number]

    def prepare(self, incoming: Incoming) -> asyncio.Future[Incoming] | None:
        """A prompt that begins with "long:" is tokenised when the test says so, to the bytes of what follows."""
        text = self._prompt(incoming)
        if not text.startswith("long:"):
            return None
        future: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        self.preparing.append((future, incoming))
        self._arrival.set()
        return future

    async def prepared(self) -> tuple[asyncio.Future[Incoming], Incoming]:
        """The oldest long prompt that waits, once there is one."""
        while not self.preparing:
            self._arrival.clear()
            await self._arrival.wait()
        return self.preparing.pop(0)

    def submit(self, incoming: Incoming, sink: Sink) -> TwinHandle:
        if incoming.model != MODEL.name:
            raise ModelNotFound(f"The model {incoming.model!r} does not exist", param="model")
        prompt = self._prompt(incoming)
        if prompt.startswith("raise:"):
            raise _error(prompt)
        token_ids = incoming.token_ids or tuple(range(len(prompt.split())))
        handle = TwinHandle(incoming.request_id, token_ids, incoming, sink)
        handle.script = self._script(prompt, handle)
        self.handles.append(handle)
        self._arrival.set()
        asyncio.get_running_loop().call_soon(handle.step)
        return handle

    def models(self) -> list[ModelInfo]:
        return [MODEL]

    def token_text(self, model: str, token_id: int) -> tuple[str, bytes]:
        if token_id == 999:
            return "\ufffd", b"\xf0\x9f"
        text = WORDS[token_id % len(WORDS)]
        return text, text.encode()

    def ready(self) -> str | None:
        return self.not_ready

    @staticmethod
    def _prompt(incoming: Incoming) -> str:
        if incoming.messages is not None:
            return incoming.messages[-1].content
        return incoming.text or ""

    def _script(self, prompt: str, handle: TwinHandle) -> Iterator[None]:
        sink = handle.sink
        if prompt.startswith("fail:"):
            sink.on_error(_error(prompt))
        elif prompt.startswith("break:"):
            for token_id in range(2):
                sink.on_tokens(0, WORDS[token_id], (token_id,), ())
                yield
            sink.on_error(_error(prompt))
        elif prompt == "hang":
            return
        elif prompt == "flood":
            while True:
                sink.on_tokens(0, "x" * 4000, (1,), ())
                yield
        elif prompt == "huge":
            sink.on_tokens(0, "x" * 20_000_000, (1,), ())
            yield from self._end(handle, [1])
        elif prompt == "held back":
            sink.on_tokens(0, "", (1,), ())
            yield
            sink.on_tokens(0, "all at once", (2,), ())
            yield from self._end(handle, [2])
        else:
            yield from self._words(handle)

    def _words(self, handle: TwinHandle) -> Iterator[None]:
        params = handle.incoming.params
        counts = []
        for choice in range(params.n):
            said = ""
            limit = min(params.max_tokens or 5, 50)
            for index in range(limit):
                text = '{"a":1}' if params.grammar and index == 0 else "" if params.grammar else WORDS[index % 8]
                said += text
                stop = next((s for s in params.stop if s in said), None)
                if stop is not None:
                    text = text[: len(text) - len(said) + said.index(stop)]
                handle.sink.on_tokens(choice, text, (index,), self._logprobs(choice, index, params.logprobs))
                yield
                if stop is not None:
                    break
            counts.append(index + 1)
            reason = FinishReason.STOP if stop or params.max_tokens is None else FinishReason.LENGTH
            handle.sink.on_finish(choice, reason, stop)
        handle.sink.on_done(Usage(len(handle.prompt_token_ids), sum(counts), CACHED))

    @staticmethod
    def _end(handle: TwinHandle, counts: list[int]) -> Iterator[None]:
        yield
        handle.sink.on_finish(0, FinishReason.STOP, 0)
        handle.sink.on_done(Usage(len(handle.prompt_token_ids), sum(counts), CACHED))

    @staticmethod
    def _logprobs(choice: int, index: int, wanted: int | None) -> tuple[Logprobs, ...]:
        if wanted is None:
            return ()
        top = tuple(range(index, index + wanted))
        return (Logprobs(choice, index, -0.5, 1, top, tuple(-0.5 - i for i in range(wanted))),)


def _error(prompt: str) -> PdserveError:
    reason = prompt.split(":")[1]
    return from_fields({"reason": reason, "message": f"scripted {reason}", "retry_after_s": "1.5", "param": "prompt"})


Serve = Callable[..., Awaitable[int]]


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture
async def core() -> TwinCore:
    return TwinCore()


@pytest.fixture
async def servers() -> AsyncIterator[list[HttpServer]]:
    started: list[HttpServer] = []
    yield started
    for server in started:
        await server.close()


@pytest.fixture
async def serve(core: TwinCore, servers: list[HttpServer]) -> Serve:
    """Starts a server; returns its port. Keyword arguments are `HttpServer`'s."""

    async def start(limits: HttpLimits | None = None, **options: object) -> int:
        server = HttpServer(core, limits, **{"version": "1.2.3", "metrics": lambda: b"up 1\n", **options})
        servers.append(server)
        return await server.start("127.0.0.1", 0)

    return start


@dataclass
class Answer:
    """An HTTP answer as it came over the socket. `whole`: the body had its end, not just a closed connection."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool = True

    @property
    def error(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.body)["error"]
        return found


class RawClient:
    """A bare socket that reads HTTP answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def post(self, path: str, body: object, *headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(raw)}", *headers, "", ""]
        self.send("\r\n".join(lines).encode() + raw)

    def get(self, path: str, *headers: str, method: str = "GET") -> None:
        self.send("\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())

    async def answer(self, *, bodiless: bool = False) -> Answer:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status_line, *lines = head.strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        answer = Answer(int(status_line.split()[1]), headers, b"")
        if answer.status == 100 or bodiless:
            return answer
        if headers.get("transfer-encoding") == "chunked":
            answer.body, answer.whole = await self._chunks()
        elif "content-length" in headers:
            answer.body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            answer.body = await self.reader.read()
        return answer

    async def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        while size := await self.reader.readline():
            data = await self.reader.readexactly(int(size, 16) + 2)
            if data == b"\r\n":
                return body, True
            body += data[:-2]
        return body, False

    async def closed(self) -> bool:
        """Waits for the server's end of the connection; whether nothing came before it."""
        try:
            return await self.reader.read() == b""
        except ConnectionError:
            return True


Dial = Callable[..., Awaitable[RawClient]]


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    """Opens raw connections to a port. Keyword arguments are those of `open_connection`."""
    opened: list[RawClient] = []

    async def connect(port: int, **options: Any) -> RawClient:
        opened.append(RawClient(*await asyncio.open_connection("127.0.0.1", port, **options)))
        return opened[-1]

    yield connect
    for one in opened:
        one.writer.close()


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, which does not retry: each error is seen."""
    port = await serve()
    transport = openai.DefaultAsyncHttpxClient(verify=False)  # plain HTTP; loading CA certificates takes 0.1 s
    async with openai.AsyncOpenAI(
        api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, timeout=60, http_client=transport
    ) as made:
        yield made
