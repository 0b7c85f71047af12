"""The session's client: against real gRPC servers, and against a peer that speaks HTTP/2 frame by frame."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable

import grpc
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve import http2
from pdserve.errors import Overloaded, PdserveError, ProtocolMismatch, WorkerLost
from pdserve.http2 import Heartbeat, Http2Call, frame
from pdserve.rpc import RpcServer, ServerStream
from pdserve.rpc_stream import ClientStream
from pdserve.wire import Method


def _same(data: bytes) -> bytes:
    return data


ECHO: Method[bytes, bytes] = Method("/test.Echo/Run", True, True, _same, _same, _same, _same)


async def _echo(stream: ServerStream[bytes, bytes]) -> None:
    while (data := await stream.read()) is not None:
        await stream.write(data)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = RpcServer("127.0.0.1:0", max_message_bytes=64 << 20)
    server.add(ECHO, _echo)
    yield f"127.0.0.1:{await server.start()}"
    await server.stop(0)


@pytest.mark.parametrize("size", [0, 1, 16_384, 65_536, 1 << 20, 9 << 20])
async def test_messages_of_any_size_come_back_whole_through_closed_windows(address: str, size: int) -> None:
    stream = ClientStream(address, ECHO)
    messages = [bytes([i]) * size for i in range(3)]
    for message in messages:
        stream.send(message)
    assert [await stream.read() for _ in messages] == messages
    await stream.write(b"last")
    assert stream.room
    assert await stream.read() == b"last"
    await stream.done_writing()
    assert await stream.read() is None


async def test_deliver_takes_what_came_before_it_and_all_after_in_order(address: str) -> None:
    stream = ClientStream(address, ECHO)
    await stream.write(b"0")
    assert await stream.read() == b"0"
    for i in range(1, 500):
        stream.send(b"%d" % i)
    await stream.done_writing()
    taken: list[bytes] = []
    await stream.deliver(taken.append)
    assert taken == [b"%d" % i for i in range(1, 500)]


async def test_room_is_told_when_the_window_opens_again(address: str) -> None:
    stream = ClientStream(address, ECHO)
    told = asyncio.Event()
    await stream.write(b"connected")
    stream.when_room = told.set
    stream.send(bytes(4 << 20))
    assert not stream.room
    await asyncio.wait_for(told.wait(), 60)
    assert stream.room
    stream.cancel()


async def test_what_the_taker_raises_ends_the_call(address: str) -> None:
    stream = ClientStream(address, ECHO)

    def refuse(data: bytes) -> None:
        raise KeyError(data)

    await stream.write(b"x")
    with pytest.raises(KeyError):
        await stream.deliver(refuse)
    with pytest.raises(KeyError):
        stream.send(b"y")


@pytest.mark.parametrize("when", ["before it is connected", "later"])
async def test_a_cancelled_call_raises_on_both_sides(address: str, when: str) -> None:
    stream = ClientStream(address, ECHO)
    if when == "later":
        await stream.write(b"x")
    stream.cancel()
    stream.cancel()
    with pytest.raises(WorkerLost):
        await stream.write(b"y")
    with pytest.raises(WorkerLost):
        [None async for _ in _all(stream)]


async def test_a_waiting_reader_is_woken_by_a_cancel(address: str) -> None:
    stream = ClientStream(address, ECHO)
    await stream.write(b"x")
    assert await stream.read() == b"x"
    reader = asyncio.create_task(stream.read())
    asyncio.get_running_loop().call_soon(stream.cancel)
    with pytest.raises(WorkerLost, match="cancelled"):
        await reader


async def test_a_typed_error_and_an_untyped_status_arrive_as_such() -> None:
    async def full(stream: ServerStream[bytes, bytes]) -> None:
        await stream.write(b"first")
        raise Overloaded("full: 100 % é", retry_after_s=1.5)

    server = RpcServer("127.0.0.1:0")
    server.add(ECHO, full)
    address = f"127.0.0.1:{await server.start()}"
    stream = ClientStream(address, ECHO)
    assert await stream.read() == b"first"
    with pytest.raises(Overloaded) as caught:
        await stream.read()
    assert caught.value.retry_after_s == 1.5
    assert caught.value.message == "full: 100 % é"
    unknown: Method[bytes, bytes] = Method("/test.Echo/Nobody", True, True, _same, _same, _same, _same)
    with pytest.raises(PdserveError, match="UNIMPLEMENTED"):
        await ClientStream(address, unknown).read()
    await server.stop(0)
    with pytest.raises(WorkerLost, match="cannot connect"):
        await ClientStream(address, ECHO).read()


async def test_a_server_that_drains_lets_the_call_run_to_its_end() -> None:
    server = RpcServer("127.0.0.1:0")
    server.add(ECHO, _echo)
    stream = ClientStream(f"127.0.0.1:{await server.start()}", ECHO)
    await stream.write(b"x")
    assert await stream.read() == b"x"
    stopping = asyncio.create_task(server.stop(10))
    for i in range(20):
        await stream.write(b"%d" % i)
        assert await stream.read() == b"%d" % i
    assert not stopping.done()
    await stream.done_writing()
    assert await stream.read() is None
    await stopping


async def _all(stream: ClientStream[bytes, bytes]) -> AsyncIterator[bytes]:
    while (data := await stream.read()) is not None:
        yield data


# ---- frame by frame ----


class Peer:
    """A server's side of one connection, in the test's hands."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._encoder = hpack.Encoder()

    async def frames_until(self, kind: int) -> bytes:
        """Payload of the next frame of a kind."""
        while True:
            head = await self.reader.readexactly(9)
            payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == kind:
                return payload

    def headers(self, *pairs: tuple[str, str], end: bool = False) -> bytes:
        return frame(http2.HEADERS, http2.END_HEADERS | (http2.END_STREAM if end else 0), 1, self.block(*pairs))

    def block(self, *pairs: tuple[str, str]) -> bytes:
        return self._encoder.encode(list(pairs))

    def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))


