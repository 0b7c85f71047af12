"""Workers' caches in the index: a big snapshot is loaded bit by bit, and nothing that comes meanwhile is lost."""

from collections import deque

from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.index.index import KVIndex
from pdserve.types import CacheDelta, ModelInfo, Role, WorkerInfo
from router.caches import WorkerCaches

FINGERPRINT = b"f" * 16


def info(incarnation=1, name="w"):
    model = ModelInfo("m", "r", "t", 4096, 100, (0,))
    return WorkerInfo(name, incarnation, Role.PREFILL, "w:1", model, FINGERPRINT, 16, 1000, 64)


def key(number):
    return number.to_bytes(16, "little")


class Bench:
    def __init__(self):
        self.now, self.later = 0.0, deque()
        self.index = KVIndex(max_entries=200_000, clock=lambda: self.now)
        self.caches = WorkerCaches(self.index, lambda: self.now, self.later.append)

    def run(self):
        while self.later:
            self.later.popleft()()

    def has(self, number, name="w"):
        return name in self.index.match(key(number), FINGERPRINT)


def test_a_big_snapshot_is_loaded_in_steps_and_news_meanwhile_are_kept():
    bench = Bench()
    cache = bench.caches.add(info())
    cache.take(CacheDelta(stored=tuple(map(key, range(50_000))), reset=True))
    assert bench.later  # not all at once
    assert not bench.has(3)  # and nothing is shown before it is whole
    cache.take(CacheDelta(stored=(key(60_000),), removed=(key(3),)))
    bench.run()
    assert bench.has(2)
    assert bench.has(49_999)
    assert bench.has(60_000)
    assert not bench.has(3)


def test_a_worker_that_comes_back_starts_with_what_it_says():
    bench = Bench()
    for incarnation in (1, 1, 2):
        cache = bench.caches.add(info(incarnation))
        cache.take(CacheDelta(stored=(key(incarnation),), reset=True))
        cache.take(CacheDelta(stored=(key(10),)))
        assert bench.has(incarnation)
        bench.caches.remove(info(incarnation))
        assert not bench.has(incarnation)
    assert not bench.has(1)


def test_a_successor_outlives_the_end_of_the_old_stream():
    bench = Bench()
    old = bench.caches.add(info(1))
    new = bench.caches.add(info(2))
    new.take(CacheDelta(stored=(key(5),), reset=True))
    old.take(CacheDelta(stored=(key(6),), reset=True))
    bench.caches.remove(info(1))
    assert bench.has(5)
    assert not bench.has(6)


def test_a_quiet_worker_is_believed_as_long_as_its_stream_lives():
    bench = Bench()
    bench.caches.add(info()).take(CacheDelta(stored=(key(1),), reset=True))
    for _ in range(100):
        bench.now += 10.0
        bench.caches.tick()
        bench.index.expire()
    assert bench.has(1)
    bench.now += 31.0
    bench.index.expire()
    assert not bench.has(1)


STEPS = st.lists(
    st.tuples(st.sampled_from(["store", "remove", "reset", "end", "restart"]), st.sets(st.integers(0, 20), max_size=6)),
    max_size=30,
)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_the_index_knows_what_the_worker_told(steps):
    bench, incarnation, told = Bench(), 1, set()
    cache = bench.caches.add(info())
    cache.take(CacheDelta(reset=True))
    for what, numbers in steps:
        keys = tuple(map(key, numbers))
        if what == "store":
            cache.take(CacheDelta(stored=keys))
            told |= numbers
        elif what == "remove":
            cache.take(CacheDelta(removed=keys))
            told -= numbers
        else:
            if what != "reset":
                bench.caches.remove(info(incarnation))
                incarnation += what == "restart"
                cache = bench.caches.add(info(incarnation))
            cache.take(CacheDelta(stored=keys, reset=True))
            told = set(numbers)
        bench.run()
        assert {number for number in range(21) if bench.has(number)} == told
