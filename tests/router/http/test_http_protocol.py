"""HTTP/1.1 itself, over bare sockets: order, limits, malformed input, clients that go away, stall or trickle."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from router.http import AccessRecord, HttpLimits

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def completion(prompt: object, **fields: object) -> dict[str, object]:
    return {"model": "twin", "prompt": prompt, **fields}


async def read_to_end(sock: socket.socket) -> bytes:
    """What comes until the server ends the connection, in whatever way."""
    loop = asyncio.get_running_loop()
    data = b""
    try:
        while part := await loop.sock_recv(sock, 1 << 20):
            data += part
    except ConnectionResetError:
        pass
    return data


async def dial_lazily(port: int, body: object) -> socket.socket:
    """Sends a completion request, then reads nothing, with the smallest buffer the kernel gives."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", port))
    raw = json.dumps(body).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    await loop.sock_sendall(sock, head + raw)
    return sock


async def test_a_connection_serves_one_request_after_another(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for _ in range(3):
        raw.post(TEXT, completion("a", max_tokens=1))
        answer = await raw.answer()
        assert answer.status == 200
        assert json.loads(answer.body)["choices"][0]["text"] == "Hello"
        assert "connection" not in answer.headers
        assert "gmt" in answer.headers["date"]


async def test_pipelined_requests_are_answered_in_order(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for number in range(1, 6):
        raw.post(TEXT, completion("a", max_tokens=number, stream=number % 2 == 0), f"x-request-id: r{number}")
        raw.get("/healthz", f"x-request-id: h{number}")
    answers = [await raw.answer() for _ in range(10)]
    assert [answer.headers["x-request-id"] for answer in answers] == [
        f"{kind}{number}" for number in range(1, 6) for kind in "rh"
    ]
    assert all(answer.status == 200 for answer in answers)


async def test_many_more_pipelined_requests_than_are_queued_are_all_answered(serve: Any, dial: Any) -> None:
    raw = await dial(await serve(HttpLimits(max_pipelined=2)))
    for number in range(200):
        raw.post(TEXT, completion("a", max_tokens=1), f"x-request-id: r{number}")
    ids = [(await raw.answer()).headers["x-request-id"] for _ in range(200)]
    assert ids == [f"r{number}" for number in range(200)]


async def test_a_body_may_come_in_http_chunks_and_in_single_bytes(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    body = json.dumps(completion("a", max_tokens=2)).encode()
    parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:5], body[5:])]
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for byte in request + b"".join(parts) + b"0\r\n\r\n":
        raw.send(bytes([byte]))
        await raw.writer.drain()
    assert json.loads((await raw.answer()).body)["choices"][0]["text"] == "Hello world"


