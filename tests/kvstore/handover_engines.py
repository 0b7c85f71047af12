"""The engines of the hand-over's tiny world (`handover_model`): block allocators that check every contract. What is
freed was owned, what is committed is right, what is freed is not being written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvstore.transports.shm import SharedMemoryPool
from pdserve.engine.base import ExportedChunk, ImportTarget

BLOCK_TOKENS = 4
BLOCK_BYTES = 64


def content(prompt: int, block: int) -> bytes:
    """What block `block` of prompt `prompt` holds."""
    return hashlib.blake2b(f"{prompt}/{block}".encode(), digest_size=BLOCK_BYTES).digest()


class BlockPool:
    """Hand-over memory with an allocator. Freeing what is not owned fails the test."""

    def __init__(self, num_blocks: int) -> None:
        self.memory = SharedMemoryPool(num_blocks, BLOCK_BYTES)
        self.free = list(range(num_blocks))
        self.owner: dict[int, int] = {}

    def allocate(self, handle: int, count: int) -> list[int] | None:
        """Reuses the block freed last first: the worst case for a late reader."""
        if count > len(self.free):
            return None
        blocks = [self.free.pop() for _ in range(count)]
        for block in blocks:
            self.owner[block] = handle
            self.memory.generations[block] += 1
            self.memory.blocks[block] = 0xEE
        return blocks

    def release(self, handle: int, blocks: Sequence[int]) -> None:
        for block in blocks:
            assert self.owner.pop(block, None) == handle, f"block {block} is freed twice, or by a stranger"
            self.free.append(block)

    def write(self, block: int, data: bytes) -> None:
        self.memory.blocks[block] = np.frombuffer(data, dtype=np.uint8)

    def check(self) -> None:
        assert len(self.free) + len(self.owner) == self.memory.num_blocks
        assert not set(self.free) & set(self.owner)


@dataclass
class PrefillJob:
    prompt: int
    num_tokens: int
    chunk_tokens: int
    done_tokens: int = 0
    chunks: dict[int, list[int]] = field(default_factory=dict)
    next_chunk: int = 0


class PrefillEngine:
    """Computes one chunk when told to; holds its blocks until released."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.jobs: dict[int, PrefillJob] = {}

    def step(self, handle: int) -> ExportedChunk | None:
        job = self.jobs.get(handle)
        if job is None or job.done_tokens == job.num_tokens:
            return None
        count = min(job.chunk_tokens, job.num_tokens - job.done_tokens)
        blocks = self.pool.allocate(handle, -(-count // BLOCK_TOKENS))
        if blocks is None:
            return None
        first = job.done_tokens
        for i, block in enumerate(blocks):
            self.pool.write(block, content(job.prompt, first // BLOCK_TOKENS + i))
        index, job.next_chunk = job.next_chunk, job.next_chunk + 1
        job.chunks[index] = blocks
        job.done_tokens += count
        generations = tuple(int(self.pool.memory.generations[b]) for b in blocks)
        final = job.done_tokens == job.num_tokens
        return ExportedChunk(handle, index, first, count, tuple(blocks), generations, final)

    def export_release(self, handle: int, chunk_index: int | None) -> None:
        job = self.jobs.get(handle)
        if job is None:
            return
        for index in list(job.chunks) if chunk_index is None else [chunk_index]:
            self.pool.release(handle, job.chunks.pop(index, ()))
        if not job.chunks and job.done_tokens == job.num_tokens:
            del self.jobs[handle]

    def cancel(self, handle: int) -> None:
        job = self.jobs.pop(handle, None)
        for blocks in job.chunks.values() if job else ():
            self.pool.release(handle, blocks)


@dataclass
class DecodeJob:
    prompt: int
    num_tokens: int
    num_cached: int
    blocks: list[int] | None = None
    committed_tokens: int = 0
    resumed: bool = False


class DecodeEngine:
    """Reserves a prompt's blocks all at once, checks every commit."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.jobs: dict[int, DecodeJob] = {}

    def import_blocks(self, handle: int, first_token: int, num_tokens: int) -> ImportTarget | None:
        job = self.jobs[handle]
        if job.blocks is None:
            job.blocks = self.pool.allocate(handle, -(-job.num_tokens // BLOCK_TOKENS))
            if job.blocks is None:
                return None
            for i in range(job.num_cached):
                self.pool.write(job.blocks[i], content(job.prompt, i))
        first = first_token // BLOCK_TOKENS
        count = -(-num_tokens // BLOCK_TOKENS)
        cached = max(0, min(job.num_cached - first, count))
        return ImportTarget(tuple(job.blocks[first : first + count]), cached)

    def import_commit(self, handle: int, first_token: int, num_tokens: int) -> None:
        job = self.jobs[handle]
        assert job.blocks is not None
        assert first_token == job.committed_tokens, "commits come in order, once"
        job.committed_tokens += num_tokens
        self.check_content(job, first_token, num_tokens)

    def resume(self, handle: int) -> None:
        job = self.jobs[handle]
        assert job.committed_tokens == job.num_tokens
        assert not job.resumed
        self.check_content(job, 0, job.num_tokens)
        job.resumed = True

    def check_content(self, job: DecodeJob, first_token: int, num_tokens: int) -> None:
        assert job.blocks is not None
        for i in range(first_token // BLOCK_TOKENS, -(-(first_token + num_tokens) // BLOCK_TOKENS)):
            assert self.pool.memory.blocks[job.blocks[i]].tobytes() == content(job.prompt, i), "a wrong block"

    def cancel(self, handle: int) -> None:
        job = self.jobs.pop(handle, None)
        if job is not None and job.blocks is not None:
            self.pool.release(handle, job.blocks)
