"""What a chat template writes around the messages, learnt once for each order of roles.

Rendering Jinja takes longer than all else of a short prompt, and mostly gives the same text around other contents. So a
template is rendered once with *holes* for contents. A hole lets itself be joined to text, and trimmed; whatever else a
template might do with it (compare, measure, search, index) raises, and the template is then rendered in full each time
for these roles. If nothing raised, the contents had no part in what was decided, so other contents fall into the same
places: the skeleton is exact.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SKELETONS = 1024
"""Orders of roles that are remembered: one for each number of turns, mostly."""
_HOLE = re.compile("\0([0-9]+)(t?)\0")
_MARK = "\0"
_FILTERS = frozenset({"trim", "length", "count", "default", "d", "string"})
_TESTS = frozenset(
    {"defined", "undefined", "none", "string", "mapping", "boolean", "true", "false", "number"}
    | {"==", "eq", "equalto", "!=", "ne"}
)
_GLOBALS = frozenset({"range", "dict", "namespace", "raise_exception"})
_PLAIN_AGAIN = (
    nodes.Concat, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block, nodes.Extends,
    nodes.Include, nodes.Import, nodes.FromImport, nodes.ScopedEvalContextModifier,
)  # fmt: skip
"""Statements that turn text with holes into a plain string, on which anything might be done unseen."""


class NotPure(Exception):
    """The template looks at a content, so what it writes depends on more than the roles."""


def _refuse(*_: object, **__: object) -> Any:
    raise NotPure


class Guarded(str):
    """Text with holes: it can be joined and written, nothing else."""

    __slots__ = ()

    def __add__(self, other: str) -> Guarded:
        return Guarded(str.__add__(self, other))

    def __radd__(self, other: str) -> Guarded:
        return Guarded(str.__add__(other, self))

    def __str__(self) -> str:
        return str.__str__(self)


_ALLOWED = {
    "__add__", "__radd__", "__str__", "__class__", "__new__", "__init__", "__init_subclass__", "__subclasshook__",
    "__getattribute__", "__setattr__", "__delattr__", "__dir__", "__doc__", "__slots__", "__module__", "__sizeof__",
}  # fmt: skip
for _name in set(dir(str)) - _ALLOWED | {"__bool__", "__rmod__", "__rmul__"}:
    setattr(Guarded, _name, _refuse)


class Hole(Guarded):
    """Stands for the content of one message."""

    __slots__ = ("_index",)
    _index: int

    @classmethod
    def of(cls, index: int) -> Hole:
        hole = cls(f"{_MARK}{index}{_MARK}")
        hole._index = index
        return hole

    def strip(self, chars: str | None = None, /) -> Guarded:
        if chars is not None:
            raise NotPure
        return Guarded(f"{_MARK}{self._index}t{_MARK}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where the content of message `index` goes."""

    index: int
    trimmed: bool

    def text(self, contents: Sequence[str]) -> str:
        content = contents[self.index]
        return content.strip() if self.trimmed else content


@dataclass(frozen=True, slots=True, eq=False)
class Skeleton:
    """The prompt's text for one order of roles. Equal only to itself, so that whatever is derived can be kept by it."""

    parts: tuple[str | Place, ...]

    def text(self, contents: Sequence[str]) -> str:
        return "".join([part if isinstance(part, str) else part.text(contents) for part in self.parts])


class Skeletons:
    """One template's. `environment` makes the environment that it is rendered in, of a given class."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        environment: Callable[[type[ImmutableSandboxedEnvironment]], ImmutableSandboxedEnvironment],
    ) -> None:
        self._values = dict(special_tokens)
        self._template = _template(source, environment(_Careful))
        self._known: OrderedDict[tuple[object, ...], Skeleton | None] = OrderedDict()

    def of(self, roles: tuple[str, ...], add_generation_prompt: bool) -> Skeleton | None:
        """For messages of these roles that have nothing but role and content (a text), no tools and no variables.
        None: the template has to be rendered."""
        if self._template is None:
            return None
        key = (roles, add_generation_prompt)
        if key in self._known:
            return self._known[key]
        found = self._known[key] = self._learn(self._template, roles, add_generation_prompt)
        if len(self._known) > MAX_SKELETONS:
            self._known.popitem(last=False)
        return found

    def _learn(self, template: jinja2.Template, roles: Sequence[str], add_generation_prompt: bool) -> Skeleton | None:
        messages = [{"role": role, "content": Hole.of(index)} for index, role in enumerate(roles)]
        values = {**self._values, "messages": messages, "tools": None, "add_generation_prompt": add_generation_prompt}
        try:
            context = template.new_context({**template.globals, **values}, shared=True)
            text = "".join(template.root_render_func(context))
        except Exception:  # noqa: BLE001 - whatever it is, rendering the real messages tells it properly
            return None
        parts = _HOLE.split(text)
        if any(_MARK in literal for literal in parts[::3]):
            return None
        found: list[str | Place] = [parts[0]]
        for at in range(1, len(parts), 3):
            found += [Place(int(parts[at]), bool(parts[at + 1])), parts[at + 2]]
        return Skeleton(tuple([part for part in found if part]))


def _holds(value: object) -> bool:
    """Whether there is a hole in it."""
    if isinstance(value, dict):
        return any(map(_holds, value.values()))
    return any(map(_holds, value)) if isinstance(value, (list, tuple)) else isinstance(value, Guarded)


class _Careful(ImmutableSandboxedEnvironment):
    """Refuses what Python does with a string unseen: as an argument, or as an index."""

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if _holds(args) or _holds(kwargs):
            raise NotPure
        return super().call(context, function, *args, **kwargs)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, Guarded):
            raise NotPure
        return super().getitem(obj, argument)


def _template(source: str, environment: ImmutableSandboxedEnvironment) -> jinja2.Template | None:
    """The template with everything out of its reach that could look at a hole without being refused."""
    tree = environment.parse(source)
    if _MARK in source or any(tree.find_all(_PLAIN_AGAIN)) or any(map(_looks_unseen, tree.find_all(nodes.Expr))):
        return None
    environment.filters = {
        name: _first_only(each) if name in _FILTERS else _refuse for name, each in environment.filters.items()
    }
    environment.tests = {name: each if name in _TESTS else _refuse for name, each in environment.tests.items()}
    environment.globals = {name: each if name in _GLOBALS else _refuse for name, each in environment.globals.items()}
    return environment.from_string(source)


def _first_only(each: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that may be given a hole, but not hole as a parameter."""

    def guarded(value: Any, *args: Any, **kwargs: Any) -> Any:
        if _holds(args) or _holds(kwargs):
            raise NotPure
        return each(value, *args, **kwargs)

    return guarded


def _looks_unseen(node: nodes.Expr) -> bool:
    """Operators that read a string without asking it: `content in "a list of words"`, and formatting."""
    if isinstance(node, nodes.Mod):
        return not (isinstance(node.right, nodes.Const) and isinstance(node.right.value, int))
    if isinstance(node, nodes.Compare):
        asked = [operand.expr for operand in node.ops if operand.op in ("in", "notin")]
        if not asked or isinstance(node.expr, nodes.Const):
            return False
        return not all(isinstance(expr, (nodes.List, nodes.Tuple)) for expr in asked)
    return False
