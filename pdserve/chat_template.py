"""Chat messages to prompt text, by the template that the model carries.

The environment is the one `transformers` documents for chat templates (sandboxed, blocks trimmed, `raise_exception`,
`strftime_now`, `tojson`), so that any model's template renders here as it does there. Templates come with the model,
messages from anyone: whatever goes wrong while rendering is the messages' fault and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.chat_skeleton import Skeleton, Skeletons
from pdserve.errors import ConfigError, InvalidRequest, NotSupported

Message = Mapping[str, Any]
"""As in OpenAI's API: `role`, `content` (text, or a list of text parts), and whatever else the template reads."""

_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template may raise on odd messages; a missing field is mostly a TypeError or an UndefinedError."""


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _environment(
    kind: type[ImmutableSandboxedEnvironment] = ImmutableSandboxedEnvironment,
) -> ImmutableSandboxedEnvironment:
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


class ChatTemplate:
    """A compiled template. `special_tokens` are its `bos_token`, `eos_token` and so on."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
            self._skeletons = Skeletons(source, special_tokens, _environment)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the model's chat template is not valid Jinja: {error}", key="model") from error
        self._always = {**self._template.globals, **special_tokens}

    def twin(self) -> ChatTemplate:
        """The same one, for another thread."""
        return ChatTemplate(self.source, self._special_tokens)

    def skeleton(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> Skeleton | None:
        """What `render` would write, with places for the contents; None where only rendering can tell."""
        for message in messages:
            if len(message) != 2 or not isinstance(message.get("content"), str):
                return None
        roles = tuple([message.get("role") for message in messages])
        if not roles or not all(isinstance(role, str) for role in roles):
            return None
        return self._skeletons.of(roles, add_generation_prompt)  # type: ignore[arg-type]

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text. Raises `InvalidRequest` (param "messages") when there are none or the template refuses
        them, `NotSupported` for content that isn't text."""
        if not messages:
            raise InvalidRequest("messages must not be empty", param="messages")
        plain = [_with_plain_content(message, index) for index, message in enumerate(messages)]
        values = {**self._always, **variables, "messages": plain, "tools": tools}
        values["add_generation_prompt"] = add_generation_prompt
        try:
            # What `Template.render` does, less the copies it makes of the globals: half of a short prompt's cost.
            context = self._template.new_context(values, shared=True)
            return "".join(self._template.root_render_func(context))
        except _RENDER_ERRORS as error:
            raise InvalidRequest(
                f"the model's chat template does not accept these messages: {error}", param="messages"
            ) from error


def _with_plain_content(message: Message, index: int) -> dict[str, Any]:
    """Text parts joined by newlines, as vLLM does for templates that take text."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        return dict(message)
    return {**message, "content": "\n".join(_part_text(part, index) for part in content)}


def _part_text(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in ("text", "refusal"):
        text = part.get(part["type"])
        if isinstance(text, str):
            return text
        raise InvalidRequest("a text part must have its text as a string", param=f"messages[{index}].content")
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise NotSupported(f"content parts of type {kind!r} are not supported", param=f"messages[{index}].content")
