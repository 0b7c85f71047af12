"""Encoding piece by piece gives the ids of encoding the whole, and remembers no more than it may."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from pdserve.chat_skeleton import Place, Skeleton
from pdserve.models import resolve
from pdserve.segments import SegmentEncoder, segment_encoder
from pdserve.tokens import Tokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOKENIZER = Tokenizer.load(resolve("embedded").path)
_ENCODER = segment_encoder(_TOKENIZER.backend)
_SPECIAL = [token.content for token in _TOKENIZER.backend.get_added_tokens_decoder().values()]
_pieces = st.sampled_from([*_SPECIAL, " ", "\n", "  12", "user\nhello", "<|im_", "start|>", "é", "日本", "a"])
_texts = st.lists(_pieces | st.text(max_size=8), max_size=12).map("".join)


@given(_texts.filter(lambda text: text.encode("utf-8", "ignore").decode() == text))
def test_pieces_give_the_ids_of_the_whole(text: str) -> None:
    assert _ENCODER is not None
    whole = _TOKENIZER.backend.encode(text, add_special_tokens=False).ids
    assert _ENCODER.encode(text) == whole
    assert _ENCODER.encode(text) == whole, "and again, from memory"


def _normalizing() -> tokenizers.Tokenizer:
    """Byte-level, words cut as Qwen's are, NFC first."""
    backend = tokenizers.Tokenizer.from_str(_TOKENIZER.backend.to_str())
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.normalizer = normalizers.NFC()
    return backend


_NFC = _normalizing()
_NFC_ENCODER = segment_encoder(_NFC)
_MARKS = [
    "e\u0301",
    "\u0301",
    "\u0323",
    "e",
    "a\u030a\u0323",
    "Å",
    "\u212b",
    "\u1100\u1161",
    "가",
    "\u0958",
    "\U00016d67\U00016d67",
]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(_pieces | st.sampled_from(_MARKS) | st.text(max_size=4), max_size=12).map("".join))
def test_pieces_of_a_normalizing_tokenizer_give_the_ids_of_the_whole(text: str) -> None:
    """Composition across words, turns and special tokens included."""
    assume(text.encode("utf-8", "ignore").decode() == text)
    assert _NFC_ENCODER is not None
    whole = _NFC.encode(text, add_special_tokens=False).ids
    assert _NFC_ENCODER.encode(text) == whole
    assert _NFC_ENCODER.encode(text) == whole, "and again, from memory"


@pytest.mark.parametrize("first", ["user\ne", "e", "\u1100"])
def test_what_the_template_writes_may_compose_with_a_turn(first: str) -> None:
    assert _NFC_ENCODER is not None
    skeleton = Skeleton((f"<|im_start|>{first}", Place(0, False), "<|im_end|>"))
    for content in ("\u0301 a b", "\u1161", "plain text"):
        whole = _NFC.encode(f"<|im_start|>{first}{content}<|im_end|>", add_special_tokens=False).ids
        assert _NFC_ENCODER.encode_chat(skeleton, [content]).tolist() == whole


def test_a_known_turn_is_not_encoded_again() -> None:
    encoder = segment_encoder(_TOKENIZER.backend)
    assert encoder is not None
    turns = [f"<|im_start|>user\nturn {i}<|im_end|>\n" for i in range(3)]
    encoder.encode("".join(turns[:2]))
    known = encoder.num_chars
    encoder.encode("".join(turns))
    assert encoder.num_chars - known == len("user\nturn 2")


def test_what_is_remembered_is_bounded_and_the_oldest_goes_first() -> None:
    encoder = SegmentEncoder(_TOKENIZER.backend, {"<|im_end|>": 2}, max_chars=10)
    for text in ("aaaa", "bbbb", "cccc", "x" * 50):
        expected = _TOKENIZER.backend.encode(text, add_special_tokens=False).ids
        assert encoder.encode(text) == expected
        assert encoder.num_chars <= 10
    assert encoder.num_chars == 8


@pytest.mark.parametrize("change", ["lstrip", "rstrip", "single_word", "normalized", "prefix_space", "none"])
def test_a_tokenizer_whose_pieces_depend_on_their_place_is_left_alone(change: str) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=change == "prefix_space")
    backend.decoder = decoders.ByteLevel()
    flags = {name: name == change for name in ("lstrip", "rstrip", "single_word", "normalized")}
    backend.add_special_tokens([AddedToken("<s>", special=True, **flags)])
    assert (segment_encoder(backend) is None) == (change != "none")


def test_a_text_that_normalizing_changes_is_not_cut_into_words(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = segment_encoder(_NFC)
    assert encoder is not None
    by_words = []
    monkeypatch.setattr(encoder, "_by_words", lambda text: by_words.append(text) or [])
    decomposed = "cafe\u0301 au lait"
    assert encoder.encode(decomposed) == _NFC.encode(decomposed, add_special_tokens=False).ids
    encoder.encode("caf\u00e9 au lait")
    encoder.encode("tea")
    assert by_words == ["caf\u00e9 au lait", "tea"]
