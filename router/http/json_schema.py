"""Whether a value can be a JSON schema: enough to refuse nonsense by name before a worker compiles it.

The full metaschema is not needed: whatever passes here and cannot be compiled is refused by the engine, by type as
well. What must be kept from workers is nesting: grammar compilers recurse.
"""

from __future__ import annotations

from typing import Any

from pdserve.errors import InvalidRequest

MAX_DEPTH = 64
"""Nested schemas. OpenAI allows 10 levels in strict mode."""
MAX_NODES = 20_000
"""Values in one schema; OpenAI allows 5,000 properties."""

TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))

_ONE = frozenset(
    (
        "items",
        "additionalProperties",
        "additionalItems",
        "unevaluatedProperties",
        "unevaluatedItems",
        "contains",
        "propertyNames",
        "not",
        "if",
        "then",
        "else",
    )
)
_LIST = frozenset(("allOf", "anyOf", "oneOf", "prefixItems"))
_MAP = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
_COUNT = frozenset(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"))
_NUMBER = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"))
_TEXT = frozenset(("$ref", "$id", "$schema", "$anchor", "pattern", "format", "title", "description"))


def check_schema(schema: Any, param: str) -> None:
    """Raises `InvalidRequest` (with this `param`) unless `schema` has the shape of a JSON schema."""
    _Checker(param).check(schema, "schema", 0)


class _Checker:
    def __init__(self, param: str) -> None:
        self.param = param
        self.num_nodes = 0

    def fault(self, where: str, rule: str) -> InvalidRequest:
        return InvalidRequest(f"Invalid JSON schema for {self.param}: {where[:200]} {rule}", param=self.param)

    def check(self, schema: Any, where: str, depth: int) -> None:
        self.num_nodes += 1
        if depth > MAX_DEPTH:
            raise self.fault("schema", f"is nested deeper than {MAX_DEPTH} levels")
        if self.num_nodes > MAX_NODES:
            raise self.fault("schema", f"has more than {MAX_NODES} parts")
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise self.fault(where, "must be an object or a boolean")
        for keyword, value in schema.items():
            self.check_keyword(keyword, value, f"{where}.{keyword}", depth)

    def check_keyword(self, keyword: str, value: Any, where: str, depth: int) -> None:
        if keyword in _ONE:
            self.check_one(keyword, value, where, depth)
        elif keyword in _LIST:
            self.check_list(value, where, depth)
        elif keyword in _MAP:
            self.check_map(value, where, depth)
        else:
            self.check_plain(keyword, value, where)

    def check_one(self, keyword: str, value: Any, where: str, depth: int) -> None:
        if keyword == "items" and isinstance(value, list):
            self.check_list(value, where, depth)
        else:
            self.check(value, where, depth + 1)

    def check_list(self, value: Any, where: str, depth: int) -> None:
        if not isinstance(value, list) or not value:
            raise self.fault(where, "must be a list of schemas that is not empty")
        for i, schema in enumerate(value):
            self.check(schema, f"{where}[{i}]", depth + 1)

    def check_map(self, value: Any, where: str, depth: int) -> None:
        if not isinstance(value, dict):
            raise self.fault(where, "must be an object of schemas")
        for name, schema in value.items():
            self.check(schema, f"{where}.{name}", depth + 1)

    def check_plain(self, keyword: str, value: Any, where: str) -> None:
        if keyword == "type":
            self.check_type(value, where)
        elif keyword in _TEXT and not isinstance(value, str):
            raise self.fault(where, "must be a string")
        elif keyword in _COUNT and not (type(value) is int and value >= 0):
            raise self.fault(where, "must be an integer of 0 or more")
        elif keyword in _NUMBER and type(value) not in (int, float):
            raise self.fault(where, "must be a number")
        elif keyword == "required" and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise self.fault(where, "must be a list of strings")
        elif keyword == "enum" and not (isinstance(value, list) and value):
            raise self.fault(where, "must be a list that is not empty")

    def check_type(self, value: Any, where: str) -> None:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) and name in TYPES for name in names):
            raise self.fault(where, f"must be of {', '.join(sorted(TYPES))}")
