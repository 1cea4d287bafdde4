"""As much of JSON Schema (draft 2020-12) as the event log's schema uses; another keyword is an error of the test."""

from __future__ import annotations

from typing import Any

_ANNOTATIONS = {"$defs", "$schema", "title", "description", "default", "discriminator"}
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def is_valid(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None) -> bool:
    """Whether `value` is an instance of `schema`."""
    root = root or schema
    # The type first: the other keywords only speak of values of theirs.
    keywords = sorted(schema.keys() - _ANNOTATIONS, key=lambda keyword: keyword != "type")
    return all(_holds(keyword, value, schema, root) for keyword in keywords)


def _holds(keyword: str, value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    rule = schema[keyword]
    match keyword:
        case "$ref":
            return is_valid(value, root["$defs"][rule.removeprefix("#/$defs/")], root)
        case "type":
            return isinstance(value, _TYPES[rule]) and isinstance(value, bool) == (rule == "boolean")
        case "const":
            return bool(value == rule)
        case "enum":
            return value in rule
        case "minimum":
            return bool(value >= rule)
        case "maximum":
            return bool(value <= rule)
        case "anyOf":
            return any(is_valid(value, each, root) for each in rule)
        case "oneOf":
            return sum(is_valid(value, each, root) for each in rule) == 1
        case "required":
            return set(rule) <= set(value)
        case "properties":
            return all(is_valid(value[name], each, root) for name, each in rule.items() if name in value)
        case "propertyNames":
            return all(is_valid(name, rule, root) for name in value)
        case "additionalProperties":
            others = [each for name, each in value.items() if name not in schema.get("properties", {})]
            return all(is_valid(each, rule, root) for each in others)
        case "items":
            return all(is_valid(each, rule, root) for each in value)
    raise NotImplementedError(keyword)
