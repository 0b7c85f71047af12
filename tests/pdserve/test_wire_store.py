"""Every message of the node store's service comes back as it went."""

from __future__ import annotations

import pytest

from pdserve.errors import InvalidRequest
from pdserve.wire import Method
from pdserve.wire import store as wire

K, L = b"k" * 16, b"l" * 16
VALUES = [
    (wire.ATTACH, wire.Attach("w", "host", 4096, "pdserve-kv-1"),
     wire.Attached(b"s", "n", 7, 8, 4096, "seg", {"tcp": b"d"}, 10, 20)),
    (wire.LOOKUP, wire.Lookup(b"s", L, (K, L), "t", True, True, True), wire.Found(3, (1, 2), (5, 2**40), (K, L), 1)),
    (wire.RENEW_LEASE, wire.RenewLease(b"s", 3), wire.LeaseRenewed(9)),
    (wire.RELEASE_LEASE, wire.ReleaseLease(b"s", 3), wire.Done()),
    (wire.RESERVE, wire.Reserve(b"s", L, (K,), "t", True), wire.Reserved(4, (1, 2, 3, 4), (9,), (1,))),
    (wire.COMMIT, wire.Commit(b"s", 4, (K,)), wire.Committed(1)),
    (wire.ABORT, wire.Abort(b"s", 4), wire.Done()),
    (wire.PIN, wire.Pin(L, (K,), True, 50), wire.Blocks(1)),
    (wire.DROP, wire.Drop(L, (K,), True), wire.Blocks(2)),
    (wire.STAT, wire.StatQuery(), wire.Stat("n", *range(1, 14), {"t": 4})),
    (wire.LIST, wire.ListQuery(5), wire.Listed((wire.ListedBlock(K, L, 1, 3, "t", 2, True, L),))),
    (wire.VERIFY, wire.Verify(L, (K,), False), wire.Verified(5, (K,), 2)),
    (wire.EVENTS, wire.Follow(7, 8),
     wire.EventBatch("n", 7, True, True, (wire.EventColumns(1, 1, 2, (K, L), L, (b"", K)),), 9)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "request_value", "response"), VALUES, ids=[m.name for m, _, _ in VALUES])
def test_values_survive_the_wire(method: Method[object, object], request_value: object, response: object) -> None:
    assert method.decode_request(method.encode_request(request_value)) == request_value
    assert method.decode_response(method.encode_response(response)) == response


def test_a_ragged_column_of_keys_is_refused() -> None:
    data = wire.LOOKUP.encode_request(wire.Lookup(b"s", L, (K, b"short")))
    with pytest.raises(InvalidRequest):
        wire.LOOKUP.decode_request(data)
