"""What the learnt policy learns, how it starts, and what it costs."""

from itertools import count

import numpy as np
import pytest

from kvstore.eviction import HazardPolicy, IntegrityError, KeyCache, LruPolicy, S3FifoPolicy
from kvstore.eviction.reuse import BINS, EDGES_S, ReuseTable, bin_of


class Fresh:
    def __init__(self):
        self._numbers = count()

    def take(self, amount):
        return [next(self._numbers).to_bytes(16, "little") for _ in range(amount)]


def anything(key):
    return True


def test_with_no_history_it_ranks_as_lru_does_tails_first():
    fresh, policy = Fresh(), HazardPolicy()
    first, second = fresh.take(3), fresh.take(2)
    policy.access(first, 0.0)
    policy.access(second, 100.0)
    victims = [policy.evict(130.0, anything) for _ in range(5)]
    assert victims == [*reversed(first), *reversed(second)]


def test_a_block_in_use_is_passed_over_and_asked_about_once_until_the_ranking_is_remade():
    fresh, policy = Fresh(), HazardPolicy()
    leased, free, asked = fresh.take(4), fresh.take(4), []
    policy.access(leased, 0.0)
    policy.access(free, 1.0)

    def allowed(key):
        asked.append(key)
        return key in free

    assert [policy.evict(2.0, allowed) for _ in range(4)] == free[::-1]
    assert len([key for key in asked if key in leased]) == len(leased)
    assert policy.evict(2.0, anything) == leased[-1]


def test_only_the_blocks_after_a_pinned_tail_may_go():
    fresh, policy = Fresh(), HazardPolicy()
    keys = fresh.take(5)
    policy.access(keys, 0.0)
    allowed = keys[1:3]
    assert [policy.evict(1.0, allowed.__contains__) for _ in range(3)] == [keys[2], keys[1], None]
    policy.check_integrity()
    assert policy._groups.waiting() == []
    assert policy.evict(1.0, anything) in {keys[0], keys[4]}


def test_it_learns_that_later_turns_come_back_more_often():
    """Of two tails of equal age the one of the second turn stays."""
    fresh, policy = Fresh(), HazardPolicy()
    for start in range(0, 6000, 100):
        once, chat = fresh.take(4), fresh.take(4)
        policy.access(once, start)
        policy.access(chat, start)
        for turn in range(1, 5):
            chat = chat + fresh.take(2)
            policy.access(chat, start + turn * 10.0)
    newcomer, second = fresh.take(4), fresh.take(4)
    policy.access(second, 6100.0)
    second = second + fresh.take(2)
    policy.access(second, 6110.0)
    policy.access(newcomer, 6111.0)
    kept = [key for key in (*second, *newcomer) if key in policy]
    while len(policy) > len(second) + 2:
        policy.evict(6115.0, lambda key: key in kept or key not in newcomer + second)
    assert all(key in policy for key in second)


def test_what_a_request_stores_in_steps_is_one_use():
    """Chunks and decode's blocks extend a chain: they teach nothing, and deepen nothing."""
    fresh = Fresh()
    chat = fresh.take(6)
    whole, stepwise = HazardPolicy(), HazardPolicy()
    whole.access(chat, 0.0)
    stepwise.access(chat[:2], 0.0)
    stepwise.access(chat[:4], 0.0, extends=True)
    stepwise.access(chat, 0.0, extends=True)
    for policy in (whole, stepwise):
        policy.access(chat + fresh.take(1), 15.0)
        assert policy._reuse._reuses[0][bin_of(15.0)] == len(chat)
        assert sum(map(sum, policy._reuse._reuses)) == len(chat)
        assert {group.depth for group in policy._groups.resident.values()} == {0, 1}


def test_steps_of_requests_that_share_a_prefix_are_told_apart():
    """All begin with one block, and their chunks come by turns: nothing but that block has been used twice."""
    fresh, policy = Fresh(), HazardPolicy()
    system = fresh.take(1)
    chats = [system + fresh.take(12) for _ in range(5)]
    for chat in chats:
        policy.access(chat[:1], 0.0)
    for end in (4, 8, 13):
        for chat in chats:
            policy.access(chat[:end], 0.1 * end, extends=True)
    groups = policy._groups.resident
    assert all(groups[key].uses == 1 for chat in chats for key in chat[1:])
    assert len({groups[key] for chat in chats for key in chat[1:]}) == len(chats)  # one run each, whatever its steps
    policy.check_integrity()


def test_a_turn_that_begins_while_others_go_on_is_a_use():
    fresh, policy = Fresh(), HazardPolicy()
    system = fresh.take(1)
    chat, other = system + fresh.take(5), system + fresh.take(5)
    policy.access(chat, 0.0)
    policy.access(chat[:4], 100.0)  # its tail has been lost
    policy.access(other, 100.1)
    chat += fresh.take(3)
    policy.access(chat, 100.2, extends=True)
    groups = policy._groups.resident
    assert [groups[key].uses for key in chat] == [3, 2, 2, 2, 2, 2, 1, 1, 1]


def test_of_a_conversation_the_tail_leaves_before_the_head_however_it_was_told():
    """A tail is worth nothing without its head, be it of another turn or of another chunk."""
    fresh = Fresh()
    for steps in ((3, 6, 9), (9,)):
        policy, chat = HazardPolicy(), fresh.take(9)
        for number, end in enumerate(steps):
            policy.access(chat[:end], 0.1 * number, extends=number > 0)
        assert [policy.evict(10.0, anything) for _ in chat] == chat[::-1]
    policy, chat = HazardPolicy(), fresh.take(9)
    for turn, end in enumerate((3, 6, 9)):
        policy.access(chat[:end], 50.0 * turn)
    assert [policy.evict(110.0, anything) for _ in chat] == chat[::-1]