async def test_http_1_0_gets_an_unframed_stream_and_a_closed_connection(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    body = json.dumps(completion("a", stream=True)).encode()
    raw.send(b"POST /v1/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    answer = await raw.answer()
    assert answer.headers["connection"] == "close"
    assert "transfer-encoding" not in answer.headers
    assert answer.body.startswith(b"data: {")
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_connection_close_is_obeyed(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, completion("a"), "Connection: close")
    assert (await raw.answer()).headers["connection"] == "close"
    assert await raw.closed()


async def test_expect_100_continue_is_answered_before_the_body(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    body = json.dumps(completion("a")).encode()
    raw.send(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    assert (await raw.answer()).status == 100
    raw.send(body)
    assert (await raw.answer()).status == 200


async def test_100_continue_waits_for_the_answers_before_it(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, completion("a", max_tokens=8))
    body = json.dumps(completion("a")).encode()
    raw.send(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    assert (await raw.answer()).status == 200
    assert (await raw.answer()).status == 100
    raw.send(body)
    assert (await raw.answer()).status == 200


async def test_other_expectations_are_refused(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: the worst\r\nContent-Length: 5\r\n\r\n")
    assert (await raw.answer()).status == 417


@pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"])
async def test_a_body_over_the_limit_is_refused_before_it_is_sent(serve: Any, dial: Any, expect: str) -> None:
    raw = await dial(await serve(HttpLimits(max_body_bytes=1000)))
    raw.send(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\n{expect}Content-Length: 1001\r\n\r\n".encode())
    answer = await raw.answer()
    assert (answer.status, answer.error["code"], answer.headers["connection"]) == (413, "payload_too_large", "close")
    assert await raw.closed()


async def test_a_client_that_sends_ten_megabytes_reads_its_413(serve: Any, dial: Any) -> None:
    port = await serve()
    raw = await dial(port)
    raw.post(TEXT, b"x" * 10_000_000)
    await raw.writer.drain()
    assert (await raw.answer()).status == 413
    other = await dial(port)
    other.post(TEXT, completion("a"))
    assert (await other.answer()).status == 200


async def test_a_chunked_body_over_the_limit_is_refused_while_it_comes(serve: Any, dial: Any) -> None:
    raw = await dial(await serve(HttpLimits(max_body_bytes=1000)))
    raw.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    raw.send(b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\nx\r\n")
    assert (await raw.answer()).status == 413


@pytest.mark.parametrize("pieces", [1, 7])
async def test_headers_over_the_limit_are_refused(serve: Any, dial: Any, pieces: int) -> None:
    raw = await dial(await serve(HttpLimits(max_header_bytes=2000)))
    raw.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: ")
    for _ in range(pieces):
        raw.send(b"y" * (7000 // pieces))
        await raw.writer.drain()
        await asyncio.sleep(0.001)
    raw.send(b"\r\n\r\n" if pieces == 1 else b"")
    assert (await raw.answer()).status == 431
    assert await raw.closed()


async def test_an_endless_trailer_is_refused(serve: Any, dial: Any) -> None:
    raw = await dial(await serve(HttpLimits(max_header_bytes=2000)))
    raw.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Long: ")
    for _ in range(4):
        raw.send(b"y" * 1000)
        await raw.writer.drain()
        await asyncio.sleep(0.001)
    assert (await raw.answer()).status == 431


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /healthz\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"FROB /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_malformed_http_is_a_400_and_the_end_of_the_connection(serve: Any, dial: Any, garbage: bytes) -> None:
    port = await serve()
    raw = await dial(port)
    raw.send(garbage)
    answer = await raw.answer()
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")
    assert await raw.closed()
    other = await dial(port)
    other.get("/healthz")
    assert (await other.answer()).status == 200


async def test_garbage_behind_a_request_is_refused_in_its_turn(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, completion("a", stream=True))
    raw.send(b"\x00garbage\r\n\r\n")
    first = await raw.answer()
    assert (first.status, first.body.endswith(b"[DONE]\n\n")) == (200, True)
    assert (await raw.answer()).status == 400
    assert await raw.closed()


async def test_encoded_bodies_are_refused(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, b"\x1f\x8b", "Content-Encoding: gzip")
    assert (await raw.answer()).status == 415


async def test_an_upgrade_is_answered_in_http_1_1(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.get("/healthz", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAA")
    answer = await raw.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")


async def test_a_request_that_trickles_is_timed_out(serve: Any, dial: Any) -> None:
    port = await serve(HttpLimits(header_timeout_s=0.05, body_timeout_s=0.05))
    slow_head, slow_body = await dial(port), await dial(port)
    slow_head.send(b"GET /healthz HTTP/1.1\r\nHos")
    slow_body.send(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    for raw in (slow_head, slow_body):
        assert (await raw.answer()).status == 408
        assert await raw.closed()


async def test_an_idle_connection_is_closed_but_a_running_request_is_not(serve: Any, dial: Any, core: Any) -> None:
    port = await serve(HttpLimits(keep_alive_s=0.5))
    busy, idle, fresh = await dial(port), await dial(port), await dial(port)
    busy.post(TEXT, completion("hang"))
    handle = await core.handle()
    idle.get("/healthz")
    assert (await idle.answer()).status == 200
    assert await idle.closed()
    assert await fresh.closed()
    assert not handle.cancelled.is_set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hang", "flood"])
async def test_a_client_that_goes_away_cancels_its_request(
    serve: Any, dial: Any, core: Any, prompt: str, stream: bool
) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, completion(prompt, stream=stream))
    handle = await core.handle()
    if prompt == "flood" and stream:
        await raw.reader.readuntil(b"data: ")
    raw.writer.transport.abort()
    await asyncio.wait_for(handle.cancelled.wait(), 60)


async def test_going_away_cancels_every_prompt_and_what_was_pipelined(serve: Any, dial: Any, core: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, completion(["hang", "hang"]))
    raw.post(TEXT, completion("a"))
    await core.handle(1)
    raw.writer.close()
    for handle in core.handles:
        await asyncio.wait_for(handle.cancelled.wait(), 60)
    assert len(core.handles) == 2


async def test_a_reader_that_is_too_slow_loses_its_stream(serve: Any, dial: Any, core: Any) -> None:
    port = await serve(HttpLimits(max_unsent_bytes=100_000))
    sock = await dial_lazily(port, completion("flood", stream=True))
    handle = await core.handle()
    await asyncio.wait_for(handle.cancelled.wait(), 60)
    assert not (await read_to_end(sock)).endswith(b"0\r\n\r\n")
    sock.close()


async def test_a_large_whole_answer_outlives_the_stream_bound(serve: Any, dial: Any) -> None:
    raw = await dial(await serve(HttpLimits(max_unsent_bytes=1000)))
    raw.post(TEXT, completion("huge"))
    raw.post(TEXT, completion("a"))
    assert len((await raw.answer()).body) > 20_000_000
    assert (await raw.answer()).status == 200


async def test_a_whole_answer_that_nobody_reads_ends_the_connection(serve: Any, servers: Any, core: Any) -> None:
    port = await serve(HttpLimits(write_stall_s=0.05))
    sock = await dial_lazily(port, completion("huge"))
    await core.handle()
    await asyncio.wait_for(servers[0].drain(600), 60)
    assert len(await read_to_end(sock)) < 20_000_000
    sock.close()


async def test_connections_over_the_limit_are_closed(serve: Any, dial: Any) -> None:
    port = await serve(HttpLimits(max_connections=1))
    first = await dial(port)
    first.get("/healthz")
    await first.answer()
    second = await dial(port)
    second.get("/healthz")
    assert await second.closed()


async def test_drain_finishes_what_runs_and_says_close(serve: Any, dial: Any, servers: Any, core: Any) -> None:
    port = await serve()
    idle, whole, streamed = await dial(port), await dial(port), await dial(port)
    idle.get("/healthz")
    await idle.answer()
    whole.post(TEXT, completion("a", n=20))
    streamed.post(TEXT, completion("a", n=20, stream=True))
    await core.handle(1)
    await asyncio.wait_for(servers[0].drain(600), 60)
    assert await idle.closed()
    answer = await whole.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert (await streamed.answer()).body.endswith(b"[DONE]\n\n")
    assert await streamed.closed()
    with pytest.raises(ConnectionError):
        await dial(port)


async def test_drain_ends_what_outlives_its_grace(serve: Any, dial: Any, servers: Any, core: Any) -> None:
    port = await serve()
    waiting, streamed = await dial(port), await dial(port)
    waiting.post(TEXT, completion("hang"))
    await core.handle()
    streamed.post(TEXT, completion("held back", stream=True))
    (await core.handle(1)).script = None
    core.handles[1].sink.on_tokens(0, "partial", (1,), ())
    await servers[0].drain(0.01)
    answer = await waiting.answer()
    assert (answer.status, answer.error["code"], answer.headers["x-should-retry"]) == (503, "draining", "true")
    broken = await streamed.answer()
    assert not broken.whole
    assert b"partial" in broken.body
    assert b'"code":"draining"' in broken.body
    assert b"[DONE]" not in broken.body
    assert all(handle.cancelled.is_set() for handle in core.handles)


async def test_close_drops_everything_and_cancels(serve: Any, dial: Any, servers: Any, core: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, completion("hang"))
    handle = await core.handle()
    await servers[0].close()
    assert handle.cancelled.is_set()
    assert await raw.closed()


async def test_a_broken_stream_has_an_error_event_and_no_end(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, completion("break:worker_lost", stream=True))
    answer = await raw.answer()
    assert not answer.whole
    last = answer.body.strip().split(b"\n\n")[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "worker_lost"
    assert b"[DONE]" not in answer.body


async def test_stream_headers_suit_proxies(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.post(TEXT, completion("a", stream=True))
    headers = (await raw.answer()).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")


async def test_access_records_tell_no_text(serve: Any, dial: Any) -> None:
    records: list[AccessRecord] = []
    raw = await dial(await serve(access_log=records.append))
    raw.post(TEXT, completion("secret", stream=True), "x-request-id: one")
    await raw.answer()
    raw.get("/nowhere")
    await raw.answer()
    assert [(r.method, r.path, r.status, r.streamed) for r in records] == [
        ("POST", TEXT, 200, True),
        ("GET", "/nowhere", 404, False),
    ]
    assert records[0].request_id == "one"
    assert records[0].duration_s >= 0
    assert "secret" not in repr(records)
