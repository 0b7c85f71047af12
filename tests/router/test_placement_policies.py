"""Policies: what they may never do, whatever the load, and what each of them is for."""

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.index.base import NodeReach
from pdserve.engine.timing import LinearTiming, StepWork
from pdserve.errors import ConfigError, NoWorker
from pdserve.types import ModelInfo, Role, WorkerInfo
from router.scheduling.base import Ask, NoPrefixes, Outstanding
from router.scheduling.desk import Surroundings
from router.scheduling.filters import compatible
from router.scheduling.forecasts import Pace, Predictor
from router.scheduling.homes import NOWHERE, Homes
from router.scheduling.links import LinkRates, Links
from router.scheduling.policies import BASELINES, NAMES, make_policy
from router.scheduling.rules import ConductorRules

MODEL = ModelInfo("m", "r", "t", 100_000, 1000, (0,))
TIMING = LinearTiming(0.0, 0.1, 0.0, 10.0, 0.1, 0.0)
"""A thousand prompt tokens take 100 ms."""
STEPPED = LinearTiming(20.0, 0.1, 0.0, 20.0, 0.1, 0.0)
"""The same, and 20 ms for each step."""
KEYS = bytes(range(16)) * 64


@dataclass(eq=False)
class Fake:
    info: WorkerInfo
    draining: bool = False
    own: Outstanding = field(default_factory=Outstanding)
    foreign: Outstanding = field(default_factory=Outstanding)

    def __repr__(self):
        return self.info.worker_id


def worker(name, role, **changes):
    return Fake(replace(WorkerInfo(name, 1, role, f"{name}:1", MODEL, b"f", 16, 4000, 64), **changes))


class Prefixes:
    """What tests say is held: blocks by worker id or store address."""

    def __init__(self, **held):
        self.held = {name: NodeReach(*lengths) for name, lengths in held.items()}

    def match(self, keys, fingerprint):
        return self.held


class World:
    """A policy, its workers and a clock that tests move."""

    def __init__(self, policy="conductor", prefill=2, decode=2, prefixes=None, rules=None, timing=TIMING, **link_rates):
        self.now = 0.0
        self.version = 1
        self.links = Links(LinkRates(**link_rates))
        self.prefixes = prefixes or NoPrefixes()
        self.workers = [worker(f"p{i}", Role.PREFILL) for i in range(prefill)]
        self.workers += [worker(f"d{i}", Role.DECODE) for i in range(decode)]
        around = Surroundings(lambda: self.now, Predictor(timing, 512), self, self.links, 16)
        self.policy = make_policy(policy, around, seed=1, rules=rules)
        self.asks = 0

    def match(self, keys, fingerprint):
        return self.prefixes.match(keys, fingerprint)

    def ask(self, tokens=1000, **changes):
        self.asks += 1
        ask = Ask(str(self.asks), "m", tokens, 100, keys=KEYS)
        for name, value in changes.items():
            setattr(ask, name, value)
        self.policy.enqueue(ask)
        return ask

    def decide(self):
        return self.policy.decide(self.workers, self.version)

    def change(self):
        self.version += 1

    def named(self, name):
        return next(each for each in self.workers if each.info.worker_id == name)


def where(decisions):
    return [str(each.prefill or each.decode) for each in decisions]


# ---- binding late ----


def test_a_request_waits_at_the_router_until_a_worker_can_start_it():
    world = World(rules=ConductorRules(alone_tokens=0, patience_s=100))
    asks = [world.ask() for _ in range(4)]
    first = world.decide()
    assert [each.ask for each in first] == asks[:2]
    assert set(where(first)) == {"p0", "p1"}
    assert world.policy.num_waiting == 2
    assert world.decide() == []
    world.now = 0.08
    world.policy.prefilled(asks[1], 0)
    (second,) = world.decide()
    assert (second.ask, second.prefill, second.waited_s) == (asks[2], first[1].prefill, 0.08)
    world.now = 0.1
    world.policy.prefilled(asks[0], 0)
    (third,) = world.decide()
    assert third.ask is asks[3]


