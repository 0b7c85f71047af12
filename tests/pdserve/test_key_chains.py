"""Keys from memory are those that hashing gives, whatever came before."""

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve import block_keys as module
from pdserve.block_keys import MAX_TOKENS, STRETCH_BLOCKS, KeyChains, block_keys

BLOCK = 2
STRETCH = STRETCH_BLOCKS * BLOCK
ROOTS = (b"a" * 16, b"b" * 16)


def pack(tokens):
    return array("I", tokens).tobytes()


turns = st.lists(
    st.tuples(
        st.sampled_from(ROOTS),
        st.integers(0, 5 * STRETCH),  # tokens shared with the conversation's earlier turns
        st.lists(st.integers(0, 2), max_size=2 * STRETCH),
    ),
    max_size=12,
)


@settings(derandomize=True)
@given(turns, st.integers(1, 3))
def test_any_mix_of_turns_gives_the_keys_that_hashing_gives(turns, max_stretches):
    chains, before = KeyChains(BLOCK, max_stretches), []
    for root, num_shared, more in turns:
        tokens = before[:num_shared] + more
        assert chains.keys(root, pack(tokens)) == block_keys(root, tokens, BLOCK)
        assert chains.num_stretches <= 2 * max_stretches
        before = tokens


def test_the_next_turn_hashes_only_what_is_new(monkeypatch):
    chains, hashed = KeyChains(BLOCK), []
    real = module._chain
    monkeypatch.setattr(
        module, "_chain", lambda key, packed, size: hashed.append(len(packed)) or real(key, packed, size)
    )
    first = list(range(3 * STRETCH))
    chains.keys(ROOTS[0], pack(first))
    hashed.clear()
    second = [*first, 7, 8, 9, 10]
    assert chains.keys(ROOTS[0], pack(second)) == block_keys(ROOTS[0], second, BLOCK)
    assert hashed[0] == 4 * 4, "behind the stretches that are known"


def test_another_tenants_chain_is_another_one():
    chains, tokens = KeyChains(BLOCK), list(range(2 * STRETCH))
    assert chains.keys(ROOTS[0], pack(tokens)) != chains.keys(ROOTS[1], pack(tokens))


@pytest.mark.parametrize("block_tokens", [16, 256])
def test_large_blocks_are_no_excuse_to_remember_more_tokens(block_tokens):
    chains, stretch = KeyChains(block_tokens), STRETCH_BLOCKS * block_tokens
    prompt = bytearray(4 * 16 * stretch)
    for i in range(MAX_TOKENS // stretch // 4):
        prompt[:4] = i.to_bytes(4, "little")
        chains.keys(b"root", bytes(prompt))
        assert chains.num_stretches * stretch <= 2 * MAX_TOKENS
