"""Tickets, manifests and the control calls of a hand-over."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from pdserve.errors import ProtocolMismatch
from pdserve.types import KVManifest, KVTicket
from pdserve.v1 import kv_handover_service_pb2 as pb
from pdserve.wire import PROTOCOL_MAX, PROTOCOL_MIN, Method
from pdserve.wire.columns import pack_u32, pack_u64, unpack_u32, unpack_u64
from pdserve.wire.common import decode_rank, encode_rank

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Bind:
    """A decode worker asks to read what the ticket stands for."""

    nonce: bytes
    exporter_incarnation: int
    decode_worker_id: str
    decode_incarnation: int
    fingerprint: bytes
    host_id: str
    transports: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """How to read it: the transport and its own descriptor of the exporter's hand-over memory."""

    transport: str
    memory: bytes
    lease_ms: int


@dataclass(frozen=True, slots=True)
class Renew:
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Renewed:
    lease_ms: int


@dataclass(frozen=True, slots=True)
class Release:
    """These chunks (or all) will not be read any more."""

    nonce: bytes
    chunk_indexes: tuple[int, ...] = ()
    all: bool = False


@dataclass(frozen=True, slots=True)
class Released:
    pass


def _check_version(version: int, what: str) -> None:
    if not PROTOCOL_MIN <= version <= PROTOCOL_MAX:
        raise ProtocolMismatch(f"{what} has version {version}; this process reads {PROTOCOL_MIN} to {PROTOCOL_MAX}")


def encode_ticket(ticket: KVTicket) -> bytes:
    return pb.KvTicket(
        version=ticket.version,
        request_id=ticket.request_id,
        worker_id=ticket.worker_id,
        incarnation=ticket.incarnation,
        nonce=ticket.nonce,
        fingerprint=ticket.fingerprint,
        address=ticket.address,
        lease_ms=ticket.lease_ms,
        num_prompt_tokens=ticket.num_prompt_tokens,
        rank=encode_rank(ticket.rank),
    ).SerializeToString()


def decode_ticket(data: bytes) -> KVTicket:
    """Raises `ProtocolMismatch` for bytes that are no ticket or a ticket of another version."""
    try:
        message = pb.KvTicket.FromString(data)
    except DecodeError as error:
        raise ProtocolMismatch("the ticket cannot be read") from error
    _check_version(message.version, "the ticket")
    return KVTicket(
        request_id=message.request_id,
        worker_id=message.worker_id,
        incarnation=message.incarnation,
        nonce=message.nonce,
        fingerprint=message.fingerprint,
        address=message.address,
        lease_ms=message.lease_ms,
        num_prompt_tokens=message.num_prompt_tokens,
        rank=decode_rank(message.rank),
        version=message.version,
    )


def encode_manifest(manifest: KVManifest) -> bytes:
    return pb.KvManifest(
        version=manifest.version,
        chunk_index=manifest.chunk_index,
        first_token=manifest.first_token,
        num_tokens=manifest.num_tokens,
        blocks=pack_u32(manifest.blocks),
        generations=pack_u64(manifest.generations),
        digests=b"".join(manifest.digests),
        final=manifest.final,
        rank=encode_rank(manifest.rank),
        ticket_id=manifest.ticket_id,
    ).SerializeToString()


def decode_manifest(data: bytes) -> KVManifest:
    """Raises `ProtocolMismatch` for bytes that are no manifest, or whose columns differ in length."""
    try:
        message = pb.KvManifest.FromString(data)
    except DecodeError as error:
        raise ProtocolMismatch("the manifest cannot be read") from error
    _check_version(message.version, "the manifest")
    blocks = tuple(unpack_u32(message.blocks))
    generations = tuple(unpack_u64(message.generations))
    digests = tuple(message.digests[i : i + DIGEST_BYTES] for i in range(0, len(message.digests), DIGEST_BYTES))
    if not len(blocks) == len(generations) == len(digests) or len(message.digests) % DIGEST_BYTES:
        raise ProtocolMismatch(
            f"the manifest's columns differ: {len(blocks)} blocks, {len(generations)} generations, "
            f"{len(message.digests)} digest bytes"
        )
    return KVManifest(
        chunk_index=message.chunk_index,
        first_token=message.first_token,
        num_tokens=message.num_tokens,
        blocks=blocks,
        generations=generations,
        digests=digests,
        final=message.final,
        rank=decode_rank(message.rank),
        version=message.version,
        ticket_id=message.ticket_id,
    )


def _encode_bind(bind: Bind) -> bytes:
    return pb.BindRequest(
        nonce=bind.nonce,
        exporter_incarnation=bind.exporter_incarnation,
        decode_worker_id=bind.decode_worker_id,
        decode_incarnation=bind.decode_incarnation,
        fingerprint=bind.fingerprint,
        host_id=bind.host_id,
        transports=bind.transports,
    ).SerializeToString()


def _decode_bind(data: bytes) -> Bind:
    message = pb.BindRequest.FromString(data)
    return Bind(
        nonce=message.nonce,
        exporter_incarnation=message.exporter_incarnation,
        decode_worker_id=message.decode_worker_id,
        decode_incarnation=message.decode_incarnation,
        fingerprint=message.fingerprint,
        host_id=message.host_id,
        transports=tuple(message.transports),
    )


def _encode_bound(bound: Bound) -> bytes:
    return pb.BindResponse(transport=bound.transport, memory=bound.memory, lease_ms=bound.lease_ms).SerializeToString()


def _decode_bound(data: bytes) -> Bound:
    message = pb.BindResponse.FromString(data)
    return Bound(message.transport, message.memory, message.lease_ms)


def _encode_release(release: Release) -> bytes:
    return pb.ReleaseRequest(
        nonce=release.nonce, chunk_indexes=release.chunk_indexes, all=release.all
    ).SerializeToString()


def _decode_release(data: bytes) -> Release:
    message = pb.ReleaseRequest.FromString(data)
    return Release(message.nonce, tuple(message.chunk_indexes), message.all)


_SERVICE = "/" + pb.DESCRIPTOR.services_by_name["KvHandoverService"].full_name

BIND: Method[Bind, Bound] = Method(
    _SERVICE + "/Bind", False, False, _encode_bind, _decode_bind, _encode_bound, _decode_bound
)
RENEW: Method[Renew, Renewed] = Method(
    _SERVICE + "/Renew",
    False,
    False,
    lambda renew: pb.RenewRequest(nonce=renew.nonce).SerializeToString(),
    lambda data: Renew(pb.RenewRequest.FromString(data).nonce),
    lambda renewed: pb.RenewResponse(lease_ms=renewed.lease_ms).SerializeToString(),
    lambda data: Renewed(pb.RenewResponse.FromString(data).lease_ms),
)
RELEASE: Method[Release, Released] = Method(
    _SERVICE + "/Release",
    False,
    False,
    _encode_release,
    _decode_release,
    lambda released: pb.ReleaseResponse().SerializeToString(),
    lambda data: Released(),
)
