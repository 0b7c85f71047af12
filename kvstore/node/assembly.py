"""From a config to the parts of a node's store. Raises `ConfigError` for what can't be had."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

from kvstore.disk import DiskOptions, DiskTier
from kvstore.eviction import POLICIES
from kvstore.handover.verify import PoolDescriptor
from kvstore.node.dram import DramStore
from kvstore.node.entries import Limits
from kvstore.node.events import EventLog
from kvstore.node.feed import EventFeed
from kvstore.node.integrity import Scrubber
from kvstore.node.service import NodeParts
from kvstore.node.sessions import Sessions
from kvstore.node.tenants import Tenants
from kvstore.node.tiers import DISK_CLIENT, DiskEvents, Tiers
from kvstore.node.traces import make_traces
from kvstore.transports.base import Transport
from kvstore.transports.bulk_tls import BulkTls
from kvstore.transports.opening import open_transports
from kvstore.transports.registry import check_names
from kvstore.transports.shm import SharedMemoryPool
from kvstore.transports.tcp import TcpOptions
from pdserve.config import KvstoreConfig, split_address
from pdserve.errors import ConfigError
from pdserve.metrics import KvstoreMetrics
from pdserve.support import never_run

log = logging.getLogger("pdserve.kvstore")

ANY_ADDRESS = ("0.0.0.0", "[::]", "::")


def check_config(config: KvstoreConfig) -> None:
    """What the types can't say."""
    if not config.block_bytes:
        raise ConfigError("the store needs block_bytes: that of the workers' KV layout", key="block_bytes")
    if config.low_watermark > config.high_watermark:
        raise ConfigError("low_watermark is above high_watermark", key="low_watermark")
    if not config.num_blocks and config.memory_bytes < config.block_bytes:
        raise ConfigError("memory_bytes holds not even one block", key="memory_bytes")
    check_names(config.transports)
    advertised_host(config)


def advertised_host(config: KvstoreConfig) -> str:
    """What clients dial."""
    host = split_address(config.advertise or config.listen, "advertise" if config.advertise else "listen")[0]
    if host in ANY_ADDRESS:
        raise ConfigError(f"listening on {host} needs `advertise`: the host:port that clients dial", key="advertise")
    return host


def _transport_host(config: KvstoreConfig) -> str:
    """What peers dial for bulk bytes: where the transport listens, if that is one address. It differs from what
    clients dial where only the gRPC port is forwarded, as a pod's port on its node is."""
    return config.transport_host if config.transport_host not in ("", *ANY_ADDRESS) else advertised_host(config)


class Wires:
    """The transports by which the pool is reached, and their certificates."""

    def __init__(self, config: KvstoreConfig, pool: SharedMemoryPool) -> None:
        tls = config.tls.rpc()
        self._tls = BulkTls(tls) if tls else None
        self._transports: list[Transport] = []
        self.offers: dict[str, bytes] = {}
        options = TcpOptions(
            host=config.transport_host or split_address(config.listen, "listen")[0],
            advertise_host=_transport_host(config),
            progress_timeout_s=config.transfer_timeout_s,
            server_tls=self._tls.server if self._tls else None,
            client_tls=self._tls.client if self._tls else None,
        )
        for line in never_run("store", "cpu", config.transports, config.mooncake):
            log.warning(line)
        opened = open_transports(config.transports, options, config.mooncake)
        self._transports += opened.values()
        for name, transport in opened.items():
            self.offers[name] = PoolDescriptor.of(pool, transport.register(pool.region)).encode()

    def refresh_tls(self) -> None:
        """Certificates may have been renewed in place."""
        if self._tls is not None:
            try:
                self._tls.refresh()
            except ConfigError as error:
                log.warning("renewed certificates are not usable yet", extra={"reason": error.message})

    def close(self) -> None:
        for transport in self._transports:
            transport.close()


async def assemble(config: KvstoreConfig, pool: SharedMemoryPool, wires: Wires, metrics: KvstoreMetrics) -> NodeParts:
    """Everything behind the service; the disk tier is scanned in a thread."""
    incarnation = time.time_ns()
    node = config.node_id or f"kvstore-{socket.gethostname()}"
    sessions, events = Sessions(), EventLog()
    tiers = Tiers(metrics)
    dram = DramStore(
        pool,
        POLICIES[config.eviction](),
        clock=time.monotonic,
        metrics=metrics,
        limits=_limits(config),
        tenants=Tenants(_blocks(config, config.quota_bytes), {t: _blocks(config, n) for t, n in config.quotas.items()}),
        events=events,
        demote=tiers.demote,
        writer_gone=lambda client: False if client == DISK_CLIENT else sessions.gone(client),
        digest_every=config.digest_every,
    )
    tiers.join(dram, await _open_disk(config, DiskEvents(asyncio.get_running_loop(), events, metrics)))
    return NodeParts(
        node=node,
        incarnation=incarnation,
        pool=pool,
        dram=dram,
        tiers=tiers,
        sessions=sessions,
        scrubber=Scrubber(dram),
        feed=EventFeed(node, incarnation, events, tiers.content),
        metrics=metrics,
        offers=wires.offers,
        before_attach=wires.refresh_tls,
        traces=make_traces(config.tracing, node, sessions.is_local),
    )


def _limits(config: KvstoreConfig) -> Limits:
    return Limits(
        high_watermark=config.high_watermark,
        low_watermark=config.low_watermark,
        lease_s=config.lease_s,
        max_lease_s=config.max_lease_s,
        reservation_s=config.reservation_s,
        abandoned_s=config.abandoned_s,
    )


def _blocks(config: KvstoreConfig, nbytes: int) -> int:
    """A quota in blocks; a positive one is at least one block."""
    return -(-nbytes // config.block_bytes)


async def _open_disk(config: KvstoreConfig, observer: DiskEvents) -> DiskTier | None:
    disk = config.disk
    if not disk.path:
        return None
    options = DiskOptions(
        capacity_bytes=disk.capacity_bytes,
        block_bytes=config.block_bytes,
        direct=disk.direct,
        fsync_on_seal=disk.fsync,
        threads=disk.threads,
    )
    return await asyncio.to_thread(DiskTier, disk.path, options, policy=POLICIES[config.eviction], observer=observer)