def test_it_is_woken_just_before_a_worker_should_be_free_and_binds_then():
    world = World(prefill=1, rules=ConductorRules(alone_tokens=0, patience_s=100))
    world.ask()
    world.ask()
    world.decide()
    wakeup = world.policy.next_wakeup()
    assert wakeup == pytest.approx(0.1, abs=0.01)
    world.now = wakeup
    assert len(world.decide()) == 1
    assert world.policy.next_wakeup() is None


def test_short_prompts_share_a_step_as_long_as_it_is_too_small():
    """A step costs 20 ms and 0.1 ms a token: up to 740 tokens, one step of several prompts is far cheaper than many."""
    world = World(prefill=1, timing=STEPPED, rules=ConductorRules(alone_tokens=0, patience_s=100))
    asks = [world.ask(tokens=100) for _ in range(20)]
    first = world.decide()
    assert [each.ask for each in first] == asks[:8]
    station = next(each for each in world.policy.stations if str(each.worker) == "p0")
    assert station.wait_s(0.0) == pytest.approx(STEPPED.step_ms(StepWork(800)) / 1000)
    world.now = 0.01
    second = world.decide()  # behind a small step: the worker has them when that ends
    assert [each.ask for each in second] == asks[8:16]
    world.now = 0.1
    for each in first:
        world.policy.prefilled(each.ask, 0)
    assert station.prefill_pace.factor == pytest.approx(1.0)
    world.now = 0.11
    assert [each.ask for each in world.decide()] == asks[16:]
    for ask in asks:
        world.policy.ended(ask)
    assert (station.own.num_prefill_tokens, station.num_prefills, station.wait_s(1.0)) == (0, 0, 0.0)


def test_a_short_prompt_is_not_bound_behind_a_long_one_before_that_is_nearly_through():
    world = World(prefill=1, timing=STEPPED, rules=ConductorRules(alone_tokens=0, patience_s=100))
    world.ask(tokens=5120)
    assert len(world.decide()) == 1
    world.now = 0.01
    short = [world.ask(tokens=100) for _ in range(3)]
    assert world.decide() == []
    world.now = world.policy.next_wakeup()
    assert [each.ask for each in world.decide()] == short


def test_nobody_overtakes_who_waits_for_the_same_worker():
    world = World(prefill=1, timing=STEPPED, rules=ConductorRules(alone_tokens=0, patience_s=100))
    world.ask(tokens=100)
    assert len(world.decide()) == 1
    world.now = 0.001
    world.ask(tokens=5120)
    world.ask(tokens=100)
    assert world.decide() == []


def test_where_only_tokens_cost_prompts_are_bound_one_by_one():
    world = World(prefill=1, rules=ConductorRules(alone_tokens=0, patience_s=100))
    asks = [world.ask(tokens=100) for _ in range(3)]
    assert [each.ask for each in world.decide()] == asks[:1]


def test_where_nothing_costs_time_all_are_bound_however_many():
    world = World(prefill=1, timing=LinearTiming(0, 0, 0, 0, 0, 0), rules=ConductorRules(alone_tokens=0))
    for _ in range(150):
        world.ask(tokens=300)
    num_bound = 0
    while world.policy.num_waiting:
        num_bound += len(world.decide())
        if world.policy.num_waiting:
            assert world.policy.next_wakeup() == world.now
    assert num_bound == 150


def test_a_warm_busy_worker_is_waited_for_when_that_is_sooner():
    world = World(prefixes=Prefixes(p0=(60, 60, 60)), rules=ConductorRules(alone_tokens=0))
    world.prefixes = NoPrefixes()
    first = world.ask(tokens=300)
    assert where(world.decide()) == ["p0"]
    world.prefixes = Prefixes(p0=(60, 60, 60))
    warm = world.ask(tokens=1000)
    assert world.decide() == []  # 30 ms of waiting and 4 of computing, against 100
    world.now = 0.03
    world.policy.prefilled(first, 0)
    (decision,) = world.decide()
    assert (decision.ask, str(decision.prefill)) == (warm, "p0")
    assert decision.forecast.num_cached_tokens == 960


