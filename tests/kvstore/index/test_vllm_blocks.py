"""From vLLM's events to ours: shapes, hashes, roots, and what must be left out."""

import msgspec
import pytest
from index_model import FP
from vllm_publisher import CLEARED, encode, removed, stored

from kvstore.index.base import Section
from kvstore.index.vllm_blocks import ModelRoots, VllmBlocks
from kvstore.index.vllm_wire import decode_batch
from kvstore.types import EventKind, Tier
from pdserve.block_keys import block_keys
from pdserve.errors import ConfigError, InvalidRequest, ProtocolMismatch

ROOT, LORA_ROOT, TENANT_ROOT = b"root............", b"lora root.......", b"tenant root....."
TOKENS = list(range(100, 120))
KEYS = [block_keys(ROOT, TOKENS, 4)[at : at + 16] for at in range(0, 80, 16)]


def blocks(**more) -> VllmBlocks:
    roots = ModelRoots({"": ROOT, "sql": LORA_ROOT}, salt_is_root=True)
    return VllmBlocks(roots, **{"block_tokens": 4, "fingerprint": FP, **more})


def feed(target: VllmBlocks, *events, arrays: bool = False):
    return target.translate(decode_batch(encode(1.0, events, arrays=arrays)).events)


def held(target: VllmBlocks, tier: Tier = Tier.HBM) -> set[bytes]:
    sections = [section for section in target.snapshot("n", 1).sections if section.tier is tier]
    return {section.keys[at : at + 16] for section in sections for at in range(0, len(section.keys), 16)}


@pytest.mark.parametrize("arrays", [False, True])
@pytest.mark.parametrize("names", [[11, 2**63 + 5, 13], [b"a" * 32, b"b" * 32, b"c" * 32]])
def test_a_chain_becomes_our_chain_in_either_shape(arrays, names):
    ours = blocks()
    first = feed(ours, stored(names[:2], None, TOKENS[:8]), arrays=arrays)
    then = feed(ours, stored(names[2:], names[1], TOKENS[8:12]), arrays=arrays)
    gone = feed(ours, removed(names[1:2]), arrays=arrays)
    assert [(e.sequence, e.kind, e.keys) for e in (*first, *then, *gone)] == [
        (1, EventKind.STORED, tuple(KEYS[:2])),
        (2, EventKind.STORED, (KEYS[2],)),
        (3, EventKind.REMOVED, (KEYS[1],)),
    ]
    assert first[0].parents == (ROOT, KEYS[0])
    assert then[0].parents == (KEYS[1],)
    assert first[0].fingerprint == FP
    assert ours.snapshot("n", 7).sections == (Section(Tier.HBM, FP, KEYS[0] + KEYS[2]),)
    assert ours.snapshot("n", 7).sequence == 3


def test_cleared_empties_every_tier_that_had_blocks():
    ours = blocks()
    feed(ours, stored([1], None, TOKENS[:4]), stored([1], None, TOKENS[:4], medium="CPU"))
    cleared = feed(ours, CLEARED)
    assert [(e.kind, e.tier) for e in cleared] == [(EventKind.CLEARED, Tier.HBM), (EventKind.CLEARED, Tier.DRAM)]
    assert len(ours) == 0
    assert feed(ours, removed([1])) == []
    assert ours.counts.unknown_removals == 1


def test_a_block_in_two_tiers_is_known_until_it_left_both():
    ours = blocks()
    feed(ours, stored([1], None, TOKENS[:4]), stored([1], None, TOKENS[:4], medium="CPU"), removed([1]))
    assert held(ours, Tier.HBM) == set()
    assert held(ours, Tier.DRAM) == {KEYS[0]}
    assert [e.kind for e in feed(ours, stored([2], 1, TOKENS[4:8]))] == [EventKind.STORED]
    feed(ours, removed([1], "CPU"))
    feed(ours, stored([3], 1, TOKENS[4:8]))
    assert ours.counts.orphans == 1


def test_a_block_without_a_known_parent_is_left_out():
    ours = blocks()
    assert feed(ours, stored([2, 3], 1, TOKENS[4:12])) == []
    assert ours.counts.orphans == 2


