"""The router process: one core, two faces, a fleet of workers; in which order they start, drain and stop."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.metadata
import logging
import math
import os
import ssl
import time
import uuid

from prometheus_client import CollectorRegistry, ProcessCollector

from kvstore.index.index import KVIndex
from kvstore.index.metrics import IndexCollector
from pdserve.config import RouterConfig, TlsConfig
from pdserve.errors import ConfigError, Draining
from pdserve.metrics import RouterMetrics, render
from pdserve.rpc import Heartbeat, RpcServer
from pdserve.tracing import Tracer, tracer_of
from pdserve.wire.session import RouterHello
from router.breakers import BreakerRules
from router.core import CoreOptions, RouterCore
from router.discovery import Discovery, make_discovery
from router.fleet import Fleet
from router.grpc_face import InferenceFace
from router.http.limits import HttpLimits
from router.http.server import AccessRecord, HttpServer
from router.model_setups import model_setups
from router.models import PlacementOptions, maker
from router.observer import count_workers
from router.oip_face import OpenInferenceFace
from router.prefixes import PrefixIndex
from router.stores import Stores
from router.surroundings import Timeouts
from router.traces import RouterTraces

STOP_GRACE_S = 1.0
"""For the last messages of ended calls to leave."""

log = logging.getLogger(__name__)


class Router:
    """Starts, serves, drains, stops. `http_port` and `grpc_port` are known after `start`; `core` as well."""

    core: RouterCore
    http_port: int
    grpc_port: int

    def __init__(self, config: RouterConfig, discovery: Discovery | None = None) -> None:
        """Raises `ConfigError` for discovery that can't begin."""
        self.registry = CollectorRegistry()
        self._config = config
        self._discovery = discovery or make_discovery(config)
        ProcessCollector(registry=self.registry)
        self._metrics = RouterMetrics(
            self.registry, slo_ttft_s=config.slo.ttft_ms / 1000, slo_itl_s=config.slo.itl_ms / 1000
        )
        self._metrics.discovery_up.set_function(lambda: float(self._discovery.answering))
        self._changed = asyncio.Event()
        self._readiness: asyncio.Task[None] | None = None
        self._tracer: Tracer | None = None

    async def start(self) -> None:
        """Load the tokenizers, listen, connect. Raises `ConfigError`."""
        config = self._config
        setups = await asyncio.to_thread(model_setups, config)
        hello = RouterHello(config.router_id or f"router-{uuid.uuid4().hex[:8]}", time.time_ns())
        self._fleet = Fleet(
            self._discovery,
            hello,
            tls=config.worker_tls.rpc(),
            max_backoff_s=config.connect_backoff_s,
            heartbeat=Heartbeat(config.heartbeat_s, config.heartbeats_missed),
            on_change=self._on_change,
            on_lost=lambda link: self._metrics.worker_lost.labels(link.info.role.value).inc(),
        )
        self._prefixes = self._prefix_index()
        make = maker(setups, placement_options(config, seed=hello.incarnation), self._metrics)
        self._tracer = tracer_of(config.tracing, "pdserve-router", hello.router_id)
        traces = RouterTraces(self._tracer) if self._tracer is not None else None
        self.core = RouterCore(core_options(config), self._fleet, self._prefixes, make, traces)
        await self._listen()
        self._fleet.start()
        self._readiness = asyncio.create_task(self._publish_readiness())

    def _prefix_index(self) -> PrefixIndex:
        loop = asyncio.get_running_loop()
        index = KVIndex(max_entries=self._config.index_max_blocks, clock=loop.time)
        self.registry.register(IndexCollector(index))
        stores = Stores(index, self._config.worker_tls.rpc())
        return PrefixIndex(index, stores, self._metrics, loop.time, loop.call_soon)

    async def _listen(self) -> None:
        config, version = self._config, importlib.metadata.version("pdserve")
        self._grpc = RpcServer(
            config.grpc_listen,
            tls=config.tls.rpc(),
            allow_plaintext=config.allow_plaintext,
            max_message_bytes=config.max_body_bytes,
        )
        InferenceFace(self.core, config.client_buffer_bytes).add_to(self._grpc)
        OpenInferenceFace(self.core, config.client_buffer_bytes, version).add_to(self._grpc)
        self._http = HttpServer(
            self.core,
            _http_limits(config),
            metrics=lambda: render(self.registry),
            version=version,
            tls=_http_tls(config.http_tls),
            access_log=_log_access if log.isEnabledFor(logging.DEBUG) else None,
        )
        self.grpc_port = await self._grpc.start()
        host, port = _split(config.http_listen, "http_listen")
        try:
            self.http_port = await self._http.start(host, port)
        except OSError as error:
            raise ConfigError(f"cannot listen on {config.http_listen}: {error.strerror}", key="http_listen") from error

    def _on_change(self) -> None:
        count_workers(self._metrics, self._fleet.links)
        self._changed.set()

    async def _publish_readiness(self) -> None:
        """Health of the gRPC face follows the fleet; HTTP asks the core each time."""
        while True:
            await self._grpc.set_serving(self.core.ready() is None)
            await self._changed.wait()
            self._changed.clear()

    async def drain(self) -> None:
        """Take nothing new, let what runs finish, at most `drain_timeout_s`."""
        log.info("draining", extra={"requests": self.core.admission.num_inflight})
        self.core.admission.draining = True
        self._changed.set()
        timeout_s = self._config.drain_timeout_s
        finished, _ = await asyncio.gather(self.core.drain(timeout_s), self._http.drain(timeout_s))
        if not finished:
            log.warning("drain timed out", extra={"requests": self.core.admission.num_inflight})

    async def stop(self) -> None:
        """End at once: what is left fails with `Draining`. Call it once `start` has returned or raised."""
        if self._readiness is not None:
            self._readiness.cancel()
        if hasattr(self, "core"):
            self.core.close(Draining("this router has stopped; send the request to another one"))
        if hasattr(self, "_http"):
            await self._http.drain(0.0)  # so that what was just failed is still written
            await self._http.close()
        if hasattr(self, "_grpc"):
            await self._grpc.stop(STOP_GRACE_S)
        if hasattr(self, "_fleet"):
            await self._fleet.close()
        if hasattr(self, "_prefixes"):
            await self._prefixes.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)