def test_a_warm_worker_with_much_to_do_is_not_waited_for():
    world = World(rules=ConductorRules(alone_tokens=0))
    world.ask(tokens=3000)
    assert where(world.decide()) == ["p0"]
    world.prefixes = Prefixes(p0=(60, 60, 60))
    world.ask(tokens=1000)
    assert where(world.decide()) == ["p1"]


def test_a_conversation_goes_home_even_if_its_blocks_are_gone():
    world = World(prefill=4, rules=ConductorRules(alone_tokens=0))
    homes = {}
    for number in range(4):
        keys = bytes([number]) * 16 * 60
        ask = world.ask(1000, keys=keys)
        (decision,) = world.decide()
        homes[keys] = str(decision.prefill)
        world.now += 0.1
        world.policy.prefilled(ask, 0)
        world.policy.ended(ask)
    assert len(set(homes.values())) == 4
    for keys, home in reversed(homes.items()):
        ask = world.ask(1500, keys=keys + bytes([keys[0] + 100]) * 16 * 30)
        assert where(world.decide()) == [home]
        world.now += 0.15
        world.policy.prefilled(ask, 0)
        world.policy.ended(ask)


@pytest.mark.parametrize(("tokens", "expected"), [(300, ["p1"]), (200, [])])
def test_a_lost_prefix_makes_nobody_wait_long_for_its_home(tokens, expected):
    """What was computed for 102 ms and is lost is worth 26 ms of waiting."""
    world = World(rules=ConductorRules(alone_tokens=0, load_bound=100))
    turn = world.ask(1024)
    assert where(world.decide()) == ["p0"]
    world.now = 0.1024
    world.policy.prefilled(turn, 0)
    world.policy.ended(turn)
    world.ask(tokens)
    assert where(world.decide()) == ["p0"]
    world.ask(1100)
    assert where(world.decide()) == expected


def test_homes_are_found_by_a_part_of_the_chain_and_bounded():
    homes = Homes(16, max_keys=20)
    chain = b"".join(number.to_bytes(16, "big") for number in range(100))
    homes.moved(chain[: 16 * 40], "p3")
    assert homes.find(chain) == ("p3", 32 * 16)
    assert homes.find(chain[: 16 * 10]) == ("p3", 8 * 16)
    assert homes.find(b"") == homes.find(b"x" * 160) == NOWHERE
    for number in range(50):
        homes.moved(bytes([number]) * 16 * 40, "p1")
    assert homes.find(chain) == NOWHERE
    assert len(homes._workers) == 20


def test_turns_of_one_system_prompt_do_not_all_wait_for_one_worker():
    world = World(prefill=4, rules=ConductorRules(alone_tokens=0, patience_s=100))
    world.prefixes = Prefixes(p0=(10, 10, 10))
    for _ in range(4):
        world.ask()
    assert sorted(where(world.decide())) == ["p0", "p1", "p2", "p3"]


def test_the_urgent_go_first_and_a_withdrawn_request_is_forgotten():
    world = World(prefill=1, rules=ConductorRules(alone_tokens=0, patience_s=100))
    first = world.ask()
    world.decide()
    world.policy.prefilled(first, 0)
    gone, late, urgent = world.ask(), world.ask(), world.ask(priority=-1)
    world.policy.ended(gone)
    served = []
    for _ in range(2):
        world.now += 0.1
        (decision,) = world.decide()
        served.append(decision.ask)
        world.policy.prefilled(decision.ask, 0)
    assert served == [urgent, late]


# ---- stores ----


def test_a_prefix_is_fetched_from_the_own_nodes_store_or_a_peers_when_that_is_sooner():
    world = World(prefill=1, kv_bytes_per_token=1000, rules=ConductorRules(alone_tokens=0))
    world.workers[0] = worker("p0", Role.PREFILL, store_address="a:1")
    world.workers[1] = worker("d0", Role.DECODE, store_address="b:1")
    world.prefixes = Prefixes(**{"a:1": (0, 40, 40)})
    world.ask()
    (own,) = world.decide()
    assert (own.prefix_store, own.forecast.num_fetched_tokens) == ("", 640)
    world.policy.prefilled(own.ask, 640, 640)
    world.prefixes = Prefixes(**{"a:1": (0, 10, 10), "b:1": (0, 60, 60)})
    world.ask()
    (peers,) = world.decide()
    assert (peers.prefix_store, peers.forecast.num_fetched_tokens) == ("b:1", 960)


