"""Where KV lies while peers read or write it: in the pool itself, or in host memory beside a device's pool.

`handover.py` keeps the books of exports and imports in terms of pool blocks; an area says which blocks of the
registered memory stand for them. On a CPU engine they are the same blocks and a hand-over is one copy; on a device
engine chunks go through a small staging area, and wait for room in it without holding up the decodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Protocol

import numpy as np

from pdserve.engine.base import KVMemory, KVMemoryFactory
from pdserve.engine.core.blocks import BlockManager, CachePolicy
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.runner import ModelRunner
from pdserve.errors import HandoverError

Blocks = Sequence[int]
Clock = Callable[[], float]
"""Seconds."""


class HandoverArea(Protocol):
    """Block numbers are the pool's where a name says `pool_blocks`, else those of `memory`."""

    @property
    def memory(self) -> KVMemory: ...

    @property
    def pool(self) -> BlockManager: ...

    @property
    def staged(self) -> bool:
        """Whether exports wait for room."""
        ...

    def export(self, pool_blocks: Blocks) -> list[int]:
        """Take over the caller's hold on these blocks, or on as many leading ones as there is room for: the blocks
        that peers may read instead, until `release`."""
        ...

    def release(self, blocks: Blocks) -> None:
        """Exported blocks that no peer reads any more."""
        ...

    def generations_of(self, blocks: Blocks) -> tuple[int, ...]: ...

    @property
    def import_room(self) -> int:
        """Blocks for which `open_import` has room now."""
        ...

    def open_import(self, pool_blocks: Blocks) -> list[int] | None:
        """Where peers' bytes for these blocks are to be written; None while there is no room. Raises
        `HandoverError` if there never will be."""
        ...

    def commit_import(self, blocks: Blocks, pool_blocks: Blocks) -> None:
        """The bytes have arrived: bring them into the pool."""
        ...

    def abandon_import(self, blocks: Blocks) -> None:
        """The bytes are not wanted any more."""
        ...

    def check_integrity(self, pool: Iterable[Blocks], exported: Iterable[Blocks], imported: Iterable[Blocks]) -> None:
        """`pool`: what is held of the pool otherwise."""
        ...


class DirectArea:
    """The pool is host memory: peers read and write its blocks."""

    staged = False

    def __init__(self, runner: ModelRunner, memory: KVMemory, policy: CachePolicy | None, clock: Clock) -> None:
        self.memory = memory
        self.pool = BlockManager(memory.generations, policy, clock)
        runner.allocate(len(memory.generations), memory.blocks)

    def export(self, pool_blocks: Blocks) -> list[int]:
        return list(pool_blocks)

    def release(self, blocks: Blocks) -> None:
        self.pool.free(blocks)

    def generations_of(self, blocks: Blocks) -> tuple[int, ...]:
        return self.pool.generations_of(blocks)

    @property
    def import_room(self) -> int:
        return self.pool.num_blocks

    def open_import(self, pool_blocks: Blocks) -> list[int]:
        return list(pool_blocks)

    def commit_import(self, blocks: Blocks, pool_blocks: Blocks) -> None:
        """They are in the pool already."""

    def abandon_import(self, blocks: Blocks) -> None:
        """They belong to the importing request, which frees them."""

    def check_integrity(self, pool: Iterable[Blocks], exported: Iterable[Blocks], imported: Iterable[Blocks]) -> None:
        self.pool.check_integrity(chain(pool, exported))


class StagedArea:
    """The pool is on a device: blocks are copied through host memory."""

    staged = True

    def __init__(
        self, runner: ModelRunner, memory: KVMemory, num_pool_blocks: int, policy: CachePolicy | None, clock: Clock
    ) -> None:
        self.memory = memory
        self.pool = BlockManager(np.zeros(num_pool_blocks, dtype=np.uint64), policy, clock)
        self._staging = BlockManager(memory.generations)
        self._runner = runner
        runner.allocate(num_pool_blocks, None)

    def export(self, pool_blocks: Blocks) -> list[int]:
        count = min(len(pool_blocks), self._staging.num_available)
        if not count:
            return []
        blocks = self._staging.allocate(count)
        self._runner.stage_out(pool_blocks[:count], self.memory.blocks, blocks)
        self.pool.free(pool_blocks[:count])
        return blocks

    def release(self, blocks: Blocks) -> None:
        self._staging.free(blocks)

    def generations_of(self, blocks: Blocks) -> tuple[int, ...]:
        return self._staging.generations_of(blocks)

    @property
    def import_room(self) -> int:
        return self._staging.num_available

    def open_import(self, pool_blocks: Blocks) -> list[int] | None:
        if len(pool_blocks) > self._staging.num_blocks:
            raise HandoverError(
                f"a chunk of {len(pool_blocks)} blocks does not fit the staging area of {self._staging.num_blocks}: "
                "import it in parts, lower the exporter's chunk_tokens or raise staging_blocks"
            )
        return self._staging.allocate(len(pool_blocks)) if len(pool_blocks) <= self._staging.num_available else None

    def commit_import(self, blocks: Blocks, pool_blocks: Blocks) -> None:
        self._runner.stage_in(self.memory.blocks, blocks, pool_blocks)
        self._staging.free(blocks)

    def abandon_import(self, blocks: Blocks) -> None:
        self._staging.free(blocks)

    def check_integrity(self, pool: Iterable[Blocks], exported: Iterable[Blocks], imported: Iterable[Blocks]) -> None:
        self.pool.check_integrity(pool)
        self._staging.check_integrity(chain(exported, imported))


def open_area(
    runner: ModelRunner,
    memory_factory: KVMemoryFactory,
    config: CoreConfig,
    policy: CachePolicy | None = None,
    clock: Clock = time.monotonic,
) -> HandoverArea:
    """The area that suits the runner, and its KV pool in it; `policy` decides what the prefix cache gives up."""
    block_bytes = runner.layout.block_bytes
    if runner.pool_is_host_memory:
        return DirectArea(runner, memory_factory(config.num_blocks, block_bytes), policy, clock)
    num_staging = config.staging_blocks or max(1, config.num_blocks // 4)
    return StagedArea(runner, memory_factory(num_staging, block_bytes), config.num_blocks, policy, clock)
