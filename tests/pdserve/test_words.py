"""Encoding word by word gives the ids of encoding the whole, for every tokenizer that is taken on."""

from __future__ import annotations

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, processors, trainers

from pdserve.models import resolve
from pdserve.tokens import Tokenizer
from pdserve.words import MAX_CHUNK_CHARS, WordEncoder, word_encoder

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CORPUS = [
    "It's the 2nd day's end, they'll say; we've 1234 words  and   blanks.\n\n  Indented - text\t(with 3,000 signs)!",
    "don't DON'T the there then other word words wordy 12 123 1234 12345 é café naïve 日本語 -- == // <tag> a.b.c",
] * 20
LUMPS = [
    " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "a", "B", "the", " the", "words", "'s", "'S", "'re", "'", "1", "23",
    "4567", "é", "e\u0301", "日本", "٣", "½", "ſ", "!", "?!", "-", "<", "|", ".", "\u00a0", "\u3000", "\u200b", "\x1c",
    "\x85",
]  # fmt: skip


def _trained(pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return backend


def _split(pattern: str, **options: object) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", **options)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits(individual: bool, first: bool = True) -> pre_tokenizers.PreTokenizer:
    parts = [pre_tokenizers.Digits(individual_digits=individual), _byte_level()]
    return pre_tokenizers.Sequence(parts if first else parts[::-1])


BACKENDS = {
    "embedded": Tokenizer.load(resolve("embedded").path).backend,
    "gpt2": _trained(_byte_level()),
    "llama3": _trained(_split(LLAMA3)),
    "qwen2": _trained(_split(QWEN2)),
    "digits": _trained(_digits(individual=True)),
    "digit runs": _trained(_digits(individual=False)),
    "digits last": _trained(_digits(individual=True, first=False)),
}
ENCODERS = {name: word_encoder(backend) for name, backend in BACKENDS.items()}


def _check(name: str, text: str) -> None:
    encoder = ENCODERS[name]
    assert encoder is not None
    whole = BACKENDS[name].encode(text, add_special_tokens=False).ids
    assert encoder.encode(text) == whole
    assert encoder.encode(text) == whole, "and again, from memory"


@pytest.mark.parametrize("name", BACKENDS)
def test_words_give_the_ids_of_the_whole(name: str) -> None:
    rng = random.Random(7)
    for _ in range(500):
        _check(name, "".join(rng.choices(LUMPS, k=rng.randint(0, 12))))
    _check(name, " ".join(CORPUS[:2]))


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_gives_the_ids_of_the_whole(name: str, text: str) -> None:
    _check(name, text)


def test_long_texts_are_learnt_from_one_encoding_and_then_known() -> None:
    backend = BACKENDS["llama3"]
    encoder = word_encoder(backend)
    assert encoder is not None
    rng = random.Random(3)
    texts = [
        " ".join(rng.choices(["word", "the", "x1", "a\n", "  ", "day's", "日本", "12 345"], k=300)) for _ in range(3)
    ]
    for text in texts:
        assert encoder.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert encoder.num_words > 5


def test_what_is_remembered_is_bounded_in_number_and_length() -> None:
    backend = BACKENDS["embedded"]
    encoder = WordEncoder(backend, single_digits=True, max_words=20)
    for i in range(200):
        text = f"say word{i} and w{i}\n now " + "x" * (MAX_CHUNK_CHARS + 1)
        assert encoder.encode(text) == backend.encode(text, add_special_tokens=False).ids
        assert encoder.num_words <= 2 * 20 + 40
    before = encoder.num_words
    encoder.encode(" ".join(["y" * (MAX_CHUNK_CHARS + 1)] * 3))
    assert encoder.num_words == before


def test_a_text_without_utf8_form_raises_as_the_tokenizer_does() -> None:
    with pytest.raises((TypeError, UnicodeEncodeError)):
        ENCODERS["embedded"].encode("a \ud800 b")


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Whitespace(),
        _split(r"\w+ \w+|."),
        _split(LLAMA3, invert=True),
    ],
)
def test_a_tokenizer_that_may_join_words_is_left_alone(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    assert word_encoder(backend) is None


def test_a_random_or_normalizing_tokenizer_is_left_alone() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[], dropout=0.1))
    backend.pre_tokenizer = _byte_level()
    assert word_encoder(backend) is None
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.pre_tokenizer = _byte_level()
    assert word_encoder(backend) is not None
    backend.normalizer = tokenizers.normalizers.NFC()
    assert word_encoder(backend) is not None, "for texts that are NFC already"
    for other in (tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase(), tokenizers.normalizers.NFD()):
        backend.normalizer = other
        assert word_encoder(backend) is None
