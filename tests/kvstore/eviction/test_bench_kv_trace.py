"""The benchmark's counting, its inputs, and the real trace's first minutes."""

import json

import pytest

from kvstore.eviction import HazardPolicy, KeyCache, LruPolicy
from pdserve.errors import InvalidRequest, NotFound
from pdserve_cli.__main__ import main
from pdserve_cli.bench_kv_trace import DEFAULT_TRACE, SIZES, compare, hit_ratio
from pdserve_cli.kv_workloads import BLOCK_TOKENS, SYNTHETIC, block_count, read_trace

RECORDS = [
    {"timestamp": 0, "hash_ids": [0, 1, 2]},
    {"timestamp": 500, "hash_ids": [0, 3]},
    {"timestamp": 9000, "hash_ids": [0, 1, 2, 4]},
]


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_json_on_stdout_is_one_object_of_policies_and_sizes(tmp_path, capsys):
    assert main(["bench", "kv-trace", "--trace", str(written(tmp_path / "t.jsonl", RECORDS)), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    ratio = round(4 / 9, 4)
    assert out == {"block_hit_ratio": {p: dict.fromkeys(SIZES, ratio) for p in ("default", "lru", "s3fifo", "belady")}}


def test_a_block_behind_a_missing_one_does_not_hit(tmp_path):
    stream = read_trace(written(tmp_path / "t.jsonl", RECORDS))
    cache = KeyCache(4, LruPolicy())
    hits = [cache.request(request.keys, request.arrival_s) for request in stream]
    assert hits == [0, 1, 3]
    cache.policy.forget(stream[0].keys[0])
    assert cache.match(stream[2].keys) == 0


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"timestamp": 0}', '{"timestamp": "0", "hash_ids": []}', '{"timestamp": 0, "hash_ids": [-1]}',
     '{"timestamp": 0, "hash_ids": [7, 7]}', '{"timestamp": 0, "hash_ids": 7}'],
)  # fmt: skip
def test_a_malformed_record_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "hash_ids": [1]}\n' + line + "\n")
    with pytest.raises(InvalidRequest, match="line 2"):
        read_trace(path)


def test_a_missing_or_empty_trace_is_an_error_and_prints_nothing(tmp_path, capsys):
    assert main(["bench", "kv-trace", "--trace", str(tmp_path / "none"), "--json"]) == 1
    (tmp_path / "empty").touch()
    assert main(["bench", "kv-trace", "--trace", str(tmp_path / "empty"), "--json"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "--trace PATH" in printed.err
    with pytest.raises(NotFound):
        read_trace(tmp_path)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_streams_are_seeded_ordered_and_large(name):
    stream = SYNTHETIC[name]()
    assert stream == SYNTHETIC[name]()
    assert stream == sorted(stream)
    assert all(len(set(request.keys)) == len(request.keys) for request in stream)
    assert block_count(stream) > 200_000


@pytest.mark.skipif(not DEFAULT_TRACE.is_file(), reason=f"needs Mooncake's conversation trace at {DEFAULT_TRACE}")
def test_on_the_first_minutes_of_the_conversation_trace_the_default_beats_lru_when_small():
    stream = read_trace(DEFAULT_TRACE)[:3000]
    capacity = 1_000_000 // BLOCK_TOKENS
    lru, hazard = (hit_ratio(stream, KeyCache(capacity, policy)) for policy in (LruPolicy(), HazardPolicy()))
    assert lru == pytest.approx(0.0482, abs=0.0001)
    assert hazard > 1.2 * lru


@pytest.mark.slow
@pytest.mark.skipif(not DEFAULT_TRACE.is_file(), reason=f"needs Mooncake's conversation trace at {DEFAULT_TRACE}")
def test_on_the_whole_conversation_trace_the_ratios_are_the_known_ones():
    ratios = compare(read_trace(DEFAULT_TRACE), "trace")
    known = {"lru": (0.053, 0.136, 0.285, 0.359), "s3fifo": (0.077, 0.154, 0.248, 0.352)}
    known["belady"] = (0.253, 0.353, 0.366, 0.366)
    for policy, row in known.items():
        assert tuple(ratios[policy].values()) == pytest.approx(row, abs=0.0006)
    assert all(got >= floor for got, floor in zip(ratios["default"].values(), (0.10, 0.165, 0.29, 0.355), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", SYNTHETIC)
def test_on_unlike_loads_the_default_is_no_worse_than_the_better_baseline(name):
    ratios = compare(SYNTHETIC[name](), name)
    for size in SIZES:
        assert ratios["default"][size] >= max(ratios["lru"][size], ratios["s3fifo"][size]) - 0.015
