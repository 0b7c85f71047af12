"""What an `ImportLedger` asks its worker to do."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.engine.base import ImportTarget
from pdserve.errors import PdserveError
from pdserve.types import KVManifest, KVTicket


@dataclass(frozen=True, slots=True)
class Reserve:
    """`engine.import_blocks(...)` until it gives a target; then `ledger.reserved(this, target)`."""

    handle: int
    chunk_index: int
    first_token: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Bind:
    """Call the exporter's `Bind`; then `ledger.bound` or `ledger.bind_failed`."""

    handle: int
    ticket: KVTicket


@dataclass(frozen=True, slots=True)
class Pull:
    """`verify.pull_blocks` in a thread; then `ledger.pulled(pull_id)` or `ledger.pull_failed(pull_id, error)`, once
    the thread touches the target no more. Exactly one of the two is owed for every `Pull`."""

    pull_id: int
    handle: int
    ticket: KVTicket
    manifest: KVManifest
    target: ImportTarget


@dataclass(frozen=True, slots=True)
class AbortPull:
    """Make that pull end soon (its `should_stop`); its end is still owed."""

    pull_id: int


@dataclass(frozen=True, slots=True)
class Commit:
    """`engine.import_commit(...)`. Commits of one request come in order of their tokens."""

    handle: int
    first_token: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Resume:
    """`engine.resume(...)`. The ledger knows the request no more."""

    handle: int
    output_token_ids: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Renew:
    """Call the exporter's `Renew`; `ledger.renew_refused` if it doesn't know the ticket."""

    handle: int
    ticket: KVTicket


@dataclass(frozen=True, slots=True)
class ReleaseRemote:
    """Call the exporter's `Release`; None: all of the request. Retry or not: the lease is the backstop."""

    ticket: KVTicket
    chunk_indexes: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Failed:
    """Tell the router. The blocks follow with `FreeLocal`."""

    handle: int
    error: PdserveError


@dataclass(frozen=True, slots=True)
class FreeLocal:
    """`engine.cancel(handle)`: no pull writes into its blocks any more. The ledger knows the request no more."""

    handle: int


ImportAction = Reserve | Bind | Pull | AbortPull | Commit | Resume | Renew | ReleaseRemote | Failed | FreeLocal
