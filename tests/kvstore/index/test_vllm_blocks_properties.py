"""Whatever an engine says, in any order: the stream of our events and our snapshot tell the same, and it is true."""

import hypothesis.strategies as st
from hypothesis import given, settings
from index_model import FP, Clock
from vllm_publisher import CLEARED, encode, removed, stored

from kvstore.index.base import NodeSnapshot
from kvstore.index.index import KVIndex
from kvstore.index.vllm_blocks import ModelRoots, VllmBlocks
from kvstore.index.vllm_wire import decode_batch
from kvstore.types import Tier
from pdserve.block_keys import block_keys

ROOT = b"root............"
TREE = {1: None, 2: 1, 3: 2, 4: 1, 5: None, 6: 5, 7: 3}
"""Engine blocks and their parents; block n holds four tokens n."""
MEDIA = {"GPU": Tier.HBM, "CPU": Tier.DRAM, "STORAGE": Tier.DISK}

names = st.sampled_from(sorted(TREE))
media = st.sampled_from(sorted(MEDIA))
event = st.one_of(
    st.tuples(st.just("stored"), names, media),
    st.tuples(st.just("stored"), names, media),
    st.tuples(st.just("removed"), names, media),
    st.tuples(st.just("cleared"), names, media),
)


def our_key(name: int) -> bytes:
    path = []
    at: int | None = name
    while at is not None:
        path = [at] * 4 + path
        at = TREE[at]
    return block_keys(ROOT, path, 4)[-16:]


def as_event(kind: str, name: int, medium: str) -> dict:
    if kind == "cleared":
        return CLEARED
    return stored([name], TREE[name], [name] * 4, medium=medium) if kind == "stored" else removed([name], medium)


def known(index: KVIndex) -> set[tuple[int, Tier]]:
    return {(name, place.tier) for name in TREE for place in index.locate(our_key(name), FP)}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(event, max_size=40), st.booleans(), st.integers(1, 8))
def test_stream_and_snapshot_agree_and_never_claim_what_is_gone(history, arrays, max_blocks):
    blocks = VllmBlocks(ModelRoots({"": ROOT}), block_tokens=4, fingerprint=FP, max_blocks=max_blocks)
    followed, copied = KVIndex(clock=Clock()), KVIndex(clock=Clock())
    followed.load(NodeSnapshot("engine", 1, 0))
    real: set[tuple[int, Tier]] = set()
    for kind, name, medium in history:
        batch = decode_batch(encode(1.0, [as_event(kind, name, medium)], arrays=arrays))
        followed.apply("engine", 1, blocks.translate(batch.events))
        if kind == "cleared":
            real.clear()
        elif kind == "stored":
            real.add((name, MEDIA[medium]))
        else:
            real.discard((name, MEDIA[medium]))
        assert known(followed) <= real
        assert len(blocks) <= max_blocks
    copied.load(blocks.snapshot("engine", 1))
    assert known(copied) == known(followed)
    assert followed.position("engine")[1] == blocks.sequence
    if max_blocks >= len(TREE) and not blocks.counts.orphans:
        assert known(followed) == real