def test_nothing_is_fetched_over_a_link_that_is_slower_than_computing():
    world = World(prefill=1, far=1e3, dram=1e3, kv_bytes_per_token=1000)
    world.workers[1] = worker("d0", Role.DECODE, store_address="b:1")
    world.prefixes = Prefixes(**{"b:1": (0, 60, 60)})
    world.ask()
    (decision,) = world.decide()
    assert (decision.prefix_store, decision.forecast.num_fetched_tokens) == ("", 0)


# ---- decode ----


def test_decode_goes_where_kv_moves_fast_and_there_is_room():
    world = World(prefill=1, kv_bytes_per_token=10_000_000)
    world.workers[0] = worker("p0", Role.PREFILL, labels=(("rack", "1"),))
    world.workers[2] = worker("d1", Role.DECODE, labels=(("rack", "1"),))
    world.ask()
    (decision,) = world.decide()
    assert str(decision.decode) == "d1"
    world.policy.prefilled(decision.ask, 0)
    world.workers[2].foreign.num_context_tokens = 64_000
    world.ask()
    (second,) = world.decide()
    assert str(second.decode) == "d0"


def test_own_transfers_in_flight_count():
    world = World(prefill=2, decode=2, kv_bytes_per_token=10_000_000, rules=ConductorRules(alone_tokens=0))
    world.ask(keys=b"")
    (first,) = world.decide()
    world.policy.prefilled(first.ask, 0)
    world.ask(keys=b"")
    (second,) = world.decide()
    assert second.decode is not first.decode
    assert second.forecast.transfer_s == pytest.approx(first.forecast.transfer_s, rel=0.01)


def test_a_broken_link_is_not_used_and_without_any_the_decode_worker_does_it_alone():
    world = World(prefill=1, decode=2)
    world.links.trip("p0", "d0")
    world.ask()
    (decision,) = world.decide()
    assert str(decision.decode) == "d1"
    world.links.trip("p0", "d1")
    world.policy.prefilled(decision.ask, 0)
    world.ask()
    (alone,) = world.decide()
    assert alone.prefill is None
    assert "decode.alone=no_link" in alone.reasons
    world.links.heal("p0", "d0")
    world.ask()
    (again,) = world.decide()
    assert str(again.decode) == "d0"


def test_a_short_suffix_needs_no_prefill_worker():
    world = World()
    world.prefixes = Prefixes(d1=(60, 60, 60))
    world.ask(tokens=1000)
    (decision,) = world.decide()
    assert (decision.prefill, str(decision.decode)) == (None, "d1")
    assert "decode.alone=short_suffix" in decision.reasons


def test_without_prefill_workers_a_decode_worker_does_all_if_that_is_wanted():
    world = World(prefill=0)
    world.ask()
    assert where(world.decide())[0].startswith("d")
    strict = World(prefill=0, rules=ConductorRules(alone_without_prefill=False))
    strict.ask()
    (refused,) = strict.decide()
    assert isinstance(refused.error, NoWorker)
    assert refused.error.leg == "prefill"


def test_another_decode_worker_takes_over_before_the_pair_is_bound():
    world = World(prefill=1, decode=2)
    ask = world.ask()
    (decision,) = world.decide()
    world.workers.remove(decision.decode)
    world.change()
    again = world.policy.redecide(ask, world.workers, world.version)
    assert again.prefill is decision.prefill
    assert again.decode not in (None, decision.decode)
    world.workers.remove(again.decode)
    world.change()
    assert isinstance(world.policy.redecide(ask, world.workers, world.version).error, NoWorker)


# ---- the load bound, learning ----


def test_no_worker_gets_far_more_to_compute_than_the_others():
    world = World(prefill=5, rules=ConductorRules(alone_tokens=0))
    world.prefixes = Prefixes(p0=(1, 1, 1))
    loads = Counter()
    for _ in range(400):
        world.ask(4000)
        (decision,) = world.decide()
        loads[str(decision.prefill)] += decision.ask.num_prompt_tokens - decision.forecast.num_cached_tokens
        world.now += 0.05
        world.policy.prefilled(decision.ask, decision.forecast.num_cached_tokens)
        world.policy.ended(decision.ask)
    assert max(loads.values()) <= 1.3 * sum(loads.values()) / 5


