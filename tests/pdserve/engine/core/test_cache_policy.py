"""A prefix cache whose victims are named by a policy that is passed in."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.eviction import POLICIES
from pdserve.engine.core.blocks import BlockManager
from pdserve.engine.core.config import CoreConfig
from pdserve.engine.core.engine import LocalEngine
from pdserve.types import Phase, Request, SamplingParams
from simulator.engines import NullRunner, null_memory
from simulator.fleet import MODEL
from simulator.trace import pack


class FirstIn:
    """Gives up what was used first, and notes what it is told."""

    def __init__(self):
        self.order, self.told = OrderedDict(), []

    def access(self, keys, now, *, extends=False):
        self.told.append((len(keys), now, extends))
        for key in keys:
            self.order.setdefault(key)

    def evict(self, now, allowed):
        key = next((key for key in self.order if allowed(key)), None)
        if key is not None:
            del self.order[key]
        return key

    def forget(self, key):
        self.order.pop(key, None)


def manager(num_blocks, policy):
    return BlockManager(np.zeros(num_blocks, dtype=np.uint64), policy, lambda: 7.0)


def store(pool, keys):
    blocks = pool.allocate(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    pool.used(keys, extends=False)
    pool.free(blocks)
    return blocks


def test_the_policy_names_the_victims_once_no_empty_block_is_left():
    policy = FirstIn()
    pool = manager(4, policy)
    store(pool, [b"a"])
    store(pool, [b"b"])
    pool.free(pool.lookup([b"a"]) and (pool.acquire(pool.lookup([b"a"])) or pool.lookup([b"a"])))  # used again, for LRU
    pool.allocate(2)
    assert pool.lookup([b"a"])
    assert pool.lookup([b"b"])
    pool.allocate(1)
    assert (pool.lookup([b"a"]), bool(pool.lookup([b"b"]))) == ([], True)
    assert pool.take_evicted() == [b"a"]


def test_blocks_in_use_are_never_given_up():
    policy = FirstIn()
    pool = manager(2, policy)
    store(pool, [b"a"])
    store(pool, [b"b"])
    pool.acquire(pool.lookup([b"a"]))
    pool.allocate(1)
    assert pool.lookup([b"a"])
    assert not pool.lookup([b"b"])


def test_what_the_policy_never_saw_goes_last_but_goes():
    pool = manager(2, FirstIn())
    (block,) = pool.allocate(1)
    pool.publish(block, b"unseen")
    pool.free([block])
    store(pool, [b"seen"])
    pool.allocate(1)
    assert pool.lookup([b"unseen"])
    pool.allocate(1)
    assert not pool.lookup([b"unseen"])


def engine(policy, num_blocks=40, now=lambda: 3.0):
    config = CoreConfig(num_blocks=num_blocks, max_num_seqs=4, max_num_batched_tokens=64, chunk_tokens=64)
    return LocalEngine(NullRunner(MODEL, 16), null_memory, config, cache_policy=policy, clock=now)


def serve(core, handle, hash_ids, outputs=1):
    tokens = len(hash_ids) * 16 + 5
    params = SamplingParams(max_tokens=outputs, ignore_eos=True)
    core.submit(Request(str(handle), MODEL.name, (0,) * tokens, params, block_keys=pack(hash_ids)), handle, Phase.FULL)
    cached = 0
    while core.has_work():
        for stats in core.step().output.prompts:
            cached = stats.num_cached_tokens
    core.check_integrity()
    return cached // 16


def test_an_engine_tells_of_a_chain_once_and_then_of_its_growth():
    policy = FirstIn()
    core = engine(policy)
    serve(core, 1, range(1, 11), outputs=40)
    assert policy.told[0] == (4, 3.0, False)
    assert all(extends for _, _, extends in policy.told[1:])
    assert policy.told[-1][0] == 12  # the prompt's and two of its outputs' blocks
    policy.told.clear()
    assert serve(core, 2, range(1, 11)) == 10
    assert policy.told[0] == (10, 3.0, False)


def test_a_learnt_policy_keeps_what_comes_back_where_lru_loses_it():
    """One conversation comes back every ten requests, between strangers that never do."""

    def hits(policy):
        now = [0.0]
        core = engine(policy, num_blocks=60, now=lambda: now[0])
        found, strangers, turn = 0, 1000, 4
        for handle in range(1, 250):
            now[0] += 3.0
            if handle % 10 == 0:
                found += serve(core, handle, range(1, turn + 1))
            else:
                serve(core, handle, range(strangers, strangers + 8))
                strangers += 8
        return found

    assert hits(POLICIES["hazard"]()) > 2 * hits(None) + 20


class AnyUse(RuleBasedStateMachine):
    """Requests of random chains through an engine with a policy: the books always agree, and the policy knows no key
    that the engine has given up by itself."""

    @initialize(name=st.sampled_from(sorted(POLICIES)), blocks=st.integers(20, 60))
    def begin(self, name, blocks):
        self.now, self.handle, self.open = 0.0, 0, []
        self.policy = POLICIES[name]()
        self.core = engine(self.policy, blocks, lambda: self.now)

    @rule(family=st.integers(0, 5), length=st.integers(0, 12), outputs=st.integers(1, 30), seconds=st.floats(0, 50))
    def submit(self, family, length, outputs, seconds):
        self.now += seconds
        self.handle += 1
        keys = pack(range(family * 100, family * 100 + length))
        params = SamplingParams(max_tokens=outputs, ignore_eos=True)
        request = Request("r", MODEL.name, (0,) * (length * 16 + 3), params, block_keys=keys)
        self.core.submit(request, self.handle, Phase.FULL)
        self.open.append(self.handle)

    @rule(steps=st.integers(1, 20))
    def step(self, steps):
        for _ in range(steps):
            if self.core.has_work():
                self.now += 0.1
                self.core.step()

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data):
        self.core.cancel(data.draw(st.sampled_from(self.open)))

    @invariant()
    def books_agree(self):
        if hasattr(self, "core"):
            self.core.check_integrity()
            self.policy.check_integrity()

    def teardown(self):
        while hasattr(self, "core") and self.core.has_work():
            self.core.step()


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("parts", ["chunks", "found first", "found first, then chunks"])
def test_a_chain_told_in_parts_teaches_a_policy_what_the_whole_would(parts):
    """Turns of conversations in a small pool: parts must not cost what was learnt of who comes back."""
    once, split = hit_blocks(None), hit_blocks(parts)
    assert split > 0.85 * once


def hit_blocks(parts):
    policy, capacity, hits, now = POLICIES["hazard"](), 400, 0, 0.0
    for number in range(2000):
        now += 1.0
        talk, turn = (number * 7919) % 61, number // 61
        length = 4 + turn % 6 if talk < 12 else 10
        base = talk * 10_000 + (0 if talk < 12 else number) * 10
        keys = [(base + i).to_bytes(16, "big") for i in range(length)]
        found = next((i for i, key in enumerate(keys) if key not in policy), length)
        hits += found
        own = set(keys)
        while len(policy) > capacity - (length - found):
            policy.evict(now, lambda key, own=own: key not in own)
        tell(policy, keys, found, now, parts)
    policy.check_integrity()
    return hits


def tell(policy, keys, found, now, parts):
    ends = [len(keys)]
    if parts and "chunks" in parts:
        ends = [*range(3, len(keys), 3), len(keys)]
    if parts and "found" in parts:
        ends = [found, *(end for end in ends if end > found)] if found else ends
    for number, end in enumerate(dict.fromkeys(ends)):
        policy.access(keys[:end], now + 0.1 * number, extends=number > 0)
