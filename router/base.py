"""The seam between the router's faces (HTTP, gRPC) and its core.

A face parses and validates what a client sent into an `Incoming`, gives it to `Core.submit` together with a `Sink`,
and writes whatever the sink is told to the client. Everything runs on one event loop; a sink's methods are plain
calls (no task per request or chunk), must not block and must not raise.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from pdserve.errors import PdserveError
from pdserve.types import FinishReason, Logprobs, ModelInfo, SamplingParams


class ChatMessage(Struct, frozen=True):
    """One turn of a conversation. `extra` holds what templates may use beside (name, tool_calls, ...)."""

    role: str
    content: str
    extra: tuple[tuple[str, object], ...] = ()


class Incoming(Struct, frozen=True):
    """A validated request whose prompt is still text, messages or tokens: exactly one of the three is given."""

    request_id: str
    model: str
    params: SamplingParams
    text: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    token_ids: Sequence[int] | None = None
    """As a client gave them, or an array of type "I" from `Core.prepare`."""
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    deterministic: bool = False
    cache_salt: str = ""
    priority: int = 0
    timeout_ms: int = 0
    traceparent: str = ""
    session: str = ""
    """The client's name for its conversation, for the policy `session`."""
    arrived_s: float | None = None
    """On `time.monotonic`; None: now. Set by `Core.prepare`, so that its time counts."""


class Usage(Struct, frozen=True):
    """Tokens: in the prompt, in all choices together, and of the prompt those found in a cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Sink(Protocol):
    """Where one request's output goes. Calls come in this order: `on_tokens`* and one `on_finish` for each choice,
    then one `on_done`; or at any point one `on_error`, and nothing after it."""

    def on_tokens(self, choice: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprobs]) -> None:
        """New output of a choice. `text` may be empty (held back: an incomplete character, a possible stop string);
        `token_ids` are those of this step, so text and ids need not cover each other. `logprobs` is empty unless
        asked for."""
        ...

    def on_finish(self, choice: int, reason: FinishReason, stop: str | int | None) -> None:
        """A choice has ended; `stop` is the stop string or token id that ended it, if one did."""
        ...

    def on_done(self, usage: Usage) -> None:
        """All choices have ended."""
        ...

    def on_error(self, error: PdserveError) -> None:
        """The request failed; tokens may have been delivered before (`error.work_done`)."""
        ...


class Handle(Protocol):
    """A request under way."""

    @property
    def request_id(self) -> str: ...

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...

    def cancel(self) -> None:
        """The client went away: free everything on both workers. No call of the sink follows. Idempotent."""
        ...


class Core(Protocol):
    """What a face may ask of the router."""

    def prepare(self, incoming: Incoming) -> asyncio.Future[Incoming] | None:
        """None: submit it as it is. For a long prompt what is to be submitted in its place, once it has been tokenised
        off the event loop; that may raise a `PdserveError`. Raises `Overloaded` when too many wait for it."""
        ...

    def submit(self, incoming: Incoming, sink: Sink) -> Handle:
        """Tokenise, admit, place and send. Raises a `PdserveError` for what is known at once (a field, an unknown
        model, no worker, overload); later failures go to the sink. Never calls the sink before it returns."""
        ...

    def models(self) -> Sequence[ModelInfo]:
        """Those that can be served now, by name."""
        ...

    def token_text(self, model: str, token_id: int) -> tuple[str, bytes]:
        """A token by itself, as text and as bytes (logprobs)."""
        ...

    def ready(self) -> str | None:
        """None when requests can be served, else why not."""
        ...

    def record(self, request_id: str) -> dict[str, object] | None:
        """What shaped the answer of a request, by field of `router.catalog.Record`, or shapes it: then `outcome` is
        empty. None: not (or no longer) known. Neither prompt nor output is in it."""
        ...


async def prepared(core: Core, incoming: Incoming) -> Incoming:
    """What is to be submitted, waited for."""
    later = core.prepare(incoming)
    return incoming if later is None else await later
