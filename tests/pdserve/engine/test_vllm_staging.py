"""What the vLLM engine keeps of KV without vLLM: board, staging, fills, and the news of both caches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.base import StepResult
from pdserve.engine.memory import LocalMemory
from pdserve.engine.vllm.board import Ending, TransferBoard
from pdserve.engine.vllm.fills import Fills
from pdserve.engine.vllm.news import ELSEWHERE, CacheChange, CacheNews
from pdserve.engine.vllm.staging import StagingPool

# Board


def test_a_transfer_is_as_far_as_its_slowest_rank_and_ends_with_its_last() -> None:
    board = TransferBoard.create(num_ranks=2, num_slots=4)
    other = TransferBoard.attach(board.path, 2, 4)
    other.advance(0, 3, 64)
    assert board.num_tokens(3) == 0
    other.advance(1, 3, 32)
    assert board.num_tokens(3) == 32
    other.end(0, 3, Ending.DONE)
    assert not board.ended(3)
    other.end(1, 3, Ending.STALE)
    assert board.ended(3)
    assert board.ending(3) is Ending.STALE
    assert not board.ended(2)
    board.start(3)
    assert not other.ended(3)
    assert other.num_tokens(3) == 0
    board.close()
    board.close()
    other.close()


def test_a_board_whose_owner_is_gone_cannot_be_attached() -> None:
    board = TransferBoard.create(1, 1)
    path = board.path
    board.close()
    with pytest.raises(OSError, match="No such file"):
        TransferBoard.attach(path, 1, 1)


# Staging


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.sampled_from(["take", "retire", "end"]), st.integers(1, 6), st.integers(0, 3)), max_size=60)
)
def test_nothing_is_owned_twice_or_lost_whatever_the_order_of_ends(steps: list[tuple[str, int, int]]) -> None:
    board = TransferBoard.create(1, 4)
    pool = StagingPool(LocalMemory(12, 8), board)
    held: list[tuple[list[int], list[int]]] = []
    running: set[int] = set()
    for what, count, pick in steps:
        if what == "take" and (room := pool.allocate(count, pick)) is not None:
            assert not {block for blocks, _ in held for block in blocks} & set(room[0])
            assert not running & set(room[1]), "a slot was given away while its transfer ran"
            held.append(room)
            running.update(room[1])
        elif what == "retire" and held:
            blocks, slots = held.pop(pick % len(held))
            pool.retire_blocks(blocks, slots)
            for slot in slots:
                pool.retire_slot(slot)
        elif what == "end" and running:
            slot = sorted(running)[pick % len(running)]
            running.discard(slot)
            board.end(0, slot, Ending.DONE)
            pool.collect()
        pool.check_integrity([blocks for blocks, _ in held])
    for blocks, slots in held:
        pool.retire_blocks(blocks, slots)
        for slot in slots:
            pool.retire_slot(slot)
    for slot in running:
        board.end_all(slot)
    pool.collect()
    assert (pool.num_free_blocks, pool.num_free_slots, pool.retiring) == (12, 4, False)
    board.close()


def test_blocks_stay_until_vllm_has_let_go_of_them() -> None:
    board = TransferBoard.create(1, 2)
    pool = StagingPool(LocalMemory(4, 8), board)
    room = pool.allocate(4, 1)
    assert room is not None
    blocks, (slot,) = room
    pool.retire_blocks(blocks, [slot])
    assert pool.retiring
    assert pool.allocate(1, 0) is None
    board.end(0, slot, Ending.DROPPED)
    pool.collect()
    again = pool.allocate(4, 0)
    assert again is not None
    assert pool.memory.generations.tolist() == [2, 2, 2, 2]
    board.close()


KEYS = [bytes([number]) * 16 for number in range(8)]


def staging(num_blocks: int, num_slots: int = 4) -> StagingPool:
    return StagingPool(LocalMemory(num_blocks, 8), TransferBoard.create(1, num_slots))


def take(pool: StagingPool, num_blocks: int, num_slots: int = 0) -> tuple[list[int], list[int]]:
    room = pool.allocate(num_blocks, num_slots)
    assert room is not None
    return room


def test_a_published_block_is_found_until_its_room_is_needed() -> None:
    pool = staging(4)
    blocks, _ = take(pool, 3)
    for block, key in zip(blocks, KEYS, strict=False):
        assert pool.publish(block, key) == block
    assert len(set(pool.digests(blocks))) == 1
    assert all(pool.digests(blocks))
    pool.retire_blocks(blocks)
    assert pool.num_free_blocks == 4
    assert pool.hold(KEYS) == blocks
    pool.retire_blocks(blocks[:1])
    take(pool, 2)
    assert pool.books.take_evicted() == [KEYS[0]]
    assert pool.hold(KEYS) == []
    assert pool.hold(KEYS[1:]) == blocks[1:], "what is held is not given away"


def test_the_first_block_under_a_key_stays_it_with_the_digest_it_had() -> None:
    pool = staging(2)
    (first, second), _ = take(pool, 2)
    pool.memory.blocks[first] = 3
    pool.publish(first, KEYS[0])
    before = pool.digests([first])
    pool.memory.blocks[first] = 4
    assert pool.publish(second, KEYS[0]) == first
    assert pool.digests([first]) == before


@pytest.mark.parametrize("ending", [Ending.CORRUPT, Ending.STALE])
def test_blocks_that_a_load_found_bad_are_found_no_more(ending: Ending) -> None:
    pool = staging(4)
    blocks, (slot,) = take(pool, 3, 1)
    for block, key in zip(blocks, KEYS, strict=False):
        pool.publish(block, key)
    pool.retire_blocks(blocks, [slot])
    pool.board.advance(0, slot, 20)
    pool.board.end(0, slot, ending)
    pool.collect()
    assert pool.books.lookup(KEYS) == blocks[:1]
    assert set(pool.books.take_evicted()) == set(KEYS[1:3])
    pool.check_integrity()


def test_grants_come_in_order_and_a_new_transfer_has_none() -> None:
    board = TransferBoard.create(1, 2)
    other = TransferBoard.attach(board.path, 1, 2)
    for block in range(20):
        board.grant(1, block)
        assert other.granted(1, block) == [block]
    board.start(1)
    assert other.granted(1, 0) == []
    other.refuse("key\nwhy " + "x" * 600)
    assert board.refusal.startswith("key\nwhy x")
    board.close()
    other.close()


# Fills


def filler(num_blocks: int) -> tuple[StagingPool, CacheNews, Fills]:
    pool = staging(num_blocks)
    news = CacheNews(pool, None)
    return pool, news, Fills(pool, news)


def test_a_fill_is_found_once_it_is_committed_and_told_of() -> None:
    pool, news, fills = filler(6)
    target = fills.open(5, KEYS[:4], 0)
    assert target is not None
    assert (len(target.blocks), target.num_cached_blocks) == (4, 0)
    assert pool.books.lookup(KEYS) == []
    assert fills.is_open(5)
    fills.commit(5, 3)
    assert pool.books.lookup(KEYS) == list(target.blocks[:3])
    news.flush(result := StepResult())
    (told,) = result.published
    assert (told.handle, told.first_block, told.keys, told.blocks) == (5, 0, tuple(KEYS[:3]), target.blocks[:3])
    assert fills.close(5) == 3
    assert pool.num_free_blocks == 6
    pool.check_integrity()


def test_a_fill_takes_what_is_staged_and_asks_only_for_the_rest() -> None:
    pool, _, fills = filler(4)
    fills.open(1, KEYS[:2], 0)
    fills.commit(1, 2)
    fills.close(1)
    target = fills.open(2, KEYS[:4], 0)
    assert target is not None
    assert target.num_cached_blocks == 2
    assert fills.open(3, KEYS[4:6], 0) is None, "no room"
    fills.commit(2, 0)
    assert pool.books.lookup(KEYS) == list(target.blocks[:2]), "what was cached stays so"
    assert fills.close(2) == 0
    pool.check_integrity()


def test_a_fill_that_is_open_stays_for_its_writer() -> None:
    pool, _, fills = filler(2)
    fills.open(1, KEYS[:2], 0)
    with pytest.raises(ValueError, match="under way"):
        fills.open(1, KEYS[:2], 0)
    with pytest.raises(ValueError, match="no blocks"):
        fills.open(2, KEYS[:2], 2)
    assert not fills.give_way()
    fills.close(1)
    assert pool.num_free_blocks == 0, "its writer may be at it"
    fills.close(1, open_too=True)
    fills.close(1, open_too=True)
    assert pool.num_free_blocks == 2
    fills.commit(1, 2)
    fills.open(3, KEYS[:2], 0)
    fills.commit(3, 2)
    assert fills.give_way()
    assert pool.books.lookup(KEYS) != []
    pool.check_integrity()


# News


class Events:
    """What vLLM would tell."""

    def __init__(self, *changes: CacheChange) -> None:
        self.changes = list(changes)
        self.vllm_config: dict[str, object] = {}

    async def run(self) -> None: ...

    def take(self) -> list[CacheChange]:
        taken, self.changes = self.changes, []
        return taken

    def close(self) -> None: ...


def test_a_key_is_lost_when_neither_cache_has_it() -> None:
    pool = staging(2)
    events = Events(CacheChange(stored=(KEYS[0], KEYS[1])))
    news = CacheNews(pool, events)
    (block,), _ = take(pool, 1)
    pool.publish(block, KEYS[0])
    news.took(9, 0, KEYS[:1], [block])
    news.follow()
    news.flush(result := StepResult())
    assert [(told.handle, told.keys) for told in result.published] == [(9, (KEYS[0],)), (ELSEWHERE, (KEYS[1],))]
    assert not result.evicted
    assert not news
    pool.retire_blocks([block])
    take(pool, 2)
    assert news
    news.flush(result := StepResult())
    assert not result.evicted, "vLLM has it"
    events.changes = [CacheChange(removed=(KEYS[0],)), CacheChange(cleared=True)]
    news.follow()
    news.flush(result := StepResult())
    assert set(result.evicted) == {KEYS[0], KEYS[1]}
    assert news.keys() == []


def test_what_is_lost_within_the_step_is_not_told_as_there() -> None:
    pool = staging(2)
    news = CacheNews(pool, Events(CacheChange(stored=(KEYS[0], KEYS[1])), CacheChange(removed=(KEYS[1],))))
    news.follow()
    news.flush(result := StepResult())
    assert [told.keys for told in result.published] == [(KEYS[0],)]
    assert result.evicted == [KEYS[1]]
