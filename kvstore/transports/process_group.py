"""`nccl` and its CPU twin `gloo`: the tcp transport, whose payload goes by a two-rank process group of torch.

A pair is made when a connection is: the exporter opens a TCPStore on its own address and says where by the connection
that has just shown the region's token, and both sides join a group of two. So membership changes at run time, pair by
pair, and nobody who could not read the region by tcp can join. Requests, small payloads and the notice that a peer died
go by that connection. Regions are host memory; nccl moves them through device memory piece by piece.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from kvstore.transports.tcp_stream import Stream
from pdserve.errors import ConfigError, PeerLost, TransferTimeout

Backend = Literal["gloo", "nccl"]
PIECE_BYTES = 8 << 20
"""Of a message: gloo reaches its 2 to 3 GB/s from there on, and a close waits for one at most."""
DIRECT_BYTES = 256 << 10
"""Buffers from this size on are sent as they lie; smaller ones are gathered: gloo took 1.4 ms for one of 4 KB."""
INLINE_BYTES = 64 << 10
"""Payloads up to this go by the connection itself."""
_PORT = struct.Struct("<I")

View = memoryview | bytes
Slice = tuple[int, int, int]
"""Of one buffer: its index, first byte, last byte + 1."""


def plan(lengths: Sequence[int]) -> list[list[Slice]]:
    """The messages in which buffers of these lengths go, the same on both sides: each message is one slice of a large
    buffer or a gathering of small ones, at most `PIECE_BYTES`."""
    messages: list[list[Slice]] = []
    small: list[Slice] = []
    room = PIECE_BYTES
    for index, length in enumerate(lengths):
        if length < DIRECT_BYTES and length <= room:
            small.append((index, 0, length))
            room -= length
            continue
        if small:
            messages.append(small)
            small, room = [], PIECE_BYTES
        if length < DIRECT_BYTES:
            small, room = [(index, 0, length)], PIECE_BYTES - length
        else:
            messages += [[(index, at, min(length, at + PIECE_BYTES))] for at in range(0, length, PIECE_BYTES)]
    if small:
        messages.append(small)
    return messages


@dataclass(frozen=True, slots=True)
class PairMaker:
    """Makes the channel of a connection that has been let in. Checked when it is made: raises `ConfigError`."""

    backend: Backend
    timeout_s: float
    device: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", "cpu" if self.backend == "gloo" else "cuda")
        _check(self.backend)

    def __call__(self, stream: Stream, sock: socket.socket, serving: bool) -> GroupChannel:
        """Raises `PeerLost`, `TransferTimeout`."""
        timeout = timedelta(seconds=self.timeout_s)
        here = sock.getsockname()[0]
        with lost_peer():
            store = self._host(stream, here, timeout) if serving else self._join(stream, sock, timeout)
            group = self._group(dist.PrefixStore("pair", store), 0 if serving else 1, here, timeout)
        return GroupChannel(stream, group, 1 if serving else 0, self.device)

    def _host(self, stream: Stream, here: str, timeout: timedelta) -> Any:
        family = socket.AF_INET6 if ":" in here else socket.AF_INET
        listener = socket.create_server((here, 0), family=family)  # on this address; by itself TCPStore takes them all
        port = listener.getsockname()[1]
        store = dist.TCPStore(here, port, 2, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())
        stream.send([_PORT.pack(port)])
        return store

    def _join(self, stream: Stream, sock: socket.socket, timeout: timedelta) -> Any:
        (port,) = _PORT.unpack(stream.receive_bytes(_PORT.size))
        return dist.TCPStore(sock.getpeername()[0], port, 2, False, timeout)

    def _group(self, store: Any, rank: int, here: str, timeout: timedelta) -> Any:
        if self.backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            return dist.ProcessGroupNCCL(store, rank, 2, options)
        options = dist.ProcessGroupGloo._Options()
        options._timeout, options._threads = timeout, 1
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=here)]
        return dist.ProcessGroupGloo(store, rank, 2, options)


class GroupChannel:
    """Moves the payload of one connection. Not thread-safe, as the connection's requests come one at a time."""

    def __init__(self, stream: Stream, group: Any, other: int, device: str) -> None:
        self._stream, self._group, self._other, self._device = stream, group, other, device

    def send(self, buffers: Sequence[View]) -> None:
        """Raises `PeerLost`, `TransferTimeout`."""
        if sum(len(b) for b in buffers) <= INLINE_BYTES:
            self._stream.send(buffers)
            return
        for message in plan([len(b) for b in buffers]):
            self._check()
            data = _gathered(buffers, message)
            with self._told_apart(), lost_peer():
                self._group.send([torch.from_numpy(data).to(self._device)], self._other, 0).wait()

    def receive(self, buffers: Sequence[memoryview]) -> None:
        """Raises `PeerLost`, `TransferTimeout`."""
        if sum(len(b) for b in buffers) <= INLINE_BYTES:
            self._stream.receive(buffers)
            return
        for message in plan([len(b) for b in buffers]):
            self._check()
            targets = [np.frombuffer(buffers[i], np.uint8)[start:stop] for i, start, stop in message]
            self._receive(targets)

    def _receive(self, targets: Sequence[NDArray[np.uint8]]) -> None:
        in_place = len(targets) == 1 and self._device == "cpu"
        nbytes = sum(t.size for t in targets)
        tensor = (
            torch.from_numpy(targets[0]) if in_place else torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        )
        with self._told_apart(), lost_peer():
            self._group.recv([tensor], self._other, 0).wait()
        if not in_place:
            data = tensor.cpu().numpy()
            for target, part in zip(targets, np.split(data, np.cumsum([t.size for t in targets])[:-1]), strict=True):
                target[:] = part

    @contextmanager
    def _told_apart(self) -> Iterator[None]:
        """gloo now and then only runs out of time when the peer dies: the connection knows better."""
        try:
            yield
        except TransferTimeout as error:
            if self._stream.peer_gone():
                raise PeerLost("the peer closed the connection") from error
            raise

    def _check(self) -> None:
        if self._stream.aborted:
            raise PeerLost("the connection was closed here")

    def close(self) -> None:
        """Free the group's sockets and threads."""
        group, self._group = self._group, None
        if group is not None:
            with lost_peer():
                group.abort()