def test_a_reuse_that_comes_too_late_is_learnt_from_ghosts():
    fresh, policy = Fresh(), HazardPolicy()
    keys = fresh.take(3)
    policy.access(keys, 0.0)
    for _ in keys:
        policy.evict(1.0, anything)
    assert len(policy) == 0
    policy.access(keys, 15.0)
    assert policy._reuse._reuses[0][bin_of(15.0)] == len(keys)


def test_a_victim_that_its_pool_forgets_again_is_still_a_ghost():
    """The node's store tells of every block that leaves, those too that the policy named itself."""
    fresh, policy = Fresh(), HazardPolicy()
    keys = fresh.take(3)
    policy.access(keys, 0.0)
    for _ in keys:
        policy.forget(policy.evict(1.0, anything))
    policy.access(keys, 15.0)
    assert policy._reuse._reuses[0][bin_of(15.0)] == len(keys)


def test_ghosts_are_bounded():
    fresh, policy = Fresh(), HazardPolicy(min_ghosts=100)
    cache = KeyCache(50, policy)
    for second in range(500):
        cache.request(fresh.take(7), float(second))
    assert len(policy._groups.ghosts) <= 100
    cache.check_integrity()


def test_a_clock_that_steps_back_stands_still():
    fresh, steady, jumpy = Fresh(), HazardPolicy(), HazardPolicy()
    streams = [fresh.take(3) for _ in range(30)]
    for second, keys in enumerate(streams):
        steady.access(keys, 10.0 * second)
        jumpy.access(keys, 10.0 * second)
        jumpy.access([], -1e9)
    jumpy.check_integrity()
    assert [steady.evict(300.0, anything) for _ in range(90)] == [jumpy.evict(300.0, anything) for _ in range(90)]


def test_a_loop_larger_than_the_pool_is_held_in_part_where_lru_holds_nothing():
    fresh = Fresh()
    loop = [fresh.take(10) for _ in range(40)]
    hits = {}
    for policy in (HazardPolicy(), LruPolicy()):
        cache = KeyCache(200, policy)
        hits[type(policy)] = sum(cache.request(loop[i % 40], i * 5.0) for i in range(800))
    assert hits[LruPolicy] == 0
    assert hits[HazardPolicy] > 0.1 * 8000


def test_s3fifo_lets_a_scan_pass():
    fresh, policy = Fresh(), S3FifoPolicy()
    cache, hot = KeyCache(100, policy), fresh.take(20)
    cache.request(hot, 0.0)
    cache.request(hot, 1.0)
    for second in range(100):
        cache.request(fresh.take(10), float(second))
    assert cache.match(hot) == len(hot)


def test_integrity_check_sees_books_that_disagree():
    fresh, policy = Fresh(), HazardPolicy()
    keys = fresh.take(3)
    policy.access(keys, 0.0)
    policy._groups.resident.pop(keys[1])
    with pytest.raises(IntegrityError, match="resident keys and groups disagree"):
        policy.check_integrity()


def test_a_table_without_counts_gives_the_prior_falling_with_age():
    hazards = ReuseTable([2, 1]).hazards()
    assert hazards.shape == (3, BINS)
    assert np.all(np.diff(hazards, axis=1) < 0)
    assert np.allclose(hazards, hazards[0])


def test_a_table_finds_the_hazards_that_made_its_counts():
    """100,000 blocks of a kind with a constant hazard of .01 / s, beside a kind that never comes back."""
    table, alive = ReuseTable([1, 1]), 100_000.0
    for age_bin in range(bin_of(300.0)):
        width = EDGES_S[age_bin + 1] - EDGES_S[age_bin]
        reused = alive * -np.expm1(-0.01 * width)
        table._exposure_s[0][age_bin] += reused / 0.01
        table._reuses[0][age_bin] += reused
        table.passed(1, age_bin, age_bin + 1, 100_000)
        alive -= reused
    hazards, values = table.hazards(), table.values()
    known = slice(4, bin_of(200.0))
    assert np.allclose(hazards[0, known], 0.01, rtol=0.05)
    assert np.all(hazards[1, known] < 1e-4)
    assert np.allclose(values[0, known], 0.01, rtol=0.05)
    assert np.all(values[1] < values[0])


def test_the_value_of_a_block_looks_past_ages_at_which_nothing_comes_back():
    """Nobody answers within 20 s, then many do: a young block is worth more than its hazard now."""
    table = ReuseTable([1])
    for age_bin in range(bin_of(300.0)):
        table.passed(0, age_bin, age_bin + 1, 10_000)
        if EDGES_S[age_bin] > 20.0:
            table.reused(0, age_bin, 1_000)
    hazards, values = table.hazards()[0], table.values()[0]
    assert values[3] > 5 * hazards[3]
    assert values[bin_of(30.0)] > values[3]


def test_counts_fade():
    table = ReuseTable([1])
    table.reused(0, 5, 100_000)
    before = table.hazards()[0, 5]
    table.fade(24 * 3600.0)
    assert table.hazards()[0, 5] < before / 10


def test_queues_stay_in_order_of_age_when_the_ranking_is_remade_rarely():
    """Groups of several bins reach the same one in one go: the oldest still leaves first."""
    fresh, policy = Fresh(), HazardPolicy()
    chains = [fresh.take(2) for _ in range(12)]
    for second, keys in zip((0, 5, 9, 30, 31, 32, 60, 61, 62, 90, 91, 92), chains, strict=True):
        policy.access(keys, float(second))
    policy.access([], 5_000.0)
    assert [policy.evict(5_000.0, anything) for _ in range(24)] == [key for keys in chains for key in reversed(keys)]
