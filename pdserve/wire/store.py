"""The node store's calls. Columns (keys, slots, digests, ...) are packed on the wire and tuples here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from google.protobuf.message import Message

from pdserve.errors import InvalidRequest
from pdserve.v1 import kv_store_service_pb2 as pb
from pdserve.wire import Method
from pdserve.wire.columns import pack_u32, pack_u64, unpack_u32, unpack_u64

T = TypeVar("T")

KEY_BYTES = 16
"""Of keys and of digests."""


@dataclass(frozen=True, slots=True)
class Attach:
    """A client comes. `host_id` empty: it wants no shared memory; `block_bytes` 0: it takes any."""

    client: str = ""
    host_id: str = ""
    block_bytes: int = 0
    alive_segment: str = ""
    """A shared-memory segment that the client owns: its lock tells whether the client lives."""


@dataclass(frozen=True, slots=True)
class Attached:
    """The session, and how to reach the pool. `segment` is empty on another host."""

    session: bytes
    node: str
    incarnation: int
    num_blocks: int
    block_bytes: int
    segment: str = ""
    memory: Mapping[str, bytes] = field(default_factory=dict)
    """Transport -> its own descriptor of the pool."""
    lease_ms: int = 0
    reservation_ms: int = 0


@dataclass(frozen=True, slots=True)
class Lookup:
    session: bytes
    fingerprint: bytes
    keys: tuple[bytes, ...]
    tenant: str = ""
    """Whose quota pays for what is brought up from disk."""
    no_lease: bool = False
    extends: bool = False
    no_promotion: bool = False
    traceparent: str = ""
    """W3C, of the request that this is for; empty: no span."""


@dataclass(frozen=True, slots=True)
class Found:
    """The longest prefix that is here; columns of equal length."""

    lease_id: int = 0
    slots: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()
    digests: tuple[bytes, ...] = ()
    promoted: int = 0


@dataclass(frozen=True, slots=True)
class RenewLease:
    session: bytes
    lease_id: int


@dataclass(frozen=True, slots=True)
class LeaseRenewed:
    lease_ms: int = 0


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    session: bytes
    lease_id: int


@dataclass(frozen=True, slots=True)
class Done:
    """An answer that says nothing else."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """`keys` is the whole chain, from its first block on."""

    session: bytes
    fingerprint: bytes
    keys: tuple[bytes, ...]
    tenant: str = ""
    extends: bool = False
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Reserved:
    """`statuses` has one number a block (`kvstore.node.entries.Status`); slots and generations are of the reserved."""

    reservation_id: int = 0
    statuses: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    generations: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    session: bytes
    reservation_id: int
    digests: tuple[bytes, ...]
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Committed:
    committed: int = 0


@dataclass(frozen=True, slots=True)
class Abort:
    session: bytes
    reservation_id: int


@dataclass(frozen=True, slots=True)
class Pin:
    fingerprint: bytes
    keys: tuple[bytes, ...]
    pinned: bool = False
    soft_ttl_ms: int = 0


@dataclass(frozen=True, slots=True)
class Drop:
    fingerprint: bytes = b""
    keys: tuple[bytes, ...] = ()
    all: bool = False


@dataclass(frozen=True, slots=True)
class Blocks:
    """How many it concerned."""

    blocks: int = 0


@dataclass(frozen=True, slots=True)
class StatQuery:
    pass


@dataclass(frozen=True, slots=True)
class Stat:
    """The store at a glance; blocks unless named otherwise."""

    node: str
    incarnation: int
    num_blocks: int
    block_bytes: int
    free_blocks: int
    visible_blocks: int
    reserved_blocks: int
    leased_blocks: int
    pinned_blocks: int
    largest_free_run: int
    disk_blocks: int
    leases: int
    sessions: int
    sequence: int
    tenants: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ListQuery:
    limit: int = 0
    """0: all."""


@dataclass(frozen=True, slots=True)
class ListedBlock:
    key: bytes
    fingerprint: bytes
    tier: int
    """A `kvstore.types.Tier`."""
    slot: int = 0
    tenant: str = ""
    leases: int = 0
    pinned: bool = False
    parent: bytes = b""


@dataclass(frozen=True, slots=True)
class Listed:
    blocks: tuple[ListedBlock, ...] = ()


@dataclass(frozen=True, slots=True)
class Verify:
    fingerprint: bytes = b""
    keys: tuple[bytes, ...] = ()
    all: bool = False


@dataclass(frozen=True, slots=True)
class Verified:
    checked: int = 0
    corrupt: tuple[bytes, ...] = ()
    """Keys of blocks in DRAM that were wrong, and are dropped."""
    corrupt_on_disk: int = 0


@dataclass(frozen=True, slots=True)
class Follow:
    """Events after `after` of `incarnation` (0: nothing is known yet)."""

    incarnation: int = 0
    after: int = 0


@dataclass(frozen=True, slots=True)
class EventColumns:
    """A `kvstore.types.StoreEvent`, its enums as numbers."""

    sequence: int
    kind: int
    tier: int
    keys: tuple[bytes, ...]
    fingerprint: bytes
    parents: tuple[bytes, ...] = ()
    """Of the keys, in order; empty for the first block of a chain."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """With `snapshot`: forget the node; what follows until `snapshot_complete` is its content."""

    node: str
    incarnation: int
    snapshot: bool = False
    snapshot_complete: bool = False
    events: tuple[EventColumns, ...] = ()
    sequence: int = 0
    """Where the follower stands after this batch; an empty batch is a sign of life."""


def _split(data: bytes) -> tuple[bytes, ...]:
    if len(data) % KEY_BYTES:
        raise InvalidRequest(f"a column of {KEY_BYTES}-byte values has {len(data)} bytes", param="keys")
    return tuple(data[i : i + KEY_BYTES] for i in range(0, len(data), KEY_BYTES))


def _join(values: Iterable[bytes]) -> bytes:
    return b"".join(values)


_NO_PARENT = bytes(KEY_BYTES)
"""On the wire, for a block that is the first of its chain."""


def _join_parents(parents: Iterable[bytes]) -> bytes:
    return b"".join(parent or _NO_PARENT for parent in parents)


def _split_parents(data: bytes) -> tuple[bytes, ...]:
    return tuple(b"" if parent == _NO_PARENT else parent for parent in _split(data))


_COLUMNS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "keys": (_join, _split),
    "digests": (_join, _split),
    "corrupt": (_join, _split),
    "parents": (_join_parents, _split_parents),
    "slots": (pack_u32, lambda data: tuple(unpack_u32(data))),
    "generations": (pack_u64, lambda data: tuple(unpack_u64(data))),
    "statuses": (bytes, tuple),
    "memory": (dict, dict),
    "tenants": (dict, dict),
    "blocks": (lambda blocks: blocks if isinstance(blocks, int) else [_to(pb.KvBlock, b) for b in blocks], lambda b: b),
    "events": (lambda events: [_to(pb.KvEvent, e) for e in events], lambda e: e),
}
"""Fields that look different on the wire, by name: (to the message, from it)."""


def _to(message: type[Message], value: Any) -> Any:
    encoded = {}
    for item in fields(value):
        raw = getattr(value, item.name)
        encoded[item.name] = _COLUMNS[item.name][0](raw) if item.name in _COLUMNS else raw
    return message(**encoded)


def _from(cls: type[T], message: Any) -> T:
    decoded = {}
    for item in fields(cls):  # type: ignore[arg-type]
        raw = getattr(message, item.name)
        decoded[item.name] = _COLUMNS[item.name][1](raw) if item.name in _COLUMNS else raw
    return cls(**decoded)


def _codec(cls: type[T], message: type[Message]) -> tuple[Callable[[T], bytes], Callable[[bytes], T]]:
    """Between a dataclass and the message whose fields have the same names."""
    return (
        lambda value: _to(message, value).SerializeToString(),
        lambda data: _from(cls, message.FromString(data)),
    )


def _decode_listed(data: bytes) -> Listed:
    return Listed(tuple(_from(ListedBlock, block) for block in pb.ListResponse.FromString(data).blocks))


def _decode_batch(data: bytes) -> EventBatch:
    message = pb.EventsResponse.FromString(data)
    return EventBatch(
        node=message.node,
        incarnation=message.incarnation,
        snapshot=message.snapshot,
        snapshot_complete=message.snapshot_complete,
        events=tuple(_from(EventColumns, event) for event in message.events),
        sequence=message.sequence,
    )


_SERVICE = "/" + pb.DESCRIPTOR.services_by_name["KvStoreService"].full_name


def _method(
    name: str, request: type[Any], request_pb: type[Message], response: type[Any], response_pb: type[Message],
    *, streams: bool = False, decode: Callable[[bytes], Any] | None = None,
) -> Method[Any, Any]:  # fmt: skip
    encode_response, decode_response = _codec(response, response_pb)
    return Method(
        f"{_SERVICE}/{name}", False, streams, *_codec(request, request_pb), encode_response, decode or decode_response
    )


ATTACH: Method[Attach, Attached] = _method(
    "Attach", Attach, pb.AttachRequest, Attached, pb.AttachResponse, streams=True
)
LOOKUP: Method[Lookup, Found] = _method("Lookup", Lookup, pb.LookupRequest, Found, pb.LookupResponse)
RENEW_LEASE: Method[RenewLease, LeaseRenewed] = _method(
    "RenewLease", RenewLease, pb.RenewLeaseRequest, LeaseRenewed, pb.RenewLeaseResponse
)
RELEASE_LEASE: Method[ReleaseLease, Done] = _method(
    "ReleaseLease", ReleaseLease, pb.ReleaseLeaseRequest, Done, pb.ReleaseLeaseResponse
)
RESERVE: Method[Reserve, Reserved] = _method("Reserve", Reserve, pb.ReserveRequest, Reserved, pb.ReserveResponse)
COMMIT: Method[Commit, Committed] = _method("Commit", Commit, pb.CommitRequest, Committed, pb.CommitResponse)
ABORT: Method[Abort, Done] = _method("Abort", Abort, pb.AbortRequest, Done, pb.AbortResponse)
PIN: Method[Pin, Blocks] = _method("Pin", Pin, pb.PinRequest, Blocks, pb.PinResponse)
DROP: Method[Drop, Blocks] = _method("Drop", Drop, pb.DropRequest, Blocks, pb.DropResponse)
STAT: Method[StatQuery, Stat] = _method("Stat", StatQuery, pb.StatRequest, Stat, pb.StatResponse)
LIST: Method[ListQuery, Listed] = _method(
    "List", ListQuery, pb.ListRequest, Listed, pb.ListResponse, streams=True, decode=_decode_listed
)
VERIFY: Method[Verify, Verified] = _method("Verify", Verify, pb.VerifyRequest, Verified, pb.VerifyResponse)
EVENTS: Method[Follow, EventBatch] = _method(
    "Events", Follow, pb.EventsRequest, EventBatch, pb.EventsResponse, streams=True, decode=_decode_batch
)