def core_options(config: RouterConfig) -> CoreOptions:
    timeouts = Timeouts(
        config.prefill_timeout_s, config.transfer_timeout_s, config.decode_timeout_s, config.queue_timeout_s
    )
    return CoreOptions(
        policy=config.policy,
        max_inflight=config.max_inflight,
        max_waiting=config.max_waiting,
        max_retries=config.max_retries,
        timeouts=timeouts,
        num_records=config.records,
        max_queue_s=config.slo.ttft_ms / 1000 if config.slo.enforce else math.inf,
        grace_s=config.worker_grace_s,
    )


def placement_options(config: RouterConfig, seed: int) -> PlacementOptions:
    breaker = config.breaker
    return PlacementOptions(
        policy=config.policy,
        disaggregate=config.disaggregate,
        block_tokens=config.block_tokens,
        secret=config.server_secret.encode() or os.urandom(32),
        breaker=BreakerRules(breaker.failures, breaker.slow_ms / 1000, breaker.rest_s),
        seed=seed,
    )


def _log_access(record: AccessRecord) -> None:
    log.debug("%s %s: %d", record.method, record.path, record.status, extra=dataclasses.asdict(record))


def _http_limits(config: RouterConfig) -> HttpLimits:
    return HttpLimits(
        max_body_bytes=config.max_body_bytes,
        max_unsent_bytes=config.client_buffer_bytes,
        header_timeout_s=config.header_timeout_s,
        body_timeout_s=config.body_timeout_s,
        keep_alive_s=config.keepalive_timeout_s,
    )


def _http_tls(config: TlsConfig) -> ssl.SSLContext | None:
    """Raises `ConfigError` for certificates that can't be used."""
    if not config.cert_file and not config.key_file and not config.ca_file:
        return None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(config.cert_file, config.key_file or None)
        if config.ca_file:
            context.load_verify_locations(config.ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ValueError) as error:
        raise ConfigError(f"http_tls cannot be used: {error}", key="http_tls") from error
    return context


def _split(address: str, key: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{address!r} is not host:port", key=key)
    return host.strip("[]"), int(port)
