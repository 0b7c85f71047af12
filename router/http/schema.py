"""The request bodies of the OpenAI endpoints, as msgspec types: decoding checks them, `/openapi.json` shows them.

Fields fall into four groups. *Honoured* ones shape the answer. *Extensions* are ours or vLLM's and honoured too.
*Inert* ones are accepted because ignoring them cannot change the answer. *Refused* ones would change it and cannot be
honoured: only their neutral values pass (`REFUSED_CHAT`, `REFUSED_COMPLETION`), anything else is `NotSupported`.
Whatever is in none of the groups is unknown and refused by name, as OpenAI does.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Int64 = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Salt = Annotated[str, Meta(max_length=256)]
RequestId = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]


class StreamOptions(Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Inert: padding against traffic analysis is not sent."""


class JsonSchemaFormat(Struct, forbid_unknown_fields=True, kw_only=True):
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema: Any = None
    strict: bool | None = None
    """Inert: the output is always constrained to the schema."""


class ResponseFormat(Struct, forbid_unknown_fields=True, kw_only=True):
    type: str
    """text, json_object or json_schema."""
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Struct, forbid_unknown_fields=True, kw_only=True):
    """vLLM's way to constrain the output: exactly one field."""

    json: Any = None
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    json_object: bool | None = None
    choice: Any = None
    grammar: Any = None
    structural_tag: Any = None


class Message(Struct, forbid_unknown_fields=True, kw_only=True):
    """One turn. Assistant turns may be sent back as they were received: their empty fields pass."""

    role: str
    """system, developer (served as system), user or assistant."""
    content: str | list[dict[str, Any]] | None = None
    """Text, or text parts, which are joined by a newline as vLLM does."""
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    tool_calls: Any = None
    function_call: Any = None
    tool_call_id: Any = None


class GenerationBody(Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints take."""

    model: str

    # honoured
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Int32 | None = None
    n: Int32 | None = None
    presence_penalty: float | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    response_format: ResponseFormat | None = None

    # extensions
    cache_salt: Salt | None = None
    """Requests share cached KV only with those of the same salt."""
    deterministic: bool | None = None
    """Same tokens whatever else is in the batch."""
    guided_json: Any = None
    guided_regex: str | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_p: float | None = None
    min_tokens: Int32 | None = None
    priority: Int32 | None = None
    repetition_penalty: float | None = None
    request_id: RequestId | None = None
    """Becomes part of the response's id; the header x-request-id does the same."""
    return_token_ids: bool | None = None
    """Adds `token_ids` to choices, and `prompt_token_ids`."""
    skip_special_tokens: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    structured_outputs: StructuredOutputs | None = None
    top_k: Int32 | None = None

    # inert
    metadata: dict[str, str] | None = None
    user: str | None = None


class ChatBody(GenerationBody, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[Message]

    # honoured
    logprobs: bool | None = None
    max_completion_tokens: Int32 | None = None
    """The same as `max_tokens`; both may be given if they are equal."""
    top_logprobs: Int32 | None = None

    # inert
    parallel_tool_calls: bool | None = None
    prediction: dict[str, Any] | None = None
    """Only a hint to speed."""
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    # refused
    add_generation_prompt: bool | None = None
    audio: Any = None
    chat_template: Any = None
    chat_template_kwargs: Any = None
    continue_final_message: bool | None = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    reasoning_effort: Any = None
    service_tier: str | None = None
    store: bool | None = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: str | None = None
    web_search_options: Any = None


class CompletionBody(GenerationBody, forbid_unknown_fields=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | TokenId | list[TokenId]]
    """Text, texts, token ids, or lists of token ids; several prompts are answered with consecutive indexes."""

    # honoured
    logprobs: Int32 | None = None

    # extensions
    add_special_tokens: bool | None = None

    # refused
    best_of: Int32 | None = None
    echo: bool | None = None
    suffix: str | None = None


REFUSED_CHAT: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("add_generation_prompt", (True,), "the generation prompt is always added"),
    ("audio", (), "only text is served"),
    ("chat_template", (), "the model's own template is used"),
    ("chat_template_kwargs", ({},), "the model's own template is used as it is"),
    ("continue_final_message", (False,), "a final message cannot be continued; use /v1/completions"),
    ("function_call", ("none",), "function calls are not served"),
    ("functions", ([],), "function calls are not served"),
    ("modalities", (["text"], []), "only text is served"),
    ("reasoning_effort", (), "the models served here have no such setting"),
    ("service_tier", ("auto", "default"), "there is one service tier"),
    ("store", (False,), "answers are not stored"),
    ("tool_choice", ("none", "auto"), "tool calls are not served"),
    ("tools", ([],), "tool calls are not served"),
    ("verbosity", ("medium",), "the models served here have no such setting"),
    ("web_search_options", (), "web search is not served"),
)
"""(field, values that pass beside null, why the others don't)."""

REFUSED_COMPLETION: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("echo", (False,), "the prompt cannot be repeated in the answer"),
    ("suffix", ("",), "insertion is not served"),
)
