"""What holds for every policy, whatever it is told: against a set, against brute force, against foresight."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.eviction import POLICIES, EvictionPolicy, HazardPolicy, KeyCache, LruPolicy
from kvstore.eviction.belady import BeladyPolicy

MAKERS: dict[str, Callable[[], EvictionPolicy]] = {**POLICIES, "hazard, few ghosts": lambda: HazardPolicy(min_ghosts=3)}


def key(*path: int) -> bytes:
    return bytes(path).rjust(16, b"\xff")


def chain(path: list[int]) -> list[bytes]:
    """Keys of the prefixes of a path: chains with a common beginning share keys, as real ones do."""
    return [key(*path[: end + 1]) for end in range(len(path))]


chains = st.lists(st.integers(0, 2), min_size=0, max_size=7).map(chain)
any_keys = st.lists(st.integers(0, 30).map(key), unique=True, max_size=6)
"""Chains that no prefix tree would produce: a policy must not lose its books over them."""
clock = st.sampled_from([-50.0, 0.0, 0.4, 3.0, 25.0, 400.0, 90_000.0])
steps = st.one_of(
    st.tuples(st.just("access"), clock, st.one_of(chains, any_keys), st.booleans()),
    st.tuples(st.just("evict"), clock, st.integers(1, 5), st.sets(st.integers(0, 15), max_size=12)),
    st.tuples(st.just("forget"), clock, st.one_of(chains, any_keys), st.none()),
)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=120, deadline=None)
@given(script=st.lists(steps, max_size=40))
def test_resident_keys_are_exactly_those_used_and_not_yet_gone(name, script):
    policy, resident, now = MAKERS[name](), set(), 1000.0
    for verb, delta, what, extra in script:
        now += delta
        if verb == "access":
            policy.access(what, now, extends=extra)
            resident |= set(what)
        elif verb == "forget":
            for gone in what:
                policy.forget(gone)
            resident -= set(what)
        else:
            pinned = {k for k in resident if sum(k) % 16 in extra}
            for _ in range(what):
                victim = policy.evict(now, lambda k, pinned=pinned: k not in pinned)
                assert (victim is None) == (resident <= pinned)
                assert victim is None or victim in resident - pinned
                resident.discard(victim)
        policy.check_integrity()
        assert len(policy) == len(resident)
        assert all(k in policy for k in resident)


@pytest.mark.parametrize("name", MAKERS)
def test_the_one_key_that_may_leave_is_found_among_pinned_ones(name):
    policy, pinned = MAKERS[name](), [key(i, 1) for i in range(20)]
    for _ in range(3):
        policy.access(pinned, 0.0)
    assert policy.evict(1.0, lambda k: False) is None
    policy.access([key(99)], 2.0)
    assert policy.evict(3.0, lambda k: k not in pinned) == key(99)
    assert policy.evict(4.0, lambda k: k not in pinned) is None
    assert len(policy) == 20


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 9),
    script=st.lists(st.tuples(clock, chains, st.sets(st.integers(0, 15), max_size=16)), max_size=40),
)
def test_a_pool_never_exceeds_its_capacity_and_reports_what_it_does(name, capacity, script):
    cache, resident, now = KeyCache(capacity, MAKERS[name]()), set(), 0.0
    for delta, keys, pins in script:
        now += delta
        pinned = {k for k in resident if sum(k) % 16 in pins}
        assert cache.match(keys) == next((i for i, k in enumerate(keys) if k not in resident), len(keys))
        admission = cache.admit(keys, now, lambda k, pinned=pinned: k not in pinned)
        assert not pinned & set(admission.dropped)
        assert set(admission.dropped) <= resident
        assert set(admission.stored) <= set(keys) - resident
        resident = (resident - set(admission.dropped)) | set(admission.stored)
        assert len(cache) == len(resident) <= capacity
        assert all(k in cache for k in resident)
        cache.check_integrity()


@pytest.mark.parametrize("name", MAKERS)
def test_a_pool_full_of_pinned_keys_stores_nothing(name):
    cache = KeyCache(3, MAKERS[name]())
    pinned = chain([0, 0, 0])
    assert cache.admit(pinned, 0.0, lambda k: True) == (pinned, [])
    assert cache.admit(chain([1, 1]), 1.0, lambda k: False) == ([], [])
    assert cache.match(pinned) == len(cache) == 3


def test_a_pool_without_room_for_anything_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        KeyCache(0, LruPolicy())


@settings(max_examples=150, deadline=None)
@given(script=st.lists(st.tuples(st.one_of(chains, any_keys), st.integers(0, 4), st.integers(2, 9)), max_size=30))
def test_lru_equals_brute_force(script):
    policy, last_use, clock = LruPolicy(), {}, 0
    for keys, victims, modulus in script:
        for used in reversed(keys):
            clock += 1
            last_use[used] = clock
        policy.access(keys, 0.0)
        for _ in range(victims):
            order = sorted(last_use, key=last_use.get)
            expected = next((k for k in order if sum(k) % modulus), None)
            for refused in order[: order.index(expected)] if expected else order:
                clock += 1
                last_use[refused] = clock
            assert policy.evict(0.0, lambda k, modulus=modulus: bool(sum(k) % modulus)) == expected
            last_use.pop(expected, None)


@settings(max_examples=200, deadline=None)
@given(capacity=st.integers(1, 12), stream=st.lists(chains, max_size=60))
def test_foresight_is_never_beaten(capacity, stream):
    def hits(policy):
        cache = KeyCache(capacity, policy)
        return sum(cache.request(keys, float(second)) for second, keys in enumerate(stream))

    best = hits(BeladyPolicy(stream))
    for name, make in MAKERS.items():
        assert hits(make()) <= best, name


def test_foresight_leaves_no_heap_entry_behind_that_matters():
    stream = [chain([1, 2]), chain([0, 1]), chain([1, 2, 0])]
    policy = BeladyPolicy(stream)
    policy.access(stream[0], 0.0)
    policy.access(stream[1], 0.0)
    policy.check_integrity()
    assert policy.evict(0.0, lambda k: k != key(0, 1)) == key(0)
    assert policy.evict(0.0, lambda k: True) == key(0, 1)
    policy.forget(key(1))
    assert policy.evict(0.0, lambda k: True) == key(1, 2)
    assert policy.evict(0.0, lambda k: True) is None