def test_lora_and_salt_choose_the_root():
    ours = blocks()
    feed(ours, stored([1], None, TOKENS[:4], lora_name="sql", extra_keys=[["sql"]]))
    feed(ours, stored([2], None, TOKENS[:4], extra_keys=[[TENANT_ROOT.hex()]]))
    assert held(ours) == {block_keys(LORA_ROOT, TOKENS[:4], 4), block_keys(TENANT_ROOT, TOKENS[:4], 4)}


@pytest.mark.parametrize("extra", [["a salt"], ["00" * 15], [["image", 0]], [TENANT_ROOT.hex(), ["image", 0]]])
def test_chains_with_an_unknown_root_are_left_out(extra):
    ours = blocks()
    assert feed(ours, stored([1, 2], None, TOKENS[:8], extra_keys=[extra, None])) == []
    assert ours.counts.untranslatable == 2


def test_an_unknown_lora_is_left_out():
    ours = blocks()
    assert feed(ours, stored([1], None, TOKENS[:4], lora_name="poems", extra_keys=[["poems"]])) == []


def test_a_clients_salt_names_nobodys_root_unless_it_is_ours():
    ours = VllmBlocks(ModelRoots({"": ROOT}), block_tokens=4, fingerprint=FP)
    assert feed(ours, stored([1], None, TOKENS[:4], extra_keys=[[TENANT_ROOT.hex()]])) == []


def test_an_image_ends_what_can_be_named():
    ours = blocks()
    feed(ours, stored([1, 2, 3], None, TOKENS[:12], extra_keys=[None, [["image", 0]], None]))
    assert held(ours) == {KEYS[0]}
    assert ours.counts.untranslatable == 2


def test_larger_engine_blocks_are_several_of_ours():
    ours = blocks()
    feed(ours, stored([1, 2], None, TOKENS[:16], size=8))
    assert held(ours) == set(KEYS[:4])
    feed(ours, removed([1]))
    assert held(ours) == set(KEYS[2:4])
    feed(ours, stored([3], 2, TOKENS[16:20], size=4))
    assert KEYS[4] in held(ours)


def test_blocks_that_do_not_divide_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="block size"):
        feed(blocks(), stored([1], None, TOKENS[:6], size=6))


def test_a_full_map_lets_the_oldest_block_go_and_says_so():
    ours = blocks(max_blocks=2)
    feed(ours, stored([1], None, TOKENS[:4]))
    events = feed(ours, stored([2, 3], 1, TOKENS[4:12]))
    assert [(e.kind, e.keys) for e in events] == [
        (EventKind.STORED, tuple(KEYS[1:3])),
        (EventKind.REMOVED, (KEYS[0],)),
    ]
    assert len(ours) == 2
    assert ours.counts.evicted == 1


def test_two_chains_under_one_hash_never_leave_the_older_behind():
    ours = blocks()
    feed(ours, stored([1], None, TOKENS[:4]))
    events = feed(ours, stored([1], None, TOKENS[4:8]))
    assert [e.kind for e in events] == [EventKind.REMOVED, EventKind.STORED]
    assert held(ours) == {block_keys(ROOT, TOKENS[4:8], 4)}


def test_other_media_groups_and_kinds_are_counted_and_passed_over():
    batch = decode_batch(
        encode(
            1.0,
            [
                stored([1], None, TOKENS[:4], medium="EXTERNAL"),
                stored([1], None, TOKENS[:4], group_idx=1),
                {"type": "BlockMoved", "to": "the moon"},
                stored([1], None, TOKENS[:4], group_idx=0),
            ],
            arrays=False,
        )
    )
    assert batch.skipped == 3
    assert len(batch.events) == 1


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xff",
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, [7], 0]),
        msgspec.msgpack.encode([1.0, [{"no": "type"}], 0]),
        msgspec.msgpack.encode({"ts": 1}),
        encode(1.0, [stored([1, 2], None, TOKENS[:4])], arrays=False),
        encode(1.0, [stored([1], None, TOKENS[:4], extra_keys=[None, None])], arrays=True),
    ],
)
def test_what_is_not_a_batch_is_refused(payload):
    with pytest.raises(ProtocolMismatch):
        decode_batch(payload)


def test_a_section_must_be_whole():
    with pytest.raises(InvalidRequest):
        Section(Tier.HBM, FP, b"x" * 17)
