"""A real node store in this process, reached by real gRPC and shared memory."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from numpy.typing import NDArray

from kvstore.node.client import StoreClient
from kvstore.node.process import NodeStore
from pdserve.config import KvstoreConfig, from_mapping
from pdserve.rpc import Channel, Tls

BLOCK_BYTES = 4096
FINGERPRINT = b"F" * 16


def keys(prefix: str, length: int) -> list[bytes]:
    return [f"{prefix}{i}".encode().ljust(16, b".") for i in range(length)]


def pages(block_keys: list[bytes]) -> NDArray[np.uint8]:
    """A block a key; the bytes follow from the key."""
    return np.stack(
        [np.random.default_rng(int.from_bytes(key)).integers(0, 256, BLOCK_BYTES, np.uint8) for key in block_keys]
    )


@asynccontextmanager
async def running_store(**overrides: object) -> AsyncIterator[NodeStore]:
    """It does not scrub: what a test corrupts is for others to find."""
    tree = {"block_bytes": BLOCK_BYTES, "num_blocks": 16, "eviction": "lru", "high_watermark": 1.0,
            "low_watermark": 1.0, "node_id": "n1", "drain_timeout_s": 0.2,
            "scrub_blocks": 0, **overrides}  # fmt: skip
    store = NodeStore(from_mapping(KvstoreConfig, tree))
    try:
        await store.start()
        yield store
    finally:
        await store.stop()


@asynccontextmanager
async def channel_to(address: str, tls: Tls | None = None) -> AsyncIterator[Channel]:
    channel = Channel(address, tls=tls)
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def client_of(store: NodeStore, name: str = "w", tls: Tls | None = None) -> AsyncIterator[StoreClient]:
    async with channel_to(store.address, tls) as channel:
        client = await StoreClient.attach(channel, name, block_bytes=BLOCK_BYTES)
        try:
            yield client
        finally:
            await client.close()


def certificates(folder: Path, name: str) -> Tls:
    """A self-signed authority for loopback whose certificate is everybody's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / f"{name}.pem", folder / f"{name}.key"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    key_file.write_bytes(pem)
    return Tls(str(cert_file), str(key_file), str(cert_file))


async def put(client: StoreClient, block_keys: list[bytes], **options: object) -> int:
    rows = range(len(block_keys))
    return await client.put(block_keys, FINGERPRINT, pages(block_keys), rows, **options)  # type: ignore[arg-type]


async def get(client: StoreClient, block_keys: list[bytes], **options: object) -> int:
    """How many leading blocks were there; their bytes are checked."""
    found = await client.lookup(block_keys, FINGERPRINT, **options)  # type: ignore[arg-type]
    count = len(found.slots)
    into = np.zeros((max(count, 1), BLOCK_BYTES), np.uint8)
    client.read(found, into, range(count))
    assert (into[:count] == pages(block_keys)[:count]).all()
    await client.release(found)
    return count


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (what it waits for tells nobody)
            await asyncio.sleep(0.01)
