"""Pools that are tiny on purpose still take each request, and their store's config is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.disk import DiskOptions
from kvstore.node.assembly import check_config
from pdserve.config import KvstoreConfig, load
from pdserve_cli.cluster import total
from pdserve_cli.tiers import BLOCK_TOKENS, TinyPools

BLOCK_BYTES = [256, 368_640, 737_280]


@given(st.lists(st.integers(1, 8000), min_size=1, max_size=64))
def test_a_worker_takes_the_longest_request(lengths: list[int]) -> None:
    assert TinyPools.of(lengths).worker * BLOCK_TOKENS >= max(lengths)


def test_most_of_many_prompts_have_no_room_in_memory() -> None:
    lengths = [480] * 63 + [4000]
    pools = TinyPools.of(lengths)
    blocks = sum(-(-length // BLOCK_TOKENS) for length in lengths)
    assert 2 * pools.worker + 2 * pools.dram < blocks / 1.5


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
def test_the_stores_config_is_valid_and_its_disk_takes_the_blocks(block_bytes: int) -> None:
    given_ = TinyPools.of([700] * 8).store(block_bytes, "/nowhere")
    config = load(KvstoreConfig, None, {"block_bytes": block_bytes, **given_})
    check_config(config)
    DiskOptions(capacity_bytes=config.disk.capacity_bytes, block_bytes=block_bytes)


def test_total_sums_the_samples_with_the_labels() -> None:
    samples = {
        'a_total{tier="hbm",x="1"}': 2.0,
        'a_total{tier="hbm",x="2"}': 3.0,
        'a_total{tier="disk"}': 7.0,
        "ab": 9.0,
    }
    assert total(samples, "a_total") == 12
    assert total(samples, "a_total", tier="hbm") == 5
    assert total(samples, "a") == 0
    assert total(samples, "ab") == 9
