"""From what a client sent to what an engine takes: tokens, bounds, seed, cache keys.

Everything that can be known to be wrong before a worker is asked is found here and raised as a typed error.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from msgspec.structs import replace

from pdserve.errors import ContextLengthExceeded, InvalidRequest, Overloaded, PayloadTooLarge
from pdserve.tokens import KeyChains, Tokenizer, root_key, tenant_salt
from pdserve.types import ModelInfo, Request, SamplingParams
from pdserve.wire.columns import PackedIds
from router.base import ChatMessage, Incoming

SEED_BITS = 63
MAX_PROMPT_TOKENS = 600_000
"""A submission takes 5 bytes a token (id and block keys) and must stay clear of the 4 MiB that a worker's server takes:
a larger one would cost the stream, and every other request on it."""
LONG_CHARS = 20_000
"""From here on a prompt is tokenised in a thread: new text costs 0.35 µs a character, and 7 ms of the event loop would
be seen between other requests' tokens. (Words that are known cost a tenth of it.)"""
MAX_IN_THREAD = 256
"""Long prompts that may wait for the thread."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a model takes just now. `max_tokens`: prompt and output together, by the model and by the workers' room."""

    model: ModelInfo
    max_len: int


class PromptMaker:
    """For one model."""

    def __init__(self, tokenizer: Tokenizer, block_tokens: int, secret: bytes) -> None:
        self._tokenizer = tokenizer
        self._chains = KeyChains(block_tokens)
        self._secret = secret
        self._seeds = random.Random()
        """Seeded by the operating system: drawn seeds differ between routers and runs."""
        self._roots: dict[tuple[str, str, str, bool], bytes] = {}
        self._thread = ThreadPoolExecutor(1, "tokenise")
        self._threads_tokenizer: Tokenizer | None = None
        """What the thread remembers is its own."""
        self._num_in_thread = 0

    def prepare(self, incoming: Incoming, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Incoming] | None:
        """See `router.base.Core`."""
        if _num_chars(incoming) < LONG_CHARS:
            return None
        if self._num_in_thread >= MAX_IN_THREAD:
            raise Overloaded(f"{self._num_in_thread} long prompts wait to be tokenised", retry_after_s=1.0)
        self._num_in_thread += 1
        prepared = loop.run_in_executor(self._thread, self._in_thread, incoming, time.monotonic())
        prepared.add_done_callback(self._left_thread)
        return prepared

    def _in_thread(self, incoming: Incoming, arrived_s: float) -> Incoming:
        if self._threads_tokenizer is None:
            self._threads_tokenizer = self._tokenizer.twin()
        token_ids = _token_ids(self._threads_tokenizer, incoming)
        return replace(incoming, messages=None, text=None, token_ids=token_ids, arrived_s=arrived_s)

    def _left_thread(self, prepared: asyncio.Future[Incoming]) -> None:
        self._num_in_thread -= 1
        if not prepared.cancelled():
            prepared.exception()  # who asked may be gone; then nobody else takes note of it

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def request(self, incoming: Incoming, bounds: Bounds) -> Request:
        """Raises `InvalidRequest`, `ContextLengthExceeded`, `NotSupported`."""
        token_ids = self._tokenise(incoming, bounds.model.vocab_size)
        params = self._resolve(incoming.params, len(token_ids), bounds)
        root = self._root(bounds.model, incoming.cache_salt, incoming.deterministic)
        return Request(
            request_id=incoming.request_id,
            model=bounds.model.name,
            prompt_token_ids=token_ids,
            params=params,
            cache_root=root,
            block_keys=self._chains.keys(root, token_ids.packed),
            deterministic=incoming.deterministic,
            timeout_ms=incoming.timeout_ms,
            priority=incoming.priority,
            traceparent=incoming.traceparent,
        )

    def _tokenise(self, incoming: Incoming, vocab_size: int) -> PackedIds:
        if incoming.messages is not None or incoming.text is not None:
            token_ids = _token_ids(self._tokenizer, incoming)
        elif isinstance(incoming.token_ids, array):
            token_ids = incoming.token_ids  # tokenised in the thread
        else:
            given = incoming.token_ids or ()
            if given and not (min(given) >= 0 and max(given) < vocab_size):
                raise InvalidRequest(f"prompt has a token id outside 0 to {vocab_size - 1}", param="prompt")
            token_ids = array("I", given)
        if not token_ids:
            raise InvalidRequest("prompt is empty: it must have at least one token", param="prompt")
        return PackedIds(token_ids.tobytes())

    def _resolve(self, params: SamplingParams, num_prompt_tokens: int, bounds: Bounds) -> SamplingParams:
        """With `max_tokens` and `seed` filled in and every token id known to the model."""
        _check_ids(params, bounds.model.vocab_size)
        if num_prompt_tokens > MAX_PROMPT_TOKENS:
            raise PayloadTooLarge(
                f"the prompt has {num_prompt_tokens} tokens; this server takes {MAX_PROMPT_TOKENS}", param="prompt"
            )
        left = bounds.max_len - num_prompt_tokens
        if left < 1:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {bounds.max_len} tokens; the prompt has {num_prompt_tokens}, "
                "which leaves no room for an answer: shorten it",
                param="prompt",
            )
        max_tokens = params.max_tokens if params.max_tokens is not None else left
        if max_tokens > left:
            raise ContextLengthExceeded(
                f"this model's maximum context length is {bounds.max_len} tokens; {num_prompt_tokens + max_tokens} "
                f"were requested ({num_prompt_tokens} in the prompt, {max_tokens} for the answer): reduce either",
                param="max_tokens",
            )
        if params.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens must not exceed the {max_tokens} tokens that the context leaves", param="min_tokens"
            )
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(SEED_BITS)
        return replace(params, max_tokens=max_tokens, seed=seed)

    def _root(self, model: ModelInfo, cache_salt: str, deterministic: bool) -> bytes:
        if cache_salt:
            return self._make_root(model, cache_salt, deterministic)
        key = (model.name, model.revision, model.tokenizer_id, deterministic)
        if key not in self._roots:
            self._roots[key] = self._make_root(model, "", deterministic)
        return self._roots[key]

    def _make_root(self, model: ModelInfo, cache_salt: str, deterministic: bool) -> bytes:
        salt = tenant_salt(self._secret, cache_salt)
        return root_key(model.revision, model.tokenizer_id, "", salt, deterministic=deterministic)


def _num_chars(incoming: Incoming) -> int:
    if incoming.messages is not None:
        return sum([len(message.content) for message in incoming.messages])
    return 0 if incoming.text is None else len(incoming.text)


def _token_ids(tokenizer: Tokenizer, incoming: Incoming) -> array[int]:
    """Of messages or a text."""
    if incoming.messages is not None:
        return tokenizer.pack_chat([_as_mapping(message) for message in incoming.messages])
    return array("I", tokenizer.encode(incoming.text or "", add_special_tokens=incoming.add_special_tokens))


def _as_mapping(message: ChatMessage) -> dict[str, object]:
    return {"role": message.role, "content": message.content, **dict(message.extra)}


def _check_ids(params: SamplingParams, vocab_size: int) -> None:
    if params.logit_bias and max(token_id for token_id, _ in params.logit_bias) >= vocab_size:
        raise InvalidRequest(f"logit_bias names a token id outside 0 to {vocab_size - 1}", param="logit_bias")
    if params.stop_token_ids and max(params.stop_token_ids) >= vocab_size:
        raise InvalidRequest(f"stop_token_ids has an id outside 0 to {vocab_size - 1}", param="stop_token_ids")
