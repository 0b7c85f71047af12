"""A fast tokenizer from a GGUF's metadata, so that one file is all a model needs.

`transformers` can do it too, in seconds and with torch; and it forgets the model's own pre-tokenizer (SmolLM2's
splits digits first, which shows in text such as "a  12"). The pre-tokenizers here are those of the models' original
`tokenizer.json`; a GGUF names its own in `tokenizer.ggml.pre`.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from pdserve.errors import ConfigError
from pdserve.gguf_metadata import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4
"""Token types of the GGUF format: control tokens are special (not shown), user-defined ones are plain text."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level(use_regex: bool) -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _digits_first() -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(True)])


def _by_regex(pattern: str) -> PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _byte_level(False)])


_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": lambda: _byte_level(True),
    "smollm": _digits_first,
    "llama-bpe": lambda: _by_regex(_LLAMA3),
    "llama3": lambda: _by_regex(_LLAMA3),
    "qwen2": lambda: _by_regex(_QWEN2),
}


def tokenizer_from_gguf(gguf: GGUFFile) -> Tokenizer:
    """Build it. Raises `ConfigError` (key "model") for a tokenizer that isn't byte-level BPE or isn't known here."""
    kind, pre = gguf.text("tokenizer.ggml.model"), gguf.text("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"{gguf.path}: tokenizer {kind or 'none'}/{pre or 'none'} in a GGUF is not supported (known: gpt2 with "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}); use the model's folder with its tokenizer.json instead",
            key="model",
        )
    tokens = gguf.strings("tokenizer.ggml.tokens")
    tokenizer = Tokenizer(_bpe(gguf, tokens, ignore_merges=pre in ("llama-bpe", "llama3")))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, gguf, tokens)
    return tokenizer


def _bpe(gguf: GGUFFile, tokens: list[str], ignore_merges: bool) -> models.BPE:
    merges = []
    for merge in gguf.strings("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)


def _add_tokens(tokenizer: Tokenizer, gguf: GGUFFile, tokens: list[str]) -> None:
    types = gguf.integers("tokenizer.ggml.token_type")
    of_type = {kind: [t for t, found in zip(tokens, types, strict=False) if found == kind] for kind in (3, 4)}
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in of_type[_CONTROL]])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in of_type[_USER_DEFINED]])
    bos = gguf.integer("tokenizer.ggml.bos_token_id")
    if gguf.flag("tokenizer.ggml.add_bos_token") and bos is not None:
        template = f"{tokens[bos]} $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(tokens[bos], bos)])
