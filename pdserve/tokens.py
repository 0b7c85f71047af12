"""Text to tokens, tokens to text, and the names of the blocks they fill."""

from __future__ import annotations

from pdserve.block_keys import KEY_BYTES, block_keys, next_key, root_key, tenant_salt

__all__ = ["KEY_BYTES", "block_keys", "next_key", "root_key", "tenant_salt"]
