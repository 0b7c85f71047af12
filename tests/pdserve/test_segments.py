"""Encoding piece by piece gives the ids of encoding the whole, and remembers no more than it may."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from pdserve.models import resolve
from pdserve.segments import SegmentEncoder, segment_encoder
from pdserve.tokens import Tokenizer

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