HEAD = ((":status", "200"), ("content-type", "application/grpc"))
SETTINGS = frame(http2.SETTINGS, 0, 0)
_ALL_FLAGS = http2.END_STREAM | http2.END_HEADERS | http2.PADDED | http2.PRIORITY


def _message(data: bytes) -> bytes:
    return b"\0" + struct.pack(">I", len(data)) + data


Talk = Callable[[Peer], object]


async def _with_peer(
    use: Callable[[ClientStream[bytes, bytes], Peer], object], heartbeat: Heartbeat | None = None
) -> None:
    peers: asyncio.Queue[Peer] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(len(http2.PREFACE)) == http2.PREFACE
        await peers.put(Peer(reader, writer))

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        stream = ClientStream(f"127.0.0.1:{port}", ECHO, heartbeat=heartbeat)
        peer = await peers.get()
        try:
            await use(stream, peer)  # type: ignore[misc]
        finally:
            stream.cancel()
            peer.writer.close()


async def test_frames_may_be_padded_continued_and_of_kinds_unknown() -> None:
    async def use(stream: ClientStream[bytes, bytes], peer: Peer) -> None:
        block = peer.block(*HEAD, ("x-long", "v" * 300))
        padded = b"\3" + _message(b"padded") + bytes(3)
        peer.send(
            SETTINGS,
            frame(0xFA, 0, 0, b"whatever"),
            frame(http2.HEADERS, 0, 1, block[:20]),
            frame(http2.CONTINUATION, http2.END_HEADERS, 1, block[20:]),
            frame(http2.DATA, http2.PADDED, 1, padded),
            frame(http2.DATA, 0, 1, _message(b"a") + _message(b"b") + _message(b"cut")[:6]),
            frame(http2.DATA, 0, 1, _message(b"cut")[6:]),
            frame(http2.HEADERS, _ALL_FLAGS, 1, b"\2" + bytes(5) + peer.block(("grpc-status", "0")) + bytes(2)),
        )
        assert [await stream.read() for _ in range(5)] == [b"padded", b"a", b"b", b"cut", None]

    await _with_peer(use)


