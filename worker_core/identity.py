"""Who a worker is, as far as peers must compare it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from pdserve.types import KVLayout, Request

FINGERPRINT_BYTES = 16


def fingerprint(layout: KVLayout) -> bytes:
    """Equal exactly if all fields of two layouts are: what must hold before bytes of KV are shared. `deterministic` is
    left out where it is off, so that stores filled before there was such a field stay good."""
    fields = asdict(layout)
    if not layout.deterministic:
        del fields["deterministic"]
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).digest()[:FINGERPRINT_BYTES]


def num_context_tokens(request: Request) -> int:
    """Tokens whose KV a hand-over moves: the prompt, and the outputs of a migrated request with one choice."""
    outputs = request.output_token_ids
    return len(request.prompt_token_ids) + (len(outputs[0]) if len(outputs) == 1 else 0)
