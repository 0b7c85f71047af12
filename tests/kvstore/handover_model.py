"""A tiny world around the two hand-over ledgers: prefill and decode workers with real pools, a router, a bad network.

Everything is synchronous and under the test's control: messages lie in `World.wire` until the test delivers, drops
or doubles them; pulls lie in a decode worker's `pulls` until the test runs them; time moves when the test says so.
The pools are real shared memory and the read is the real `pull_blocks`, so a block that is reused under a read is
reused for real.

To drive other engines, pass classes with the methods of `PrefillEngine` / `DecodeEngine` to `World`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from handover_engines import BLOCK_BYTES, BLOCK_TOKENS, DecodeEngine, DecodeJob, PrefillEngine, PrefillJob
from numpy.typing import NDArray

from kvstore.handover import actions as act
from kvstore.handover.exporter import (
    Announce,
    CancelRequest,
    Expired,
    ExportAction,
    ExportLedger,
    ExportLimits,
    ReleaseBlocks,
)
from kvstore.handover.importer import ImportLedger
from kvstore.handover.incoming import ImportLimits
from kvstore.handover.verify import DigestPolicy, PoolDescriptor, digest_blocks, pull_blocks
from kvstore.transports.base import Arrived, Range, ignore
from kvstore.transports.shm import SharedMemoryPool
from pdserve.errors import HandoverError, PdserveError, PeerLost, TicketRefused
from pdserve.wire.session import FirstOutput

FINGERPRINT = b"layout-of-all-16"
EXPORT_LIMITS = ExportLimits(lease_s=30.0, compute_s=60.0, hold_s=100.0)
IMPORT_LIMITS = ImportLimits(
    announce_s=60.0, room_s=40.0, bind_s=10.0, pull_s=50.0, max_bytes_in_flight=4 * BLOCK_BYTES
)


class NoDigests(DigestPolicy):
    """So that generations alone have to tell."""

    def chosen(self, count: int) -> list[int]:
        return []


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


class StepwisePeer:
    """Reads the exporter's pool range by range, in pieces, and lets the test act in between."""

    def __init__(self, memory: SharedMemoryPool, between: Callable[[], None], piece: int = BLOCK_BYTES) -> None:
        self._memory, self._between, self._piece = memory, between, piece

    def read(self, ranges: Sequence[Range], into: NDArray[np.uint8], arrived: Arrived = ignore) -> None:
        for r in ranges:
            for done in range(0, r.length, self._piece):
                take = min(self._piece, r.length - done)
                self._between()
                if self._memory.closed:
                    raise PeerLost("the exporter died")
                source = self._memory.region[r.remote + done : r.remote + done + take]
                into[r.local + done : r.local + done + take] = source
                arrived(Range(r.remote + done, r.local + done, take))

    def write(self, ranges: Sequence[Range], source: NDArray[np.uint8]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


@dataclass
class Message:
    what: str
    deliver: Callable[[], None]


class PrefillWorker:
    """An exporter: engine, ledger, and the shell between them."""

    def __init__(self, world: World, name: str, incarnation: int, num_blocks: int) -> None:
        self.world, self.name, self.incarnation = world, name, incarnation
        self.engine = PrefillEngine(num_blocks)
        self.ledger = ExportLedger(
            name,
            incarnation,
            FINGERPRINT,
            name,
            clock=world.clock,
            limits=EXPORT_LIMITS,
            make_nonce=world.make_nonce,
        )

    def submit(self, handle: int, prompt: int, num_tokens: int, chunk_tokens: int) -> None:
        self.engine.jobs[handle] = PrefillJob(prompt, num_tokens, chunk_tokens)
        self.ledger.open(handle, f"r{handle}", num_tokens)

    def step(self, handle: int) -> None:
        chunk = self.engine.step(handle)
        if chunk is not None:
            digests = digest_blocks(self.engine.pool.memory, chunk.blocks)
            self.do(self.ledger.exported(chunk, digests))
            if chunk.final:
                self.world.relay_outputs(handle)

    def cancel(self, handle: int) -> None:
        self.do(self.ledger.cancel(handle))
        self.engine.cancel(handle)

    def do(self, actions: Sequence[ExportAction]) -> None:
        for action in actions:
            match action:
                case Announce(handle, ticket, manifest):
                    self.world.relay(handle, lambda d, h, t=ticket, m=manifest: d.ledger.relay(h, t, [m]), "manifest")
                case ReleaseBlocks(handle, index):
                    self.engine.export_release(handle, index)
                case CancelRequest(handle):
                    self.engine.cancel(handle)
                case Expired(handle, error):
                    assert isinstance(error, HandoverError)
                    self.world.cancel_decode_of(handle)


@dataclass
class PendingPull:
    action: act.Pull
    stop: bool = False


class DecodeWorker:
    """An importer: engine, ledger, and the shell between them."""

    def __init__(self, world: World, name: str, incarnation: int, num_blocks: int) -> None:
        self.world, self.name, self.incarnation = world, name, incarnation
        self.engine = DecodeEngine(num_blocks)
        self.ledger = ImportLedger(FINGERPRINT, BLOCK_TOKENS, BLOCK_BYTES, clock=world.clock, limits=IMPORT_LIMITS)
        self.reserves: list[act.Reserve] = []
        self.pulls: dict[int, PendingPull] = {}

    def submit(self, handle: int, prompt: int, num_tokens: int, num_cached: int) -> None:
        self.engine.jobs[handle] = DecodeJob(prompt, num_tokens, num_cached)
        self.ledger.expect(handle, num_tokens)

    def try_reserves(self) -> None:
        """What the shell does between two engine steps."""
        waiting, self.reserves = self.reserves, []
        for r in waiting:
            if r.handle not in self.ledger or r.handle not in self.engine.jobs:
                continue
            target = self.engine.import_blocks(r.handle, r.first_token, r.num_tokens)
            if target is None:
                self.reserves.append(r)
            else:
                self.do(self.ledger.reserved(r, target))

    def run_pull(self, pull_id: int, between: Callable[[], None] = lambda: None) -> None:
        """The pull's thread, from start to end; `between` runs before each piece."""
        pending = self.pulls[pull_id]
        pull = pending.action
        peer = StepwisePeer(self.world.pool_of(pull.ticket.worker_id, pull.ticket.incarnation), between)
        source = self.world.descriptor_of(pull.ticket.worker_id, pull.ticket.incarnation)
        try:
            pull_blocks(
                peer,
                source,
                pull.manifest,
                self.engine.pool.memory,
                pull.target,
                NoDigests(),
                should_stop=lambda: pending.stop,
            )
        except PdserveError as error:
            self.finish_pull(pull_id, error)
        else:
            self.finish_pull(pull_id, None)

    def finish_pull(self, pull_id: int, error: PdserveError | None) -> None:
        if self.pulls.pop(pull_id, None) is None:
            return  # the worker died in the middle
        done = self.ledger.pulled(pull_id) if error is None else self.ledger.pull_failed(pull_id, error)
        self.do(done)

    def writes_into(self, handle: int) -> bool:
        return any(p.action.handle == handle for p in self.pulls.values())

    def check_target(self, pull: act.Pull) -> None:
        """Committed blocks are never written again, and no two pulls write one block."""
        assert pull.manifest.first_token >= self.engine.jobs[pull.handle].committed_tokens
        writing = {b for p in self.pulls.values() for b in p.action.target.blocks}
        assert not writing & set(pull.target.blocks)

    def do(self, actions: Sequence[act.ImportAction]) -> None:
        for action in actions:
            self.do_one(action)

    def do_one(self, action: act.ImportAction) -> None:
        match action:
            case act.Reserve():
                self.reserves.append(action)
            case act.Bind(handle, ticket):
                self.world.send_bind(self, handle, ticket)
            case act.Pull(pull_id):
                self.check_target(action)
                self.pulls[pull_id] = PendingPull(action)
            case act.AbortPull(pull_id):
                self.pulls[pull_id].stop = True
            case act.Commit(handle, first_token, num_tokens):
                self.engine.import_commit(handle, first_token, num_tokens)
            case act.Resume(handle):
                self.engine.resume(handle)
                self.world.resumed.add(handle)
            case act.Renew(handle, ticket):
                self.world.send_renew(self, handle, ticket)
            case act.ReleaseRemote(ticket, indexes):
                exporter = ticket.worker_id
                nonce = ticket.nonce
                self.world.to_prefill(exporter, "release", lambda p: p.do(p.ledger.release(nonce, indexes)))
            case act.Failed(handle, error):
                assert isinstance(error, PdserveError)
                self.world.failed[handle] = error
                self.world.cancel_prefill_of(handle)
            case act.FreeLocal(handle):
                assert not self.writes_into(handle), "freed under a writer"
                self.engine.cancel(handle)


class World:
    """Workers by name, the router's table of who has what, and the wire."""

    def __init__(self, num_prefill: int = 2, num_decode: int = 1, prefill_blocks: int = 8, decode_blocks: int = 10):
        self.clock = Clock()
        self.wire: list[Message] = []
        self.sizes = {"p": prefill_blocks, "d": decode_blocks}
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        self.pools: dict[tuple[str, int], SharedMemoryPool] = {}
        self.incarnations = 0
        self.nonces = 0
        self.next_handle = 1
        self.legs: dict[int, tuple[str, str, int]] = {}
        """Prefill handle -> its worker, the decode worker, and the handle there."""
        self.prompts: dict[int, tuple[int, int]] = {}
        """Decode handle -> prompt and length."""
        self.resumed: set[int] = set()
        self.failed: dict[int, PdserveError] = {}
        for i in range(num_prefill):
            self.start_prefill(f"p{i}")
        for i in range(num_decode):
            self.start_decode(f"d{i}")

    # --- processes ---

    def start_prefill(self, name: str) -> None:
        """Start, or crash and restart: everything that the old process held is gone."""
        if name in self.prefill:
            self.prefill[name].engine.pool.memory.close()
        self.incarnations += 1
        worker = self.prefill[name] = PrefillWorker(self, name, self.incarnations, self.sizes["p"])
        self.pools[name, worker.incarnation] = worker.engine.pool.memory

    def start_decode(self, name: str) -> None:
        if name in self.decode:
            self.decode[name].pulls.clear()
            self.decode[name].engine.pool.memory.close()
        self.incarnations += 1
        self.decode[name] = DecodeWorker(self, name, self.incarnations, self.sizes["d"])

    def make_nonce(self) -> bytes:
        self.nonces += 1
        return self.nonces.to_bytes(16, "big")

    def pool_of(self, worker_id: str, incarnation: int) -> SharedMemoryPool:
        return self.pools[worker_id, incarnation]

    def descriptor_of(self, worker_id: str, incarnation: int) -> PoolDescriptor:
        pool = self.pool_of(worker_id, incarnation)
        return PoolDescriptor(pool.num_blocks, pool.block_bytes, pool.generations_offset, b"")

    # --- the router ---

    def submit(self, prefill: str, decode: str, num_tokens: int, chunk_tokens: int, num_cached: int = 0) -> int:
        """A new request; returns its decode handle."""
        handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.prompts[handle] = (handle, num_tokens)
        self.decode[decode].submit(handle, handle, num_tokens, num_cached)
        self.submit_prefill(prefill, decode, handle, chunk_tokens)
        return handle

    def submit_prefill(self, prefill: str, decode: str, handle: int, chunk_tokens: int) -> int:
        """Prefill a request that a decode worker expects: at first, or again. Returns the prefill handle."""
        prompt, num_tokens = self.prompts[handle]
        prefill_handle, self.next_handle = self.next_handle, self.next_handle + 1
        self.legs[prefill_handle] = (prefill, decode, handle)
        self.prefill[prefill].submit(prefill_handle, prompt, num_tokens, chunk_tokens)
        return prefill_handle

    def relay(self, handle: int, call: Callable[[DecodeWorker, int], list[act.ImportAction]], what: str) -> None:
        if handle in self.legs:
            _, decode, decode_handle = self.legs[handle]
            self.to_decode(decode, what, lambda d: d.do(call(d, decode_handle)))

    def relay_outputs(self, handle: int) -> None:
        self.relay(handle, lambda d, h: d.ledger.relay(h, outputs=[FirstOutput((7,), False)]), "outputs")

    def cancel_prefill_of(self, decode_handle: int) -> None:
        for handle, (prefill, _, target) in self.legs.items():
            if target == decode_handle:
                self.to_prefill(prefill, "cancel", lambda p, h=handle: p.cancel(h))

    def cancel_decode_of(self, prefill_handle: int) -> None:
        if prefill_handle in self.legs:
            _, decode, handle = self.legs[prefill_handle]
            self.to_decode(decode, "cancel", lambda d: d.do(d.ledger.cancel(handle)))

    # --- the wire ---

    def to_prefill(self, name: str, what: str, call: Callable[[PrefillWorker], None]) -> None:
        self.wire.append(Message(f"{what} -> {name}", lambda: call(self.prefill[name])))

    def to_decode(self, name: str, what: str, call: Callable[[DecodeWorker], None]) -> None:
        self.wire.append(Message(f"{what} -> {name}", lambda: call(self.decode[name])))

    def send_bind(self, decode: DecodeWorker, handle: int, ticket: act.KVTicket) -> None:
        asker, incarnation, name = decode.name, decode.incarnation, ticket.worker_id

        def at_exporter(p: PrefillWorker) -> None:
            try:
                p.ledger.bind(ticket.nonce, ticket.incarnation, asker, incarnation, FINGERPRINT)
            except HandoverError as error:
                self.to_decode(asker, "refused", lambda d, e=error: d.do(d.ledger.bind_failed(handle, ticket.nonce, e)))
            else:
                self.to_decode(asker, "bound", lambda d: d.do(d.ledger.bound(handle, ticket.nonce)))

        self.to_prefill(name, "bind", at_exporter)

    def send_renew(self, decode: DecodeWorker, handle: int, ticket: act.KVTicket) -> None:
        asker = decode.name

        def at_exporter(p: PrefillWorker) -> None:
            try:
                p.ledger.renew(ticket.nonce)
            except TicketRefused as error:
                self.to_decode(
                    asker, "no lease", lambda d, e=error: d.do(d.ledger.renew_refused(handle, ticket.nonce, e))
                )

        self.to_prefill(ticket.worker_id, "renew", at_exporter)

    def deliver(self, index: int = 0) -> None:
        self.wire.pop(index).deliver()

    # --- time ---

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds
        for p in self.prefill.values():
            p.do(p.ledger.tick())
        for d in self.decode.values():
            d.do(d.ledger.tick())

    def run(self, double: bool = False) -> None:
        """No loss, busy workers, until nothing moves; `double` delivers every message twice."""
        for _ in range(1000):
            if not self.move(double):
                return
        raise AssertionError("the world does not come to rest")

    def move(self, double: bool) -> bool:
        """One step of everybody; whether anybody had something to do."""
        moved = bool(self.wire)
        for _ in range(len(self.wire)):
            message = self.wire.pop(0)
            message.deliver()
            if double:
                message.deliver()
        for p in self.prefill.values():
            for handle, job in list(p.engine.jobs.items()):
                done = job.done_tokens
                p.step(handle)
                moved |= job.done_tokens != done
        for d in self.decode.values():
            d.try_reserves()
            for pull_id in list(d.pulls):
                d.run_pull(pull_id)
                moved = True
        return moved or bool(self.wire)

    def settle(self) -> None:
        """The network is dead from now on; running pulls end; then only time passes."""
        self.wire.clear()
        for _ in range(6):
            for d in self.decode.values():
                while d.pulls:
                    d.run_pull(next(iter(d.pulls)))
            self.advance(200.0)
            self.wire.clear()
        for handle in self.resumed:
            for d in self.decode.values():
                d.engine.cancel(handle)  # they decoded to their end

    # --- invariants ---

    def check(self) -> None:
        for worker in (*self.prefill.values(), *self.decode.values()):
            worker.engine.pool.check()

    def check_nothing_is_left(self) -> None:
        for worker in (*self.prefill.values(), *self.decode.values()):
            assert not len(worker.ledger), f"{worker.name} still has a hand-over"
            assert not worker.engine.pool.owner, f"{worker.name} leaks blocks {worker.engine.pool.owner}"
        assert all(d.ledger.bytes_in_flight == 0 for d in self.decode.values())

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()
        for d in self.decode.values():
            d.engine.pool.memory.close()