def test_a_slow_worker_is_learnt_and_gets_less():
    world = World(prefill=2, rules=ConductorRules(alone_tokens=0, load_bound=100))
    for _ in range(60):
        world.ask()
        (decision,) = world.decide()
        world.now += 0.4 if str(decision.prefill) == "p0" else 0.1
        world.policy.prefilled(decision.ask, 0)
        world.policy.ended(decision.ask)
    paces = {each.info.worker_id: each.prefill_pace.factor for each in world.policy.stations}
    assert paces["p0"] > 1.2
    assert paces["p1"] == pytest.approx(1.0)
    world.ask()
    assert where(world.decide()) == ["p1"]


def test_a_pace_follows_what_is_observed_and_no_single_moment():
    pace = Pace()
    pace.observe(0.1, 100.0)
    assert pace.factor < 2.0
    for _ in range(100):
        pace.observe(0.1, 0.2)
    assert pace.factor == pytest.approx(2.0, rel=0.01)


def test_a_decision_tells_candidates_scores_and_reasons():
    world = World(prefill=3)
    world.ask()
    (decision,) = world.decide()
    prefill, decode = decision.picks
    assert {name for name, _ in prefill.others} == {"p0", "p1", "p2"}
    assert dict(prefill.scores)["ttft_s"] == pytest.approx(0.1)
    assert {name for name, _ in decode.others} == {"d0", "d1"}
    assert decision.forecast.ttft_s == pytest.approx(0.1)
    assert any(reason.startswith("prefill.ttft_s=") for reason in decision.reasons)


def test_candidates_are_told_with_what_the_choice_was_made_by():
    """A cached prefix counts for more than the time that it saves this request: the chosen one need not be the first
    to finish."""
    world = World(prefill=2, timing=STEPPED, rules=ConductorRules(alone_tokens=0))
    world.ask(tokens=600)
    (first,) = world.decide()
    busy = str(first.prefill)
    world.prefixes = Prefixes(**{busy: (18, 18, 18)})
    world.now = 0.001
    world.ask(tokens=300)
    (second,) = world.decide()
    pick = second.picks[0]
    assert pick.worker_id == busy
    assert dict(pick.others)[busy] == min(dict(pick.others).values())
    assert second.forecast.ttft_s > STEPPED.step_ms(StepWork(300)) / 1000


def test_the_gain_of_disaggregation_falls_below_zero_on_a_slow_network():
    fast, slow = World(prefill=4), World(prefill=4, kv_bytes_per_token=10_000_000)
    for world in (fast, slow):
        for _ in range(20):
            world.ask()
            for decision in world.decide():
                world.policy.prefilled(decision.ask, 0)
                world.policy.decoding(decision.ask)
    assert slow.policy.disaggregation_gain_s < fast.policy.disaggregation_gain_s
    assert slow.policy.disaggregation_gain_s < 0


# ---- baselines ----


def test_round_robin_takes_turns():
    world = World("round_robin", prefill=3)
    for _ in range(6):
        world.ask()
    assert where(world.decide()) == ["p0", "p1", "p2", "p0", "p1", "p2"]


def test_pure_prefix_routing_follows_the_cache_whatever_the_load():
    world = World("prefix_only", prefill=3)
    world.prefixes = Prefixes(p2=(1, 1, 1))
    for _ in range(5):
        world.ask()
    assert where(world.decide()) == ["p2"] * 5


def test_a_session_stays_with_its_worker_while_that_is_there():
    world = World("session", prefill=4)
    homes = {}
    for number in range(40):
        world.ask(session=f"s{number % 10}")
        (decision,) = world.decide()
        homes.setdefault(decision.ask.session, set()).add(str(decision.prefill))
    assert all(len(each) == 1 for each in homes.values())
    assert len(set.union(*homes.values())) > 1
    gone = homes["s0"].pop()
    world.workers = [each for each in world.workers if str(each) != gone]
    world.change()
    world.ask(session="s1")
    (decision,) = world.decide()
    assert {str(decision.prefill)} == homes["s1"] or gone in homes["s1"]