async def test_pings_are_answered_and_settings_acknowledged() -> None:
    async def use(stream: ClientStream[bytes, bytes], peer: Peer) -> None:
        await peer.frames_until(http2.HEADERS)
        peer.send(SETTINGS, frame(http2.PING, 0, 0, b"12345678"))
        assert await peer.frames_until(http2.SETTINGS) == b""
        assert await peer.frames_until(http2.PING) == b"12345678"

    await _with_peer(use)


async def test_the_peers_window_and_frame_size_are_kept() -> None:
    async def use(stream: ClientStream[bytes, bytes], peer: Peer) -> None:
        window = struct.pack(">HI", http2.INITIAL_WINDOW_SIZE, 10)
        peer.send(frame(http2.SETTINGS, 0, 0, window))
        await peer.frames_until(http2.HEADERS)
        assert await peer.frames_until(http2.SETTINGS) == b""
        stream.send(b"y" * 30)
        assert len(await peer.frames_until(http2.DATA)) == 10
        assert not stream.room
        peer.send(frame(http2.WINDOW_UPDATE, 0, 1, struct.pack(">I", 7)))
        assert len(await peer.frames_until(http2.DATA)) == 7
        peer.send(frame(http2.SETTINGS, 0, 0, struct.pack(">HI", http2.INITIAL_WINDOW_SIZE, 100)))
        assert len(await peer.frames_until(http2.DATA)) == 18
        await stream.write(b"")
        assert stream.room

    await _with_peer(use)


BROKEN = {
    "a reset": lambda peer: frame(http2.RST_STREAM, 0, 1, struct.pack(">I", 2)),
    "a refusal": lambda peer: frame(http2.GOAWAY, 0, 0, struct.pack(">II", 0, 11) + b"too many"),
    "a push": lambda peer: frame(http2.PUSH_PROMISE, 0, 1, bytes(4)),
    "an endless frame": lambda peer: b"\xff\xff\xff\0\0\0\0\0\1",
    "headers of another stream": lambda peer: frame(http2.HEADERS, http2.END_HEADERS, 3, peer.block(*HEAD)),
    "a header block broken off": lambda peer: frame(http2.HEADERS, 0, 1, b"\x88") + frame(http2.DATA, 0, 1, b""),
    "a continuation of nothing": lambda peer: frame(http2.CONTINUATION, 0, 1, b""),
    "headers that can't be read": lambda peer: frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff\xff\xff\xff\xff\xff"),
    "padding beyond the frame": lambda peer: frame(http2.DATA, http2.PADDED, 1, b"\x09ab"),
    "padding without a length": lambda peer: frame(http2.DATA, http2.PADDED, 1, b""),
    "half a window update": lambda peer: frame(http2.WINDOW_UPDATE, 0, 1, b"\0"),
    "an end without status": lambda peer: peer.headers(*HEAD, end=True),
    "a plain web server": lambda peer: peer.headers((":status", "404"), end=True),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_a_peer_that_breaks_the_rules_is_a_lost_worker(how: str) -> None:
    async def use(stream: ClientStream[bytes, bytes], peer: Peer) -> None:
        peer.send(SETTINGS, BROKEN[how](peer))
        with pytest.raises(WorkerLost):
            await stream.read()

    await _with_peer(use)


async def test_a_connection_that_breaks_is_a_lost_worker() -> None:
    async def use(stream: ClientStream[bytes, bytes], peer: Peer) -> None:
        await peer.frames_until(http2.HEADERS)
        peer.writer.transport.abort()
        with pytest.raises(WorkerLost, match="connection"):
            await stream.read()

    await _with_peer(use)


@pytest.mark.parametrize("data", [b"\1" + _message(b"x")[1:], b"\0\xff\xff\xff\xff"])
async def test_compressed_and_endless_messages_are_refused(data: bytes) -> None:
    async def use(stream: ClientStream[bytes, bytes], peer: Peer) -> None:
        peer.send(SETTINGS, peer.headers(*HEAD), frame(http2.DATA, 0, 1, data))
        with pytest.raises(ProtocolMismatch):
            await stream.read()

    await _with_peer(use)


async def test_a_silent_peer_is_asked_and_then_given_up() -> None:
    async def use(stream: ClientStream[bytes, bytes], peer: Peer) -> None:
        peer.send(SETTINGS)
        for _ in range(5):
            asked = await peer.frames_until(http2.PING)
            peer.send(frame(http2.PING, http2.ACK, 0, asked))
        await peer.frames_until(http2.PING)
        with pytest.raises(WorkerLost, match="silent for"):
            await stream.read()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):  # it was not asked a second time
            await peer.frames_until(http2.PING)

    await _with_peer(use, Heartbeat(0.1, 4))


