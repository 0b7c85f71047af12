"""`nixl`: NVIDIA's NIXL over UCX (RDMA, NVLink, shared memory, tcp). Installed by `make transports`.

NIXL's own progress thread spins on a core for ever. It is off; a thread of ours calls in instead, rarely while nothing
moves and often for a while after a peer announced itself: over tcp the side that is read has to take part. A peer that
dies is an error of the library within a millisecond. A transfer that stalls is ended by tearing the peer's endpoint
down, and not left before the library says that it has ended: nothing arrives in a block of another owner.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvstore.transports.one_sided import MAX_BATCH_BYTES, OneSidedTransport, Operation
from pdserve.errors import ConfigError, PeerLost, TransferTimeout

IDLE_S = 0.01
"""Between two calls into the library while nothing moves: 0.1 % of a core."""
ACTIVE_S = 0.0002
ACTIVE_FOR_S = 0.5
"""How long calls are frequent after the last sign of a peer."""
SPINS = 200
"""Looks at a transfer's state, a microsecond each, before sleeping between them."""
POLL_S = 0.0001
STUCK_LOG_S = 10.0
SETTLE_S = 0.1
"""Before an agent that lost a peer is dropped: UCX (1.5.1's) aborts the process when what it had queued for the dead
endpoint is still there. Some ms were enough."""

log = logging.getLogger("pdserve.kvstore")


@dataclass(frozen=True, slots=True)
class NixlOptions:
    """How the agent behaves; what it moves bytes by is UCX's choice (UCX_TLS, UCX_NET_DEVICES)."""

    progress_timeout_s: float = 10.0


def make_nixl(options: NixlOptions | None = None) -> OneSidedTransport:
    """Raises `ConfigError` when the package is missing or UCX does not start."""
    return OneSidedTransport("nixl", NixlLibrary(options or NixlOptions()))