def test_two_choices_avoid_the_busiest():
    world = World("power_of_two", prefill=3)
    world.workers[0].foreign.num_prefill_tokens = 100_000
    for _ in range(30):
        world.ask()
    assert Counter(where(world.decide())).get("p0", 0) == 0


def test_an_unknown_policy_is_named():
    with pytest.raises(ConfigError, match="no placement policy 'best'; known: conductor"):
        World("best")


# ---- whatever happens ----


class AnyLoad(RuleBasedStateMachine):
    """Requests come, are computed, end, leave; workers come, drain, go, change their layout. In each policy: only
    workers that may take a request get it, pairs fit, and nothing is lost, bound twice or left behind."""

    @initialize(
        policy=st.sampled_from(NAMES),
        prefill=st.integers(1, 3),
        decode=st.integers(1, 3),
        bound=st.sampled_from([1.25, 50.0]),
    )
    def begin(self, policy, prefill, decode, bound):
        self.world = World(policy, prefill, decode, rules=ConductorRules(load_bound=bound))
        self.waiting, self.bound, self.prefilled, self.serial = {}, {}, {}, 100

    def place(self):
        for decision in self.world.decide():
            self.waiting.pop(decision.ask)  # KeyError: lost or bound twice
            if decision.error is not None:
                assert isinstance(decision.error, NoWorker)
                continue
            chosen = [each for each in (decision.prefill, decision.decode) if each is not None]
            assert chosen
            for each in chosen:
                assert each in self.world.workers
                assert not each.draining
            if len(chosen) == 2:
                assert compatible(chosen[0].info, chosen[1].info)
                assert [each.info.role for each in chosen] == [Role.PREFILL, Role.DECODE]
            self.bound[decision.ask] = chosen

    @rule(
        tokens=st.integers(1, 4000),
        outputs=st.sampled_from([1, 2, 300]),
        priority=st.integers(-1, 1),
        pair=st.booleans(),
    )
    def arrive(self, tokens, outputs, priority, pair):
        ask = self.world.ask(tokens, max_tokens=outputs, priority=priority, disaggregate=pair or outputs == 1)
        self.waiting[ask] = None
        self.place()

    @rule(seconds=st.floats(0.001, 3.0))
    def wait(self, seconds):
        self.world.now += seconds
        self.place()

    @precondition(lambda self: self.bound)
    @rule(data=st.data())
    def compute(self, data):
        ask = data.draw(st.sampled_from(list(self.bound)))
        self.prefilled[ask] = self.bound.pop(ask)
        self.world.policy.prefilled(ask, data.draw(st.integers(0, ask.num_prompt_tokens - 1)))
        self.place()

    @precondition(lambda self: self.prefilled)
    @rule(data=st.data(), decoding=st.booleans())
    def end(self, data, decoding):
        ask = data.draw(st.sampled_from(list(self.prefilled)))
        del self.prefilled[ask]
        if decoding:
            self.world.policy.decoding(ask)
        self.world.policy.ended(ask, 10)
        self.place()

    @rule(data=st.data())
    def leave(self, data):
        everyone = [*self.waiting, *self.bound, *self.prefilled]
        if everyone:
            ask = data.draw(st.sampled_from(everyone))
            self.world.policy.ended(ask)
            self.world.policy.ended(ask)
            for group in (self.waiting, self.bound, self.prefilled):
                group.pop(ask, None)

    @rule(data=st.data(), what=st.sampled_from(["drain", "go", "layout", "join", "flip"]))
    def fleet(self, data, what):
        workers = self.world.workers
        self.serial += 1
        if what == "join" or not workers:
            workers.append(worker(f"w{self.serial}", data.draw(st.sampled_from(list(Role)))))
        else:
            each = data.draw(st.sampled_from(workers))
            if what == "drain":
                each.draining = True
            elif what == "go":
                workers.remove(each)
            elif what == "layout":
                each.info = replace(each.info, fingerprint=data.draw(st.sampled_from([b"f", b"g"])))
            else:
                each.info = replace(each.info, role=Role.DECODE if each.info.role is Role.PREFILL else Role.PREFILL)
        self.world.change()
        self.place()

    @invariant()
    def nothing_is_lost(self):
        assert self.world.policy.num_waiting == len(self.waiting)

    @invariant()
    def no_worker_idles_while_somebody_waits(self):
        """An ask waits only for a busy worker, so some station has a prompt to compute."""
        if self.waiting:
            assert any(station.num_prefills for station in self.world.policy.stations)
            assert self.world.policy.next_wakeup() is not None

    @invariant()
    def what_has_ended_is_not_counted(self):
        if not self.bound and not self.prefilled:
            for station in self.world.policy.stations:
                own = station.own
                assert (own.num_seqs, own.num_prefill_tokens, own.num_context_tokens) == (0, 0, 0)
                assert station.num_prefills == 0

    def teardown(self):
        """Starvation-free: when work gets done, everything waiting is bound in the end."""
        if not hasattr(self, "world"):
            return
        self.world.workers += [worker("lastp", Role.PREFILL), worker("lastd", Role.DECODE)]
        self.world.change()
        for _ in range(len(self.waiting) + len(self.bound) + 1):
            self.place()
            self.world.now += 5.0
            for ask in list(self.bound):
                self.world.policy.prefilled(ask, 0)
                self.prefilled[ask] = self.bound.pop(ask)
        self.place()
        assert not self.waiting


