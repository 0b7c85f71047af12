"""The node's store as its clients meet it."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest
from node_tools import (
    BLOCK_BYTES,
    FINGERPRINT,
    certificates,
    channel_to,
    client_of,
    get,
    keys,
    pages,
    put,
    running_store,
    until,
)

from kvstore.handover.verify import PoolDescriptor
from kvstore.node.client import StoreClient
from kvstore.node.service import check_identity
from kvstore.transports.base import Range
from kvstore.transports.shm import SharedMemoryPool
from kvstore.transports.tcp import TcpTransport
from kvstore.types import BlockId
from pdserve.errors import (
    ConfigError,
    DigestMismatch,
    Draining,
    FingerprintMismatch,
    InvalidRequest,
    NotSupported,
    PeerLost,
    QuotaExceeded,
    StaleBlock,
    TicketRefused,
    WorkerLost,
)
from pdserve.wire import store as wire


async def test_what_one_client_puts_another_reads_with_the_same_bytes() -> None:
    async with running_store() as store, client_of(store, "a") as writer, client_of(store, "b") as reader:
        chain = keys("a", 8)
        assert await put(writer, chain) == 8
        assert await put(writer, chain) == 0
        found = await reader.lookup([*chain, *keys("z", 1)], FINGERPRINT)
        into = np.zeros((8, BLOCK_BYTES), np.uint8)
        assert reader.read(found, into, range(8)) == 1  # one run, one copy
        assert (into == pages(chain)).all()
        assert await get(reader, keys("a", 3)) == 3
        assert (await reader.lookup(chain, b"G" * 16)).slots == ()


async def test_a_reader_that_outlived_its_lease_is_fenced_off() -> None:
    async with running_store(num_blocks=4, lease_s=0.01) as store, client_of(store) as client:
        await put(client, keys("a", 4))
        found = await client.lookup(keys("a", 4), FINGERPRINT)
        await until(lambda: store.parts.dram.expire() and not len(store.parts.dram.leases))
        await put(client, keys("b", 1))
        with pytest.raises(StaleBlock):
            client.read(found, np.zeros((4, BLOCK_BYTES), np.uint8), range(4))
        with pytest.raises(TicketRefused):
            await client.renew(found)


async def test_a_leased_block_survives_pressure() -> None:
    async with running_store(num_blocks=4) as store, client_of(store) as client:
        await put(client, keys("a", 4))
        found = await client.lookup(keys("a", 4), FINGERPRINT)
        assert await put(client, keys("b", 4)) == 0
        assert await client.renew(found) > 5
        client.read(found, np.zeros((4, BLOCK_BYTES), np.uint8), range(4))
        await client.release(found)
        assert await put(client, keys("b", 4)) == 4


async def test_wrong_bytes_are_refused_at_commit_and_found_at_read() -> None:
    async with running_store(digest_every=1) as store, client_of(store) as client:
        chain = keys("a", 2)
        reserved = await client.reserve(chain, FINGERPRINT)
        digests = client.write(reserved, pages(chain), range(2))
        client.pool.blocks[reserved.slots[1], 7] ^= 1
        with pytest.raises(DigestMismatch):
            await client.commit(reserved, digests)
        await put(client, chain)
        found = await client.lookup(chain, FINGERPRINT)
        store.parts.pool.blocks[found.slots[1], 7] ^= 1
        with pytest.raises(DigestMismatch):
            client.read(found, np.zeros((2, BLOCK_BYTES), np.uint8), range(2))
        async with channel_to(store.address) as channel:
            verified = await channel.call(wire.VERIFY, wire.Verify(all=True), timeout_s=60)
        assert verified == wire.Verified(2, (chain[1],))
        assert await get(client, chain) == 1


async def test_a_session_ends_with_its_stream_and_so_do_its_calls() -> None:
    async with running_store() as store, client_of(store, "other") as other:
        async with client_of(store) as client:
            await put(client, keys("a", 1))
        await until(lambda: len(store.parts.sessions) == 1)
        request = wire.Lookup(client.attached.session, FINGERPRINT, tuple(keys("a", 1)))
        async with channel_to(store.address) as channel:
            with pytest.raises(TicketRefused):
                await channel.call(wire.LOOKUP, request, timeout_s=60)
        assert await get(other, keys("a", 1)) == 1


async def test_attach_refuses_other_block_sizes_and_keeps_shared_memory_for_this_host() -> None:
    async with running_store() as store, channel_to(store.address) as channel:
        with pytest.raises(FingerprintMismatch):
            await StoreClient.attach(channel, "w", block_bytes=BLOCK_BYTES * 2)
        stream = channel.stream(wire.ATTACH, wire.Attach("far", "another host"))
        far = await anext(stream)
        assert far.segment == ""
        assert set(far.memory) == {"tcp"}
        with pytest.raises(NotSupported):  # nobody could tell whether it still writes
            await channel.call(wire.RESERVE, wire.Reserve(far.session, FINGERPRINT, tuple(keys("a", 1))), timeout_s=60)


class _Context:
    def __init__(self, peer: str, **auth: list[bytes]) -> None:
        self._peer, self._auth = peer, auth

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._auth


@pytest.mark.parametrize("peer", ["ipv4:127.0.0.1:5", "ipv6:%5B::1%5D:5", "unix:/run/x"])
def test_peers_on_this_host_are_identified(peer: str) -> None:
    check_identity(_Context(peer))


def test_a_peer_from_elsewhere_needs_a_certificate() -> None:
    with pytest.raises(TicketRefused):
        check_identity(_Context("ipv4:10.0.0.9:5"))
    with pytest.raises(TicketRefused):
        check_identity(_Context("ipv4:10.0.0.9:5", transport_security_type=[b"insecure"]))
    check_identity(_Context("ipv4:10.0.0.9:5", transport_security_type=[b"ssl"]))


async def test_the_pool_is_reached_by_tcp_too() -> None:
    async with running_store() as store, client_of(store) as client:
        await put(client, keys("a", 2))
        found = await client.lookup(keys("a", 2), FINGERPRINT)
        descriptor = PoolDescriptor.decode(client.attached.memory["tcp"])
        transport = TcpTransport()
        try:
            into = np.zeros(BLOCK_BYTES, np.uint8)
            peer = transport.connect(descriptor.region)
            peer.read([Range(found.slots[1] * BLOCK_BYTES, 0, BLOCK_BYTES)], into)
            assert (into == pages(keys("a", 2))[1]).all()
        finally:
            transport.close()


async def test_under_mutual_tls_strangers_get_neither_a_session_nor_bytes(tmp_path: Path) -> None:
    ours, theirs = certificates(tmp_path, "ours"), certificates(tmp_path, "theirs")
    tls = {"cert_file": ours.cert_file, "key_file": ours.key_file, "ca_file": ours.ca_file}
    async with running_store(tls=tls) as store:
        async with client_of(store, tls=ours) as client:
            await put(client, keys("a", 2))
            assert await get(client, keys("a", 2)) == 2
            memory = PoolDescriptor.decode(client.attached.memory["tcp"]).region
        for stranger in (None, theirs):
            async with channel_to(store.address, stranger) as channel:
                with pytest.raises(WorkerLost):
                    await StoreClient.attach(channel, "stranger")
        transport = TcpTransport()
        try:
            with pytest.raises(PeerLost):  # the descriptor leaked, and is not enough
                transport.connect(memory).read([Range(0, 0, 8)], np.zeros(8, np.uint8))
        finally:
            transport.close()


async def test_quotas_are_typed_errors_on_the_wire() -> None:
    async with running_store(quotas={"t": 2 * BLOCK_BYTES}) as store, client_of(store) as client:
        assert await put(client, keys("a", 4), tenant="t") == 2
        found = await client.lookup(keys("a", 2), FINGERPRINT)
        with pytest.raises(QuotaExceeded):
            await put(client, keys("b", 1), tenant="t")
        await client.release(found)
        assert await put(client, keys("b", 1), tenant="t") == 1
        assert await put(client, keys("c", 8), tenant="u") == 8


async def test_bad_calls_get_typed_errors() -> None:
    async with running_store() as store, client_of(store) as client:
        with pytest.raises(InvalidRequest):
            await client.lookup(keys("a", 1), b"short")
        with pytest.raises(InvalidRequest):
            await client.reserve([b"short"], FINGERPRINT)
        with pytest.raises(InvalidRequest):
            await client.reserve(keys("a", 1) * 2, FINGERPRINT)


async def test_pins_stat_list_and_drop() -> None:
    async with running_store(num_blocks=4) as store, client_of(store) as client, channel_to(store.address) as channel:
        await put(client, keys("a", 2), tenant="t")
        request = wire.Pin(FINGERPRINT, tuple(keys("a", 2)), True)
        assert (await channel.call(wire.PIN, request, timeout_s=60)).blocks == 2
        assert await put(client, keys("b", 4)) == 2
        stat = await channel.call(wire.STAT, wire.StatQuery(), timeout_s=60)
        assert (stat.node, stat.num_blocks, stat.visible_blocks, stat.pinned_blocks) == ("n1", 4, 4, 2)
        assert stat.tenants == {"t": 2, "": 2}
        listed = [block async for part in channel.stream(wire.LIST, wire.ListQuery()) for block in part.blocks]
        assert {block.key for block in listed} == {*keys("a", 2), *keys("b", 2)}
        assert (await channel.call(wire.DROP, wire.Drop(FINGERPRINT, tuple(keys("a", 1))), timeout_s=60)).blocks == 1
        assert (await channel.call(wire.DROP, wire.Drop(all=True), timeout_s=60)).blocks == 3
        assert await get(client, keys("b", 1)) == 0
        store.parts.dram.check_integrity()


async def _follow(store_address: str, request: wire.Follow, until_sequence: int) -> list[wire.EventBatch]:
    batches = []
    async with channel_to(store_address) as channel:
        async for batch in channel.stream(wire.EVENTS, request):
            batches.append(batch)
            done = not batch.snapshot or batch.snapshot_complete
            if done and batch.sequence >= until_sequence:
                return batches
    raise AssertionError("the stream ended")


async def test_followers_get_a_snapshot_then_changes_and_resume_where_they_were() -> None:
    async with running_store(num_blocks=4) as store, client_of(store) as client:
        await put(client, keys("a", 3))
        first = await _follow(store.address, wire.Follow(), 1)
        assert first[0].snapshot
        assert first[-1].snapshot_complete
        assert [event.keys for batch in first for event in batch.events] == [tuple(keys("a", 3))]
        await put(client, keys("b", 2))  # one block of a has to go
        end = store.parts.dram.events.sequence
        later = await _follow(store.address, wire.Follow(store.parts.incarnation, first[-1].sequence), end)
        assert not any(batch.snapshot for batch in later)
        events = [event for batch in later for event in batch.events]
        assert [event.sequence for event in events] == list(range(2, end + 1))
        assert {(event.kind, event.keys) for event in events} == {(1, tuple(keys("b", 2))), (2, (keys("a", 3)[2],))}
        stranger = await _follow(store.address, wire.Follow(incarnation=5, after=end), end)
        assert stranger[0].snapshot
        ahead = await _follow(store.address, wire.Follow(store.parts.incarnation, after=end + 7), end)
        assert ahead[0].snapshot


async def test_victims_move_to_disk_and_come_back_when_they_hit(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(num_blocks=8, disk=disk) as store, client_of(store) as client:
        dram, tiers = store.parts.dram, store.parts.tiers
        for prefix in "abcd":
            await put(client, keys(prefix, 4))
            await tiers.drain()  # a victim's slot comes free once it is on disk
            await put(client, keys(prefix, 4))
        assert tiers.disk is not None
        assert set(tiers.disk.ids()) == {BlockId(key, FINGERPRINT) for prefix in "ab" for key in keys(prefix, 4)}
        assert not any(key + FINGERPRINT in dram.entries for key in keys("a", 4))
        found = await client.lookup(keys("a", 4), FINGERPRINT)  # c goes down first
        assert (len(found.slots), found.promoted) == (4, 4)
        await client.release(found)
        assert await get(client, keys("a", 4)) == 4
        dram.check_integrity()
        tiers.disk.check_integrity()
    async with running_store(num_blocks=8, disk=disk) as store, client_of(store) as client:
        assert await get(client, keys("a", 4)) == 4  # a restart keeps the disk tier
        assert store.parts.tiers.drop([key + FINGERPRINT for key in keys("a", 4)]) == 4
        assert await get(client, keys("a", 4)) == 0


async def test_a_block_that_rotted_in_memory_is_not_written_down(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(num_blocks=2, disk=disk) as store, client_of(store) as client:
        await put(client, keys("a", 2))
        store.parts.pool.blocks[:, 3] ^= 1
        await put(client, keys("b", 2))
        await store.parts.tiers.drain()
        assert store.parts.tiers.disk is not None
        assert len(store.parts.tiers.disk) == 0
        assert await get(client, keys("a", 2)) == 0


async def test_a_draining_store_takes_nothing_new_and_lets_readers_finish() -> None:
    async with running_store(drain_timeout_s=20) as store, client_of(store) as client:
        await put(client, keys("a", 1))
        found = await client.lookup(keys("a", 1), FINGERPRINT)
        draining = asyncio.ensure_future(store.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await put(client, keys("b", 1))
        client.read(found, np.zeros((1, BLOCK_BYTES), np.uint8), [0])
        assert not draining.done()
        await client.release(found)
        await draining


async def test_a_drain_writes_down_what_is_in_memory(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(disk=disk, drain_timeout_s=20) as store, client_of(store) as client:
        await put(client, keys("a", 12))
        assert store.parts.tiers.disk is not None
        assert len(store.parts.tiers.disk) == 0
        await store.drain()
        assert len(store.parts.tiers.disk) == len(store.parts.dram.entries) == 12
        store.parts.dram.check_integrity()
    async with running_store(disk=disk) as store, client_of(store) as client:
        assert await get(client, keys("a", 12)) == 12


async def test_a_disk_that_fails_costs_blocks_and_no_answer(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(num_blocks=4, disk=disk) as store, client_of(store) as client:
        await put(client, keys("a", 2))
        await put(client, keys("b", 2))
        shutil.rmtree(tmp_path / "kv")
        await put(client, keys("c", 2))
        await store.parts.tiers.drain()
        assert store.registry.get_sample_value("pdserve_kvstore_demotion_failures_total") == 2
        assert await put(client, keys("c", 2)) == 2
        assert await get(client, keys("c", 2)) == 2
        assert await get(client, keys("a", 2)) == 0
        store.parts.dram.check_integrity()


async def test_bits_flipped_on_disk_shorten_the_hit_and_are_never_served(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(disk=disk, drain_timeout_s=20) as store, client_of(store) as client:
        await put(client, keys("a", 8))
        await store.drain()
    block = pages(keys("a", 8))[5].tobytes()
    for file in (tmp_path / "kv").iterdir():
        data = file.read_bytes()
        at = data.find(block)
        if at >= 0:
            file.write_bytes(data[: at + 9] + bytes([data[at + 9] ^ 1]) + data[at + 10 :])
    async with running_store(disk=disk) as store, client_of(store) as client:
        assert await get(client, keys("a", 8)) == 5
        assert store.registry.get_sample_value("pdserve_kvstore_integrity_failures_total", {"tier": "disk"}) == 1
        store.parts.dram.check_integrity()


async def test_a_caller_that_leaves_in_mid_promotion_costs_nothing(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(disk=disk, drain_timeout_s=20) as store, client_of(store) as client:
        await put(client, keys("a", 8))
        await store.drain()
    async with running_store(disk=disk) as store:
        dram, tiers = store.parts.dram, store.parts.tiers
        names = [key + FINGERPRINT for key in keys("a", 8)]
        caller = asyncio.ensure_future(tiers.lookup(names, "w", "t", lease=True, extends=False, promote=True))
        for _ in range(5):  # turns of the loop: the read has begun
            if not len(dram.reservations):
                await asyncio.sleep(0)
        assert len(dram.reservations) == 1
        caller.cancel()
        await tiers.drain()
        assert caller.cancelled()
        assert len(dram.reservations) == len(dram.leases) == 0
        assert set(dram.entries) == set(names)
        dram.check_integrity()


async def test_two_callers_share_one_promotion(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(disk=disk, drain_timeout_s=20) as store, client_of(store) as client:
        await put(client, keys("a", 8))
        await store.drain()
    async with running_store(disk=disk) as store, client_of(store, "a") as a, client_of(store, "b") as b:
        assert await asyncio.gather(get(a, keys("a", 8)), get(b, keys("a", 8))) == [8, 8]
        assert store.registry.get_sample_value("pdserve_kvstore_hit_blocks_total", {"tier": "disk"}) == 8


async def test_a_block_dropped_on_its_way_down_does_not_come_back(tmp_path: Path) -> None:
    disk = {"path": str(tmp_path / "kv"), "capacity_bytes": 1 << 22}
    async with running_store(num_blocks=2, disk=disk) as store, client_of(store) as client:
        await put(client, keys("a", 1))
        await put(client, keys("b", 1))
        dram, tiers = store.parts.dram, store.parts.tiers
        dram.reserve([keys("c", 1)[0] + FINGERPRINT], "t", "w")
        assert [entry.key for entry in dram.demoting.values()] == keys("a", 1)
        assert tiers.disk is not None
        with tiers.disk._write_lock:  # a slow disk: the write has begun, and does not end
            await asyncio.sleep(0.05)
            assert tiers.drop([keys("a", 1)[0] + FINGERPRINT]) == 1
        await tiers.drain()
        assert len(tiers.disk) == 0
        assert await get(client, keys("a", 1)) == 0
        dram.check_integrity()


async def test_a_stopped_store_is_a_lost_peer() -> None:
    async with running_store() as store, client_of(store) as client:
        await put(client, keys("a", 1))
        found = await client.lookup(keys("a", 1), FINGERPRINT)
        await store.stop()
        with pytest.raises(PeerLost):
            client.read(found, np.zeros((1, BLOCK_BYTES), np.uint8), [0])
        await asyncio.wait([client.lost], timeout=60)
        assert client.lost.done()


async def test_wrong_settings_name_their_key() -> None:
    for key, value in (("block_bytes", 0), ("transports", ["carrier pigeon"]), ("low_watermark", 1.0)):
        with pytest.raises(ConfigError) as caught:
            async with running_store(**{"high_watermark": 0.5, "low_watermark": 0.4, key: value}):
                pass
        assert caught.value.key == key


async def test_a_client_that_cannot_map_the_pool_leaves_no_session_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_store() as node, channel_to(node.address) as channel:

        def full(self: SharedMemoryPool) -> None:
            raise OSError("no memory")

        with monkeypatch.context() as broken:
            broken.setattr(SharedMemoryPool, "populate", full)
            with pytest.raises(OSError, match="no memory"):
                await StoreClient.attach(channel, "w")
        await until(lambda: not len(node.parts.sessions))
