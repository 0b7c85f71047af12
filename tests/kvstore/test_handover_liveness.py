"""With a network that loses nothing, every request arrives, whatever is doubled, scarce or retried."""

from collections.abc import Iterator

import pytest
from handover_model import World

from pdserve.types import KVManifest
from pdserve.wire.handover import decode_manifest, encode_manifest


@pytest.fixture
def world() -> Iterator[World]:
    made = World(num_prefill=2, num_decode=2)
    yield made
    made.settle()
    made.check_nothing_is_left()
    made.close()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("chunk_tokens", [4, 8, 20])
def test_every_request_arrives(world: World, chunk_tokens: int, double: bool) -> None:
    """Eight requests of 1 to 20 tokens; the pools hold about two of them at a time."""
    for n in range(8):
        handle = world.submit(f"p{n % 2}", f"d{n // 4}", 1 + (n * 7) % 20, chunk_tokens, num_cached=0)
        world.run(double)
        assert handle in world.resumed
        world.decode[f"d{n // 4}"].engine.cancel(handle)
    assert world.failed == {}
    assert all(not p.engine.pool.owner for p in world.prefill.values()), "released without waiting for a lease"


def test_requests_wait_for_room_and_then_arrive(world: World) -> None:
    """Five prompts of 5 blocks at once, 8 blocks at prefill and 10 at decode."""
    handles = [world.submit(f"p{n % 2}", "d0", 20, 4) for n in range(5)]
    for _ in range(20):
        world.run()
        for handle in world.resumed:
            world.decode["d0"].engine.cancel(handle)
    assert world.resumed == set(handles)


def test_a_lost_prefill_that_is_retried_before_a_commit_arrives(world: World) -> None:
    handle = world.submit("p0", "d0", 20, 8)
    world.prefill["p0"].step(handle + 1)
    while world.wire:
        world.deliver()
    world.decode["d0"].try_reserves()
    world.start_prefill("p0")
    world.wire.clear()  # the bind that was on its way to it
    world.submit_prefill("p1", "d0", handle, 12)
    world.run(double=True)
    assert handle in world.resumed


def test_a_prefill_lost_after_its_last_chunk_is_retried_for_its_token_only(world: World) -> None:
    handle = world.submit("p0", "d0", 8, 8)
    world.prefill["p0"].step(handle + 1)
    world.wire = [m for m in world.wire if not m.what.startswith("outputs")]
    for _ in range(6):
        while world.wire:
            world.deliver()
        world.decode["d0"].try_reserves()
        for pull_id in list(world.decode["d0"].pulls):
            world.decode["d0"].run_pull(pull_id)
    assert handle not in world.resumed
    world.start_prefill("p0")
    world.submit_prefill("p1", "d0", handle, 4)
    world.run()
    assert handle in world.resumed
    assert world.failed == {}


def test_cancel_on_both_sides_frees_everything_without_a_timeout(world: World) -> None:
    handle = world.submit("p0", "d0", 20, 4)
    for _ in range(3):
        world.move(double=False)
    world.cancel_prefill_of(handle)
    decode = world.decode["d0"]
    decode.do(decode.ledger.cancel(handle))
    world.run()
    world.check_nothing_is_left()


def test_the_wire_keeps_a_manifests_ticket() -> None:
    manifest = KVManifest(1, 16, 3, (5,), (2**63,), (bytes(16),), True, ticket_id=b"12345678")
    assert decode_manifest(encode_manifest(manifest)) == manifest