async def test_a_peer_that_wakes_meets_one_question_and_not_a_burst_that_looks_like_an_attack(address: str) -> None:
    """gRPC's server hangs up after a few pings in a row."""
    stream = ClientStream(address, ECHO, heartbeat=Heartbeat(0.2, 1000))
    await stream.write(b"0")
    assert await stream.read() == b"0"
    for _ in range(20):  # as many silent intervals, before the server gets to the first of their bytes
        stream._call._heard = False
        timer = stream._call._timer
        assert timer is not None
        timer.cancel()
        stream._call._check_alive()
    await stream.write(b"1")
    assert await stream.read() == b"1"
    stream.cancel()


async def test_what_is_not_read_here_is_not_taken_for_silence(address: str) -> None:
    stream = ClientStream(address, ECHO, heartbeat=Heartbeat(1000, 2))
    await stream.write(b"0")
    assert await stream.read() == b"0"
    call = stream._call
    assert call._transport is not None
    call._transport.pause_reading()
    for _ in range(4):
        call._heard = False
        call._check_alive()
    call._transport.resume_reading()
    await stream.write(b"1")
    assert await stream.read() == b"1"
    stream.cancel()


async def test_a_server_takes_frequent_heartbeats_for_no_attack(address: str) -> None:
    stream = ClientStream(address, ECHO, heartbeat=Heartbeat(0.2, 1000))
    await stream.write(b"0")
    assert await stream.read() == b"0"
    pings, enough = [], asyncio.Event()
    write = stream._call._write

    def counted(data: bytes) -> None:
        pings.append(data[3] == http2.PING)
        if sum(pings) == 6:
            enough.set()
        write(data)

    stream._call._write = counted  # type: ignore[method-assign]
    reading = asyncio.ensure_future(stream.read())
    reading.add_done_callback(lambda _: enough.set())
    await asyncio.wait_for(enough.wait(), 60)
    await stream.write(b"1")
    assert await reading == b"1"
    stream.cancel()


class _Events:
    """Keeps what a call is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_headers(self, headers: http2.Headers) -> None:
        self.told.append(list(headers))

    def on_data(self, data: bytes) -> None:
        self.told.append(data)

    def on_end(self) -> None:
        self.told.append("end")

    def on_room(self) -> None: ...

    def on_lost(self, reason: str) -> None:
        self.told.append(reason)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_reads_may_cut_frames_anywhere(bodies: list[bytes], data: st.DataObject) -> None:
    encoder = hpack.Encoder()
    wire = SETTINGS + frame(http2.HEADERS, http2.END_HEADERS, 1, encoder.encode(list(HEAD)))
    wire += b"".join(frame(http2.DATA, 0, 1, body) for body in bodies)
    wire += frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, encoder.encode([("grpc-status", "0")]))
    events = _Events()
    call = Http2Call([], events)
    position = 0
    while position < len(wire):
        size = data.draw(st.integers(1, len(wire) - position))
        call.data_received(wire[position : position + size])
        position += size
    assert events.told == [list(HEAD), *bodies, [("grpc-status", "0")], "end"]


async def test_the_call_is_a_grpc_call_to_any_server() -> None:
    """One that nobody here wrote."""

    async def double(requests: AsyncIterator[bytes], _: object) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request * 2

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(double)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Run": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stream = ClientStream(f"localhost:{port}", ECHO)
    await stream.write(b"ab")
    assert await stream.read() == b"abab"
    await stream.done_writing()
    assert await stream.read() is None
    await server.stop(0)