def _gathered(buffers: Sequence[View], message: Sequence[Slice]) -> NDArray[np.uint8]:
    """A message's bytes; a large slice as it lies, unless it is read-only, which torch does not take."""
    parts = [np.frombuffer(buffers[index], np.uint8)[start:stop] for index, start, stop in message]
    return parts[0] if len(parts) == 1 and parts[0].flags.writeable else np.concatenate(parts)


@contextmanager
def lost_peer() -> Iterator[None]:
    """torch's errors as ours: it has one class for them, and says in words which it is."""
    try:
        yield
    except RuntimeError as error:  # also DistBackendError, DistStoreError
        text = str(error).partition("This is typically")[0]  # gloo guesses at causes, time-outs among them
        if "imed out" in text or "imeout" in text:
            raise TransferTimeout(f"the peer moved nothing within the limit: {text[:200]}") from error
        raise PeerLost(f"the group with the peer broke: {text[:200]}") from error


def _check(backend: Backend) -> None:
    if not dist.is_available():
        raise ConfigError(f"the transport {backend} needs a torch with torch.distributed", key="transports")
    if backend == "gloo" and not dist.is_gloo_available():
        raise ConfigError("the transport gloo needs a torch that has gloo", key="transports")
    if backend == "nccl" and not torch.cuda.is_available():
        raise ConfigError("the transport nccl needs a CUDA device: use gloo, or tcp, on CPU", key="transports")
    if backend == "nccl" and not dist.is_nccl_available():
        raise ConfigError("the transport nccl needs a torch with NCCL: install a CUDA build", key="transports")
