"""Text to tokens and back, chat templates, and the names of the blocks that tokens fill.

The router's only door to a model's vocabulary: loads from a folder (`tokenizer.json`) or a GGUF in a fraction of a
second, without torch or transformers. Workers see token ids only.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from pdserve.block_keys import KEY_BYTES, KeyChains, block_keys, next_key, root_key, tenant_salt
from pdserve.chat_skeleton import Skeleton
from pdserve.chat_template import ChatTemplate, Message
from pdserve.detokenize import Detokenizer, StopMatcher, TokenTable
from pdserve.errors import ConfigError, InvalidRequest, NotSupported
from pdserve.gguf_metadata import GGUFFile, read_gguf
from pdserve.segments import segment_encoder
from pdserve.tokenizer_gguf import tokenizer_from_gguf

__all__ = [
    "KEY_BYTES",
    "ChatTemplate",
    "Detokenizer",
    "KeyChains",
    "Message",
    "StopMatcher",
    "TokenTable",
    "Tokenizer",
    "block_keys",
    "next_key",
    "root_key",
    "tenant_salt",
]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token")


class Tokenizer:
    """A model's vocabulary and chat template. Owned by one thread: encoding remembers pieces of text."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.table = TokenTable(backend)
        self._segments = segment_encoder(backend)
        self._adds_special = backend.num_special_tokens_to_add(False) > 0

    def twin(self) -> Tokenizer:
        """The same one for another thread: what it remembers is its own."""
        return Tokenizer(self.backend, self.chat_template and self.chat_template.twin())

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder with `tokenizer.json`, or from a GGUF. Raises `ConfigError` (key "model")."""
        path = Path(path)
        return cls.from_folder(path) if path.is_dir() else cls.from_gguf(read_gguf(path))

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> Tokenizer:
        source = gguf.text("tokenizer.chat_template")
        template = ChatTemplate(source, _gguf_special_tokens(gguf)) if source else None
        return cls(tokenizer_from_gguf(gguf), template)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"{folder} has no tokenizer.json; save the fast tokenizer there", key="model")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            raise ConfigError(f"{file} is not a readable tokenizer: {error}", key="model") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, _folder_template(folder))

    @property
    def vocab_size(self) -> int:
        """Token ids run below this; a model's embedding may be padded beyond."""
        return len(self.table.texts)

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str = "prompt") -> list[int]:
        """Token ids, with BOS and the like where the model asks for it. About 1 µs a token that is not remembered.

        Raises `InvalidRequest` naming `param` when the text has no UTF-8 form (a lone surrogate).
        """
        try:
            if self._segments is not None and not (add_special_tokens and self._adds_special):
                return self._segments.encode(text)
            ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"{param} is not valid Unicode text", param=param) from error
        return ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Messages to token ids by the model's chat template, which writes BOS itself. `variables` are what the
        template may read besides (such as Qwen's `enable_thinking`).

        Raises `NotSupported` when the model has no template, else as `ChatTemplate.render`.
        """
        if tools is None and not variables:
            return self.pack_chat(messages, add_generation_prompt=add_generation_prompt).tolist()
        return self._encode_rendered(messages, add_generation_prompt, tools, variables)

    def pack_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> array[int]:
        """`encode_chat` without anything besides, packed: turns that are known are copied as they lie in memory."""
        if self.chat_template is None:
            raise NotSupported("this model has no chat template; use /v1/completions", param="messages")
        if self._segments is not None and self._segments.separate:
            skeleton = self.chat_template.skeleton(messages, add_generation_prompt=add_generation_prompt)
            if skeleton is not None:
                return self._encode_turns(skeleton, messages)
        return array("I", self._encode_rendered(messages, add_generation_prompt, None, {}))

    def _encode_rendered(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> list[int]:
        if self.chat_template is None:
            raise NotSupported("this model has no chat template; use /v1/completions", param="messages")
        text = self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        return self.encode(text, add_special_tokens=False, param="messages")

    def _encode_turns(self, skeleton: Skeleton, messages: Sequence[Message]) -> array[int]:
        assert self._segments is not None
        try:
            return self._segments.encode_chat(skeleton, [message["content"] for message in messages])
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("messages is not valid Unicode text", param="messages") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder, for one choice."""
        return (self.table if skip_special_tokens else self._whole_table).detokenizer()

    @cached_property
    def _whole_table(self) -> TokenTable:
        return TokenTable(self.backend, skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        return self.table.token_text(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        return self.table.token_bytes(token_id)


def _gguf_special_tokens(gguf: GGUFFile) -> dict[str, str]:
    tokens = gguf.strings("tokenizer.ggml.tokens")
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: gguf.integer(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None and token_id < len(tokens)}


def _folder_template(folder: Path) -> ChatTemplate | None:
    config = _read_json(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text("utf-8") if file.is_file() else _configured_template(config.get("chat_template"))
    return ChatTemplate(source, _config_special_tokens(config)) if source else None


def _configured_template(value: Any) -> str | None:
    """Older folders hold a list of named templates; "default" is the one for plain chat."""
    if isinstance(value, list):
        return next((item.get("template") for item in value if item.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def _config_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {name: config.get(name) for name in _SPECIAL_NAMES}
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: value for name, value in contents.items() if isinstance(value, str)}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        loaded = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}", key="model") from error
    return loaded if isinstance(loaded, dict) else {}
