"""Filter, score, pick."""

import random
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest

from pdserve.errors import NoWorker
from pdserve.types import ModelInfo, Role, WorkerInfo
from router.scheduling.base import Need, Outstanding
from router.scheduling.pickers import MaxScore
from router.scheduling.scheduler import Scheduler, least_loaded
from router.scheduling.scorers import LeastSeqs, inverse_of

MODEL = ModelInfo("m", "r", "t", 4096, 1000, (0,))
NEED = Need(Role.DECODE, "m", 100, 50)


@dataclass
class Fake:
    info: WorkerInfo
    draining: bool = False
    own: Outstanding = field(default_factory=Outstanding)
    foreign: Outstanding = field(default_factory=Outstanding)


def worker(name, role, **changes):
    info = WorkerInfo(name, 1, role, f"{name}:1", MODEL, b"f", 16, 1000, 64)
    return Fake(replace(info, **changes))


def scheduler(seed=1):
    return Scheduler(least_loaded(seed, 16))


def test_a_pair_is_placed_with_reasons():
    placed = scheduler().place_pair([worker("p", Role.PREFILL), worker("d", Role.DECODE)], 1, NEED)
    assert (placed.prefill.info.worker_id, placed.decode.info.worker_id) == ("p", "d")
    assert "prefill=p" in placed.reasons
    assert any(reason.startswith("decode.least_context_tokens=") for reason in placed.reasons)


@pytest.mark.parametrize(
    ("workers", "role", "reason"),
    [
        ([], "decode", "none is connected"),
        ([("p", Role.PREFILL, {})], "decode", "p: role"),
        ([("d", Role.DECODE, {})], "prefill", "d: role"),
        ([("d", Role.DECODE, {"model": replace(MODEL, name="x")})], "decode", "d: model"),
        ([("d", Role.DECODE, {"num_blocks": 2})], "decode", "d: kv_pool_too_small"),
        ([("d", Role.DECODE, {"block_tokens": 32})], "decode", "d: block_tokens"),
        ([("p", Role.PREFILL, {"fingerprint": b"g"}), ("d", Role.DECODE, {})], "prefill", "p: incompatible_kv"),
        ([("p", Role.PREFILL, {"model": replace(MODEL, revision="2")}), ("d", Role.DECODE, {})], "prefill", "p: incom"),
    ],
)
def test_no_worker_names_the_role_and_each_refusal(workers, role, reason):
    fakes = [worker(name, kind, **changes) for name, kind, changes in workers]
    with pytest.raises(NoWorker, match=reason) as caught:
        scheduler().place_pair(fakes, 1, NEED)
    assert caught.value.leg == role


def test_a_draining_worker_gets_nothing():
    fakes = [worker("p", Role.PREFILL), worker("d", Role.DECODE)]
    fakes[1].draining = True
    with pytest.raises(NoWorker, match="d: draining"):
        scheduler().place_pair(fakes, 1, NEED)


def test_a_decode_worker_without_a_partner_is_passed_over():
    fakes = [
        worker("p", Role.PREFILL, fingerprint=b"g"),
        worker("d0", Role.DECODE),
        worker("d1", Role.DECODE, fingerprint=b"g"),
    ]
    assert {scheduler(seed).place_pair(fakes, 1, NEED).decode.info.worker_id for seed in range(8)} == {"d1"}


def test_the_least_loaded_worker_of_each_role_is_taken():
    fakes = [worker(name, role) for name, role in (("p0", Role.PREFILL), ("p1", Role.PREFILL))]
    fakes += [worker("d0", Role.DECODE), worker("d1", Role.DECODE)]
    fakes[0].own = Outstanding(1, 5000, 0)
    fakes[3].foreign = Outstanding(9, 0, 9000)
    placed = scheduler().place_pair(fakes, 1, NEED)
    assert (placed.prefill.info.worker_id, placed.decode.info.worker_id) == ("p1", "d0")


def test_idle_workers_share_the_load():
    fakes = [worker(f"d{i}", Role.DECODE) for i in range(4)]
    one = scheduler()
    taken = Counter(one.place_one(fakes, 1, NEED).decode.info.worker_id for _ in range(400))
    assert set(taken) == {"d0", "d1", "d2", "d3"}
    assert min(taken.values()) > 50


def test_the_same_seed_draws_the_same_lots():
    scores = [1.0] * 5
    first, second = MaxScore(random.Random(3)), MaxScore(random.Random(3))
    assert [first.pick(scores) for _ in range(20)] == [second.pick(scores) for _ in range(20)]


def test_scores_lie_between_0_and_1():
    fakes = [worker("a", Role.DECODE), worker("b", Role.DECODE, max_num_seqs=1)]
    fakes[0].own = Outstanding(3, 0, 0)
    fakes[1].own = Outstanding(1, 0, 0)
    assert LeastSeqs().score(fakes, NEED) == [pytest.approx(1 - 3 / 64), 0.0]
    assert inverse_of([0, 0]) == [1.0, 1.0]


def test_standing_verdicts_hold_until_the_version_changes():
    fakes = [worker("p", Role.PREFILL), worker("d0", Role.DECODE)]
    one = scheduler()
    assert one.place_pair(fakes, 1, NEED).decode is fakes[1]
    fakes[1].draining = True
    fakes.append(worker("d1", Role.DECODE))
    assert one.place_pair(fakes, 2, NEED).decode is fakes[2]


def test_a_worker_of_two_models_pools_serves_only_its_own():
    fakes = [worker("p", Role.PREFILL), worker("d", Role.DECODE)]
    fakes += [worker(f"x{role.value}", role, model=replace(MODEL, name="x")) for role in Role]
    one = scheduler()
    for name, wanted in (("m", "d"), ("x", "xdecode"), ("m", "d")):
        assert one.place_pair(fakes, 1, replace(NEED, model=name)).decode.info.worker_id == wanted
