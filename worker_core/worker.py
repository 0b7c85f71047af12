"""One worker: an engine in its thread, the services that routers and peers call, and the way in and out of life.

`Worker` runs inside any event loop and keeps no process-wide state, so a test or a simulation can run many in one
process. Its role is a value: it says what the worker tells routers it wants to do; every phase is served either way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from prometheus_client import CollectorRegistry

from kvstore.handover.exporter import ExportLedger, ExportLimits
from kvstore.transports.segment import host_id
from pdserve.config import WorkerConfig, split_address
from pdserve.engine.base import HandoverEngine, KVMemoryFactory
from pdserve.errors import Draining, EngineFailed, PdserveError
from pdserve.http_status import Answer, StatusServer
from pdserve.metrics import CONTENT_TYPE, WorkerMetrics, render
from pdserve.rpc import RpcServer, ServerStream
from pdserve.types import EngineLoad, Role, WorkerInfo
from pdserve.wire.handover import BIND, RELEASE, RENEW, Bind, Bound
from pdserve.wire.session import SESSION, RouterUpdate, WorkerHello, WorkerUpdate
from worker_core.engine_thread import EngineThread, Round
from worker_core.exporter import Exporter
from worker_core.identity import fingerprint
from worker_core.jobs import JobTable
from worker_core.memory_port import MemoryPort, advertised_host
from worker_core.puller import Puller
from worker_core.registration import Registration, make_registration
from worker_core.session import Session
from worker_core.store import StoreSide
from worker_core.traces import make_traces

STOP_GRACE_S = 2.0
"""For the last messages to leave: streams end by themselves once they are written."""

EngineBuilder = Callable[[WorkerConfig, KVMemoryFactory], HandoverEngine]

log = logging.getLogger("pdserve.worker")


class Worker:
    """Starts, serves, drains, stops. `info`, `address` and `http_port` are known after `start`."""

    info: WorkerInfo
    address: str
    http_port: int

    def __init__(self, config: WorkerConfig, role: Role, build_engine: EngineBuilder) -> None:
        self._config = config
        self._role = role
        self._build_engine = build_engine
        self.incarnation = time.time_ns()
        self.registry = CollectorRegistry()
        self.port = MemoryPort(config)
        self.engine = EngineThread(self._build, on_round=self._on_round, on_failed=self._on_failed)
        paths = {"/healthz": self._healthz, "/readyz": self._readyz, "/metrics": self._render_metrics}
        self._status = StatusServer(*split_address(config.http_listen, "http_listen"), paths)
        self._session_numbers = count()
        self._load: EngineLoad | None = None
        self._ready = asyncio.Event()
        self._draining = False
        self._registration: Registration | None = None
        self._state = "loading"
        self.failed: asyncio.Future[PdserveError] = asyncio.get_running_loop().create_future()
        """Done when the engine broke: the process should end."""

    # ---- life ----

    async def start(self) -> None:
        """Load the model, register its memory, serve. Raises `ConfigError` and whatever the engine raises."""
        self.http_port = await self._status.start()
        engine = await self.engine.start()
        self.port.open()
        self._load = await self.engine.call(lambda engine: engine.load())
        self._assemble(engine, await self._start_rpc(), self._load.num_total_blocks)
        self.store.start()
        await self._server.set_serving(True)
        self._state = "ready"
        self._ready.set()
        if self._config.registry.url:
            self._registration = make_registration(self._config.registry, self.info)
            self._registration.start()

    def _build(self) -> HandoverEngine:
        """In the engine's thread."""
        return self._build_engine(self._config, self.port.make_pool)

    async def _start_rpc(self) -> int:
        self._server = RpcServer(
            self._config.listen, tls=self._config.tls.rpc(), allow_plaintext=self._config.allow_plaintext
        )
        self._server.add(SESSION, self._serve_session)
        self._server.add(BIND, self._bind)
        self._server.add(RENEW, lambda request: self.exporter.renew(request))
        self._server.add(RELEASE, lambda request: self.exporter.release(request))
        return await self._server.start()

    def _assemble(self, engine: HandoverEngine, port: int, num_blocks: int) -> None:
        config, pool = self._config, self.port.pool
        self.address = config.advertise or f"{advertised_host(config)}:{port}"
        self.info = self._describe(engine, num_blocks)
        self._metrics = WorkerMetrics(self.registry, self.info.model.name)
        self.jobs = JobTable(self.engine, self.info.model.name, self._metrics)
        self.jobs.traces = make_traces(config.tracing, self.info)
        ledger = ExportLedger(
            self.info.worker_id,
            self.incarnation,
            self.info.fingerprint,
            self.address,
            clock=time.monotonic,
            limits=ExportLimits(lease_s=config.ticket_lease_s),
        )
        self.exporter = Exporter(
            ledger, self.engine, pool, self.jobs, self._metrics, offers=self.port.offers, host_id=self.info.host_id
        )
        self.puller = Puller(config, self.info, self.engine, self.jobs, self._metrics, self.port)
        self.store = StoreSide(
            config, self.info, engine, self.engine, self.jobs, self._metrics, self.port, self._tokens_waiting
        )
        self.jobs.exports, self.jobs.imports, self.jobs.store = self.exporter, self.puller, self.store

    def _describe(self, engine: HandoverEngine, num_blocks: int) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self._config.worker_id or f"{self._role.value}-{self.address}",
            incarnation=self.incarnation,
            role=self._role,
            address=self.address,
            model=replace(engine.model, name=self._config.model_name or engine.model.name),
            fingerprint=fingerprint(engine.layout),
            block_tokens=engine.layout.block_tokens,
            num_blocks=num_blocks,
            max_num_seqs=self._config.max_num_seqs,
            transports=tuple(self._config.transports),
            host_id=host_id(),
            labels=tuple(sorted(self._config.labels.items())),
            store_address=self._config.store_advertise or self._config.store,
        )

    async def drain(self) -> None:
        """Take nothing new and let what runs finish (exports wait for their pulls), for `drain_timeout_s` at most.
        `stop` should follow. Safe to call again."""
        if self._draining:
            return
        self._draining = self.jobs.draining = True
        self._state = "draining"
        leaving = asyncio.ensure_future(self._registration.leave()) if self._registration else None
        log.info("draining", extra={"requests": len(self.jobs)})
        await self._server.set_serving(False)
        for session in self.jobs.sessions:
            session.set_draining()
        try:
            await asyncio.wait_for(self.jobs.wait_empty(), self._config.drain_timeout_s)
        except TimeoutError:
            log.warning("drain timed out", extra={"requests": len(self.jobs)})
        await self.store.flush()
        if leaving is not None:
            await leaving

    async def stop(self) -> None:
        """End at once: requests fail, streams end, memory is unlinked. Idempotent."""
        if self._registration is not None:
            await self._registration.close()
        if self._ready.is_set():
            self._ready.clear()
            self.jobs.fail_all(Draining("this worker has stopped; submit elsewhere"))
            for session in self.jobs.sessions:
                session.close()
            await self._server.stop(STOP_GRACE_S)
            await self.store.stop()
            await self.puller.stop()
            self.exporter.close()
            self.jobs.close()
            if self.jobs.traces is not None:
                await asyncio.to_thread(self.jobs.traces.close)
        await self.engine.stop()
        self.port.close()
        await self._status.stop()

    def set_role(self, role: Role) -> None:
        """Take another role: routers hear of it on their streams."""
        self._role = role
        self.info = replace(self.info, role=role)
        for session in self.jobs.sessions:
            session.set_hello(WorkerHello(self.info))

    def _tokens_waiting(self) -> int:
        return self._load.num_prefill_tokens_waiting if self._load is not None else 0

    @property
    def kv_bytes_pulled(self) -> int:
        """KV that hand-over has brought here since start."""
        return self.puller.bytes_pulled

    # ---- services ----

    async def _serve_session(self, stream: ServerStream[RouterUpdate, WorkerUpdate]) -> None:
        await self._ready.wait()
        session = Session(next(self._session_numbers), stream, self.jobs, self._config.session_buffer_steps)
        self.jobs.add_session(session)
        self._metrics.sessions.inc()
        session.follow_cache(self.store.feed())
        if self._load is not None:
            session.set_load(self._load)
        if self._draining:
            session.set_draining()
        try:
            await session.run(WorkerHello(self.info))
        finally:
            self.jobs.drop_session(session)
            self._metrics.sessions.dec()
            log.info("session ended", extra={"router_id": session.router_id})

    async def _bind(self, request: Bind) -> Bound:
        self.port.refresh_tls()
        return await self.exporter.bind(request)

    def _healthz(self) -> Answer:
        return Answer(503, b"the engine failed\n") if self.failed.done() else Answer(200, b"ok\n")

    def _readyz(self) -> Answer:
        return Answer(200 if self._state == "ready" else 503, f"{self._state}\n".encode())

    def _render_metrics(self) -> Answer:
        return Answer(200, render(self.registry), CONTENT_TYPE)

    # ---- from the engine's thread, on the loop ----

    def _on_round(self, round_: Round) -> None:
        if not self._ready.is_set():
            return  # not serving yet, or no more: no request is here
        try:
            self._tell_cache(round_)
        finally:
            self.jobs.on_round(round_)  # tokens first of all: what is told of a cache must not cost one
        if round_.load is not None:
            self._load = replace(round_.load, kv_bytes_pulled=self.kv_bytes_pulled)
            for session in self.jobs.sessions:
                session.set_load(self._load)
            self._count_load(self._load)

    def _tell_cache(self, round_: Round) -> None:
        delta = self.store.on_round(round_)
        if delta:
            self.jobs.tell_cache(delta)

    def _count_load(self, load: EngineLoad) -> None:
        metrics = self._metrics
        metrics.num_requests_running.set(load.num_running)
        metrics.num_requests_waiting.set(load.num_waiting)
        metrics.kv_cache_usage.set(1.0 - load.num_free_blocks / max(1, load.num_total_blocks))
        metrics.num_preemptions.set(load.num_preemptions)
        metrics.prefix_cache_queries.set(load.prefix_cache_queries)
        metrics.prefix_cache_hits.set(load.prefix_cache_hits)
        metrics.num_exported_blocks.set(load.num_exported_blocks)

    def _on_failed(self, error: EngineFailed) -> None:
        """Tell every router, then let the process end."""
        log.error("engine failed", exc_info=error)
        self._state = "failed"
        if self._ready.is_set():
            self.jobs.fail_all(error)
            for session in self.jobs.sessions:
                session.close(error)
        if not self.failed.done():
            self.failed.set_result(error)