TestAnyLoad = AnyLoad.TestCase
TestAnyLoad.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 20_000), st.integers(0, 400)), min_size=1, max_size=40),
    policy=st.sampled_from([*BASELINES, "conductor"]),
)
def test_the_account_of_a_worker_is_the_sum_of_what_was_placed(sizes, policy):
    world = World(policy, rules=ConductorRules(alone_tokens=0, patience_s=1e9))
    for tokens, outputs in sizes:
        world.ask(tokens, max_tokens=outputs + 2)
    placed = world.decide()
    for station in world.policy.stations:
        mine = [each.ask for each in placed if each.decode is station.worker]
        assert station.own.num_seqs == len(mine)
        assert station.own.num_context_tokens == sum(a.num_prompt_tokens + min(a.max_tokens, 256) for a in mine)


# ---- what is remembered from plan to plan ----

PATIENT = ConductorRules(alone_tokens=0, patience_s=100)


def test_what_comes_to_be_cached_while_an_ask_waits_is_seen():
    world = World(prefixes=Prefixes(), rules=PATIENT)
    world.ask(4000)
    world.ask(4000)
    assert len(world.decide()) == 2
    world.ask(1000)
    assert world.decide() == []
    world.prefixes = Prefixes(p1=(60, 60, 60))
    world.now = 0.3
    assert world.decide() == []
    world.now = 0.4
    (decision,) = world.decide()
    assert (where([decision]), decision.forecast.num_cached_tokens) == (["p1"], 960)


def test_those_who_wait_are_planned_at_the_present_pace():
    world = World(prefill=1, prefixes=Prefixes(), rules=PATIENT)
    first = world.ask(4000)
    world.decide()
    world.ask(1000)
    assert world.decide() == []
    world.now = 0.8
    world.policy.prefilled(first, 0)
    pace = world.policy.stations[0].prefill_pace.factor
    assert pace > 1.05
    (decision,) = world.decide()
    assert decision.forecast.prefill_s == pytest.approx(0.1 * pace)


def test_a_worker_that_introduces_itself_anew_is_planned_anew():
    world = World(prefill=1, prefixes=Prefixes(s=(0, 60, 60)), rules=PATIENT, far=1e3)
    other, p0 = world.named("d0"), world.named("p0")
    other.info = replace(other.info, store_address="s")
    first = world.ask(4000)
    world.decide()
    world.ask(1000)
    assert world.decide() == []
    p0.info = replace(p0.info, store_address="s")
    world.change()
    world.now = 0.1
    world.policy.ended(first)
    (decision,) = world.decide()
    assert (decision.forecast.num_cached_tokens, decision.prefix_store) == (960, "")
