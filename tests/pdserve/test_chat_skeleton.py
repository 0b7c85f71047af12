"""A skeleton is what rendering gives, for any contents, or there is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.chat_template import ChatTemplate
from pdserve.errors import InvalidRequest
from pdserve.models import resolve
from pdserve.tokens import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% endif %}{% endfor %}"
)
QWEN = """{%- if tools %}{{- tools | tojson }}{%- else %}
{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}{%- endif %}
{%- for message in messages %}
{%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- elif message.role == "assistant" %}{%- if message.content %}{{- message.content }}{%- endif %}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
PURE = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "qwen": QWEN}
IMPURE = {
    "compares": "{% for m in messages %}{{ 'x' if m.content == 'hi' else m.content }}{% endfor %}",
    "compares from the right": "{% for m in messages %}{{ 'x' if 'hi' == m.content else m.content }}{% endfor %}",
    "asks whether empty": "{% for m in messages %}{% if m.content %}{{ m.content }}!{% endif %}{% endfor %}",
    "measures": "{% for m in messages %}{{ m.content|length }}{% endfor %}",
    "searches": "{% for m in messages %}{{ '<t>' in m.content }}{% endfor %}",
    "is searched for": "{% for m in messages %}{{ m.content in 'a list of words' }}{% endfor %}",
    "is searched for in a list": "{% for m in messages %}{{ m.content in ['hi', 'ho'] }}{% endfor %}",
    "starts with": "{% for m in messages %}{{ m.content.startswith('h') }}{% endfor %}",
    "begins another": "{% for m in messages %}{{ 'hi there'.startswith(m.content) }}{% endfor %}",
    "cuts": "{% for m in messages %}{{ m.content[:3] }}{% endfor %}",
    "splits": "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
    "strips of signs": "{% for m in messages %}{{ m.content.strip('h') }}{% endfor %}",
    "trims with more": "{% for m in messages %}{{ (m.content + ' ') | trim }}{% endfor %}",
    "changes case": "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "tests case": "{% for m in messages %}{{ m.content is lower }}{% endfor %}",
    "quotes": "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "counts": "{% for m in messages %}{{ m.content | int }}{% endfor %}",
    "formats": "{% for m in messages %}{{ '%5s' % m.content }}{% endfor %}",
    "formats in a tuple": "{% for m in messages %}{{ '%5s' % (m.content,) }}{% endfor %}",
    "formats by name": "{% for m in messages %}{{ '{:>5}'.format(m.content) }}{% endfor %}",
    "repeats": "{% for m in messages %}{{ m.content * 2 }}{% endfor %}",
    "joins and compares": "{% for m in messages %}{% set x = 'a' ~ m.content %}{{ x == 'ahi' }}{% endfor %}",
    "joins a list": "{% for m in messages %}{% set x = '-'.join([m.content, 'a']) %}{{ x == 'hi-a' }}{% endfor %}",
    "catches its output": "{% for m in messages %}{% set x %}{{ m.content }}{% endset %}{{ x == 'hi' }}{% endfor %}",
    "looks in a table": "{% for m in messages %}{{ {'hi': 1}[m.content] }}{% endfor %}",
    "indexes a list": "{% for m in messages %}{{ [1, 2][m.content] is defined }}{% endfor %}",
    "tells the date": "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "loops over it": "{% for m in messages %}{% for c in m.content %}{{ c }},{% endfor %}{% endfor %}",
    "orders": "{% for m in messages %}{{ m.content < 'hj' }}{% endfor %}",
    "remembers": "{% for m in messages %}{% if loop.changed(m.content) %}{{ m.content }}{% endif %}{% endfor %}",
    "selects": "{{ messages | selectattr('content', 'equalto', 'hi') | list | length }}",
    "prints the message": "{% for m in messages %}{{ m }}{% endfor %}",
    "replaces with it": "{% for m in messages %}{{ 'a b' | replace('a', m.content) }}{% endfor %}",
}
_contents = st.text(
    st.sampled_from(" \n\t<>|_abIM'é日0\0[]{}%s/") | st.characters(exclude_categories=["Cs"]), max_size=12
)
_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": _contents}),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("name", PURE)
@settings(max_examples=60, deadline=None)
@given(messages=_messages, prompt=st.booleans())
def test_a_skeleton_with_contents_is_what_rendering_gives(name: str, messages: list[dict], prompt: bool) -> None:
    template = ChatTemplate(PURE[name], TOKENS)
    skeleton = template.skeleton(messages, add_generation_prompt=prompt)
    try:
        rendered = template.render(messages, add_generation_prompt=prompt)
    except InvalidRequest:
        assert skeleton is None
        return
    assert skeleton is not None
    assert skeleton.text([message["content"] for message in messages]) == rendered


@pytest.mark.parametrize("name", IMPURE)
def test_a_template_that_looks_at_a_content_has_no_skeleton(name: str) -> None:
    template = ChatTemplate(IMPURE[name], TOKENS)
    assert template.skeleton([{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}]) is None


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "user", "content": None},
        {"role": "user"},
        {"content": "hi", "name": "Ann"},
    ],
)
def test_a_message_with_more_or_less_than_role_and_text_is_rendered(message: dict) -> None:
    assert ChatTemplate(CHATML, TOKENS).skeleton([message]) is None
    assert ChatTemplate(CHATML, TOKENS).skeleton([]) is None


def test_skeletons_are_learnt_once() -> None:
    template = ChatTemplate(CHATML, TOKENS)
    messages = [{"role": "user", "content": "hi"}]
    assert template.skeleton(messages) is template.skeleton([{"role": "user", "content": "ho"}])
    assert template.skeleton(messages) is not template.skeleton(messages, add_generation_prompt=False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve("embedded").path)


_turns = st.lists(
    st.tuples(
        st.sampled_from(["system", "user", "assistant"]),
        st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "\n", " ", "  3", "a", "tag <b>", "é"]), max_size=6),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(turns=_turns, prompt=st.booleans())
def test_tokens_of_a_chat_are_those_of_its_rendered_text(tokenizer: Tokenizer, turns: list, prompt: bool) -> None:
    messages = [{"role": role, "content": "".join(parts)} for role, parts in turns]
    assert tokenizer.chat_template is not None
    text = tokenizer.chat_template.render(messages, add_generation_prompt=prompt)
    whole = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode_chat(messages, add_generation_prompt=prompt) == whole
    assert tokenizer.encode_chat(messages, add_generation_prompt=prompt) == whole, "and again, from memory"
