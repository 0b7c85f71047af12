"""The block manager alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.engine.core.blocks import BlockManager, OutOfBlocks


def manager(num_blocks=16):
    return BlockManager(np.zeros(num_blocks, dtype=np.uint64))


def key(i):
    return bytes([i]) * 16


def test_a_fresh_pool_gives_neighbours():
    m = manager()
    assert m.allocate(5) == [0, 1, 2, 3, 4]
    assert m.allocate(5) == [5, 6, 7, 8, 9]


def test_the_shortest_run_that_holds_all_is_taken():
    m = manager(32)
    blocks = m.allocate(32)
    m.free(blocks[4:12])
    m.free(blocks[20:23])
    assert m.allocate(3) == [20, 21, 22]
    assert m.allocate(6) == [4, 5, 6, 7, 8, 9]


def test_a_single_block_is_taken_next_to_its_sequence():
    m = manager()
    table = m.allocate(3)
    m.allocate(2)
    m.free(m.allocate(1))
    assert m.allocate(1, after=table[-1]) != [3]
    m2 = manager()
    table = m2.allocate(3)
    assert m2.allocate(1, after=table[-1]) == [3]


def test_each_new_owner_gets_a_new_generation():
    generations = np.zeros(4, dtype=np.uint64)
    m = BlockManager(generations)
    first = m.allocate(2)
    assert generations.tolist() == [1, 1, 0, 0]
    m.acquire(first)
    m.free(first)
    m.free(first)
    assert generations.tolist() == [1, 1, 0, 0]
    m.allocate(4)
    assert generations.tolist() == [2, 2, 1, 1]
    assert m.generations_of([0, 2]) == (2, 1)


def test_a_freed_block_stays_findable_until_it_is_reused():
    m = manager(4)
    (block,) = m.allocate(1)
    m.publish(block, key(1))
    m.free([block])
    assert m.lookup([key(1), key(2)]) == [block]
    others = m.allocate(3)
    assert block not in others, "blocks without a key are reused first"
    assert m.lookup([key(1)]) == [block]
    assert m.allocate(1) == [block]
    assert m.lookup([key(1)]) == []


def test_a_found_block_keeps_its_generation():
    m = manager(4)
    (block,) = m.allocate(1)
    m.publish(block, key(1))
    m.free([block])
    before = m.generations_of([block])
    table, num_found = m.open_table([key(1)], 2)
    assert (table[0], num_found) == (block, 1)
    assert m.generations_of([block]) == before


def test_the_least_recently_freed_goes_first_and_of_one_prefix_its_tail():
    m = manager(4)
    old, new = m.allocate(2), m.allocate(2)
    for i, block in enumerate([*old, *new]):
        m.publish(block, key(i))
    m.free(old)
    m.free(new)
    assert [m.allocate(1)[0] for _ in range(4)] == [old[1], old[0], new[1], new[0]]


def test_the_first_block_under_a_key_stays_it():
    m = manager(4)
    a, b = m.allocate(2)
    m.publish(a, key(1))
    m.publish(b, key(1))
    assert m.lookup([key(1)]) == [a]
    m.free([b])
    m.check_integrity([[a]])


def test_a_table_counts_free_cached_blocks_as_taken():
    m = manager(4)
    blocks = m.allocate(3)
    for i, block in enumerate(blocks):
        m.publish(block, key(i))
    m.free(blocks)
    m.reserve(1)
    assert m.open_table([key(0), key(1), key(2)], 4) is None
    assert m.open_table([key(0), key(1), key(2)], 3, spare=1) is None
    table, num_found = m.open_table([key(0), key(1), key(2)], 3)
    assert (table, num_found) == (blocks, 3)
    assert m.num_available == 0


def test_reserved_blocks_are_not_given_away():
    m = manager(4)
    m.reserve(3)
    with pytest.raises(OutOfBlocks):
        m.allocate(2)
    with pytest.raises(OutOfBlocks):
        m.reserve(2)
    m.unreserve(3)
    assert len(m.allocate(4)) == 4


def test_freeing_twice_is_an_error():
    m = manager(4)
    blocks = m.allocate(1)
    m.free(blocks)
    with pytest.raises(RuntimeError, match="freed twice"):
        m.free(blocks)


def test_integrity_check_sees_a_leak_and_a_lost_owner():
    m = manager(4)
    blocks = m.allocate(2)
    m.check_integrity([blocks])
    with pytest.raises(AssertionError):
        m.check_integrity([])
    with pytest.raises(AssertionError):
        m.check_integrity([blocks, blocks])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_use_keeps_the_books_right(data):
    m = manager(12)
    generations = {}
    held = []
    for step in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["allocate", "open", "free", "share", "publish"]))
        if action == "allocate" and m.num_available:
            blocks = m.allocate(data.draw(st.integers(1, m.num_available)))
            assert len(set(blocks)) == len(blocks)
            assert not {b for table in held for b in table} & set(blocks), "given to two owners"
            for block, generation in zip(blocks, m.generations_of(blocks), strict=True):
                assert generation == generations.get(block, 0) + 1
                generations[block] = generation
            held.append(blocks)
        elif action == "open":
            opened = m.open_table([key(data.draw(st.integers(0, 9))) for _ in range(2)], 3)
            if opened is not None:
                table, num_found = opened
                for block in table[num_found:]:
                    generations[block] = generations.get(block, 0) + 1
                held.append(table)
        elif held and action == "free":
            m.free(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif held and action == "share":
            table = held[data.draw(st.integers(0, len(held) - 1))]
            m.acquire(table)
            held.append(list(table))
        elif held and action == "publish":
            m.publish(held[-1][0], key(data.draw(st.integers(0, 9))))
        m.check_integrity(held)
        assert all(m.generations_of([b]) == (g,) for b, g in generations.items()), step
    for table in held:
        m.free(table)
    m.check_integrity([])
    assert m.num_available == 12
