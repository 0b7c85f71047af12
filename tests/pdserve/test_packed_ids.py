"""Packed token ids read like the tuple that they stand for, and go to the wire as they are."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.types import Phase, Request, SamplingParams
from pdserve.wire.columns import PackedIds, pack_u32
from pdserve.wire.session import RouterUpdate, Submission, decode_router_update, encode_router_update

ids = st.lists(st.integers(0, 2**32 - 1), max_size=40).map(tuple)


def packed(values):
    return PackedIds(array("I", values).tobytes())


@settings(derandomize=True, deadline=None)
@given(ids, ids, st.slices(40))
def test_they_read_like_a_tuple(values, others, part):
    both = packed(values)
    assert (tuple(both), len(both), list(reversed(both))) == (values, len(values), list(reversed(values)))
    assert [both[at] for at in range(-len(values), len(values))] == [*values, *values]
    assert both[part] == values[part]
    assert both == values == both == packed(values)
    assert hash(both) == hash(values)
    assert (both == others) is (both == packed(others)) is (values == others)
    assert all(value in both for value in values)


@settings(derandomize=True, deadline=None)
@given(ids)
def test_a_worker_gets_the_same_ids(values):
    assert pack_u32(packed(values)) == pack_u32(values)
    request = Request("r", "m", packed(values), SamplingParams(max_tokens=1))
    update = RouterUpdate(submissions=[Submission(1, Phase.FULL, request)])
    (arrived,) = decode_router_update(encode_router_update(update)).submissions
    assert arrived.request is not None
    assert arrived.request.prompt_token_ids == values
