"""Names of KV blocks: a chain of hashes over the tokens that a block's KV was computed from.

`key[i] = SHA-256(key[i-1] || tokens of block i as u32 little-endian)[:16]`, where the key before the first is the
root: model revision, tokenizer, LoRA and a salt that the server derives from the tenant. Two requests share a block
only if their keys are equal, so tenants never see each other's. KV dtype and layout are not in the key: they are in
the fingerprint that every block carries beside it. Router and engines use this module (through `pdserve.tokens`).
"""

from __future__ import annotations

import hashlib
import hmac
import sys
from array import array
from collections.abc import Sequence

KEY_BYTES = 16
"""Of the 32 that SHA-256 gives: 2**64 blocks before a collision is likely, half the size in every index."""


def _pack(token_ids: Sequence[int]) -> bytes:
    packed = array("I", token_ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def tenant_salt(server_secret: bytes, tenant: str) -> bytes:
    """32 bytes that only the holder of the server's secret can derive: clients can't name another tenant's blocks."""
    return hmac.digest(server_secret, tenant.encode(), "sha256")


def root_key(
    model_revision: str, tokenizer_id: str, lora: str, tenant_salt: bytes, *, deterministic: bool = False
) -> bytes:
    """First link of the chain, 16 bytes. Each field is hashed with its length, so no two tuples read alike.

    Deterministic requests have a chain of their own: the batch-invariant kernels give KV with other bits.
    """
    digest = hashlib.sha256(b"pdserve block key 1" + (b" deterministic" if deterministic else b""))
    for field in (model_revision.encode(), tokenizer_id.encode(), lora.encode(), tenant_salt):
        digest.update(len(field).to_bytes(4, "little"))
        digest.update(field)
    return digest.digest()[:KEY_BYTES]


def next_key(previous: bytes, token_ids: Sequence[int]) -> bytes:
    """The key of one full block that follows `previous`, 16 bytes."""
    return hashlib.sha256(previous + _pack(token_ids)).digest()[:KEY_BYTES]


def block_keys(root: bytes, token_ids: Sequence[int], block_tokens: int) -> bytes:
    """16 bytes for each full block of `block_tokens` tokens, one after the other; a partial tail has no key.

    Hot path: 0.4 to 0.6 ms for 12,000 tokens (750 blocks of 16) on one core.
    """
    packed = _pack(token_ids)
    size = 4 * block_tokens
    sha256 = hashlib.sha256
    keys = []
    key = root
    for start in range(0, len(packed) - size + 1, size):
        key = sha256(key + packed[start : start + size]).digest()[:KEY_BYTES]
        keys.append(key)
    return b"".join(keys)
