"""Single calls to a store, for those who look on."""

from __future__ import annotations

from pdserve.rpc import Channel
from pdserve.wire import Method, RequestT, ResponseT
from pdserve.wire import store as wire
from pdserve_cli.members import Member

TIMEOUT_S = 120.0
"""A verify reads everything, the disk tier included."""


async def stat(store: Member) -> wire.Stat:
    return await _call(store, wire.STAT, wire.StatQuery())


async def verify(store: Member) -> wire.Verified:
    """Every block on every tier; wrong ones are dropped."""
    return await _call(store, wire.VERIFY, wire.Verify(all=True))


async def _call(store: Member, method: Method[RequestT, ResponseT], request: RequestT) -> ResponseT:
    channel = Channel(store.ready["address"])
    try:
        return await channel.call(method, request, timeout_s=TIMEOUT_S)
    finally:
        await channel.close()