class NixlLibrary:
    """A `kvstore.transports.one_sided.Library`: one agent with the UCX backend."""

    landing_bytes = MAX_BATCH_BYTES
    """UCX over TCP has been seen to deliver a read after its time-out, with the peer's endpoint torn down: so bytes
    land in memory of ours and are copied on."""

    def __init__(self, options: NixlOptions) -> None:
        self._api = api = _load()
        self._timeout_s = options.progress_timeout_s
        self._name = f"pdserve-{secrets.token_hex(8)}"
        config = api.nixl_agent_config(
            enable_prog_thread=False, backends=["UCX"], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        try:
            self._agent = api.nixl_agent(self._name, config)
        except Exception as error:
            raise ConfigError(f"NIXL's UCX backend does not start: {error}", key="transports") from error
        self.lost_peers = 0
        self._memory: dict[int, Any] = {}
        self._links: dict[str, int] = {}
        """How many links share a remote agent."""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._progress = threading.Thread(target=self._call_in, name="kv-nixl", daemon=True)
        self._progress.start()

    def _call_in(self) -> None:
        active_until = 0.0
        while not self._closing.wait(ACTIVE_S if time.monotonic() < active_until else IDLE_S):
            if self._agent.get_new_notifs():
                active_until = time.monotonic() + ACTIVE_FOR_S

    def register(self, address: int, nbytes: int) -> None:
        try:
            self._memory[address] = self._agent.register_memory([(address, nbytes, 0, "")], "DRAM")
        except Exception as error:
            raise ConfigError(f"NIXL cannot register {nbytes} bytes: {error}", key="transports") from error

    def deregister(self, address: int, nbytes: int) -> None:
        self._agent.deregister_memory(self._memory.pop(address))

    def endpoint(self) -> bytes:
        metadata: bytes = self._agent.get_agent_metadata()
        return self._name.encode() + b"\0" + metadata

    def connect(self, endpoint: bytes) -> NixlLink:
        name, _, metadata = endpoint.partition(b"\0")
        try:
            remote = name.decode("ascii")
            with self._lock, lost_peer(remote):
                if remote != self._name:  # an agent knows itself
                    self._agent.add_remote_agent(metadata)
                self._links[remote] = self._links.get(remote, 0) + 1
        except UnicodeDecodeError as error:
            raise PeerLost("the peer's nixl descriptor names no agent") from error
        return NixlLink(self, self._agent, remote, self._timeout_s)

    def disconnect(self, remote: str, *, torn: bool = False) -> None:
        """A link ends; the last one, or one that must stop at once (`torn`), takes the endpoint along."""
        with self._lock:
            left = 0 if torn else self._links.get(remote, 0) - 1
            self._links[remote] = left
            if left <= 0 and self._links.pop(remote, None) is not None and remote != self._name:
                try:
                    self._agent.remove_remote_agent(remote)
                except Exception as error:  # noqa: BLE001
                    log.debug("nixl: %s was gone already: %s", remote, error)

    def close(self) -> None:
        self._closing.set()
        self._progress.join()
        deadline = time.monotonic() + SETTLE_S
        while self.lost_peers and time.monotonic() < deadline:
            self._agent.get_new_notifs()
            time.sleep(ACTIVE_S)
        self._agent = None


class NixlLink:
    """A `kvstore.transports.one_sided.Link`."""

    def __init__(self, library: NixlLibrary, agent: Any, remote: str, timeout_s: float) -> None:
        self._library, self._remote, self._timeout_s = library, remote, timeout_s
        self._agent: Any = agent
        self._last_used = 0.0

    def move(self, operation: Operation, remote: Sequence[int], local: Sequence[int], lengths: Sequence[int]) -> None:
        agent = self._agent
        if agent is None:
            raise PeerLost("this peer was closed")
        try:
            self._move(agent, operation, remote, local, lengths)
        except (PeerLost, TransferTimeout):
            self._library.lost_peers += 1
            raise

    def _move(
        self, agent: Any, operation: Operation, remote: Sequence[int], local: Sequence[int], lengths: Sequence[int]
    ) -> None:
        with lost_peer(self._remote):
            self._wake(agent)
            ours = agent.get_xfer_descs(_columns(local, lengths), "DRAM")
            theirs = agent.get_xfer_descs(_columns(remote, lengths), "DRAM")
            handle = agent.initialize_xfer(operation.upper(), ours, theirs, self._remote, b"moved")
            try:
                self._finish(agent, handle)
            finally:
                with suppress(Exception):  # a failed transfer's handle may be gone with its endpoint
                    agent.release_xfer_handle(handle)

    def _wake(self, agent: Any) -> None:
        """The other side calls in often from now on."""
        now = time.monotonic()
        if now - self._last_used > ACTIVE_FOR_S / 2:
            agent.send_notif(self._remote, b"moving")
        self._last_used = now

    def _finish(self, agent: Any, handle: Any) -> None:
        """Returns, or raises, when the library is done with our memory."""
        deadline = time.monotonic() + self._timeout_s
        state = agent.transfer(handle)
        for _ in range(SPINS):
            if state != "PROC":
                break
            state = agent.check_xfer_state(handle)
        while state == "PROC" and time.monotonic() < deadline:
            time.sleep(POLL_S)
            state = agent.check_xfer_state(handle)
        if state == "PROC":
            self._abort(agent, handle)
            raise TransferTimeout(f"{self._remote} did not finish a transfer within {self._timeout_s} s")
        if state != "DONE":
            raise PeerLost(f"the transfer from or to {self._remote} failed ({state})")

    def _abort(self, agent: Any, handle: Any) -> None:
        """Tear the endpoint down and wait, however long: memory that is still written must not be reused."""
        self._library.disconnect(self._remote, torn=True)
        began = logged = time.monotonic()
        while self._still_runs(agent, handle):
            time.sleep(POLL_S)
            if time.monotonic() - logged > STUCK_LOG_S:
                logged = time.monotonic()
                log.error("nixl has not ended a transfer %.0f s after its peer was dropped", logged - began)

    def _still_runs(self, agent: Any, handle: Any) -> bool:
        try:
            with lost_peer(self._remote):
                state: str = agent.check_xfer_state(handle)
        except PeerLost:
            return False
        return state == "PROC"

    def close(self) -> None:
        if self._agent is not None:
            self._agent = None
            self._library.disconnect(self._remote)


@contextmanager
def lost_peer(remote: str) -> Iterator[None]:
    """The library's errors, which share no base of their own, as ours."""
    try:
        yield
    except (PeerLost, TransferTimeout):
        raise
    except Exception as error:
        raise PeerLost(f"nixl cannot reach {remote}: {error}") from error


def _columns(addresses: Sequence[int], lengths: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Rows of address, length, device."""
    rows = np.zeros((len(addresses), 3), dtype=np.uint64)
    rows[:, 0], rows[:, 1] = addresses, lengths
    return rows


def _load() -> Any:
    """The library reads its settings from the environment when it is loaded; what the user has set there counts."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "ERROR")
    os.environ.setdefault("UCX_LOG_LEVEL", "FATAL")
    try:
        import nixl._api as api
    except ImportError as error:
        raise ConfigError(
            f"the transport nixl needs its library ({error}): `make transports` installs it; by hand pip install "
            "--no-deps nixl==1.5.1 nixl-cu12==1.5.1, as its declared dependencies are 5.9 GB",
            key="transports",
        ) from error
    return api
