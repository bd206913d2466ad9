"""pydantic's errors in the operator's words: what is wrong with the value, and what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from gateway.config.problems import Finding, Path, did_you_mean, shown
from gateway.config.schema import Settings
from gateway.config.tree import field_at, fields_of, is_mapping, kind_at, model_of
from gateway.config.values import PATTERN_HINTS

_NOT_A = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "mapping_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}

_COMPARED = {
    "greater_than": ("gt", "is too small", "more than"),
    "greater_than_equal": ("ge", "is too small", "at least"),
    "less_than": ("lt", "is too large", "less than"),
    "less_than_equal": ("le", "is too large", "at most"),
}


def findings_of(error: ValidationError) -> Iterator[Finding]:
    """Each of pydantic's errors as a finding."""
    for detail in error.errors(include_url=False):
        # pydantic counts the items that were valid; a list whose items are all wrong is not empty.
        emptied = detail["type"] == "too_short" and detail["input"]
        # A default made from another field could not be, because that one was wrong.
        if not emptied and detail["type"] != "default_factory_not_called":
            yield _finding(detail)


def _finding(detail: ErrorDetails) -> Finding:
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    path: Path = tuple(detail["loc"])
    if path and path[-1] == "[key]":
        path = path[:-1]
    if kind == "tidegate":
        return Finding(path, context["message"], context["hint"])
    if kind == "missing":
        return Finding(path, "is missing", _example(path))
    if kind == "extra_forbidden":
        return _unknown(path)
    if kind in _NOT_A:
        return Finding(path, f"{shown(given)} is not {_NOT_A[kind]}", _type_hint(kind, path, given))
    if kind in _COMPARED:
        word, verdict, relation = _COMPARED[kind]
        return Finding(path, f"{shown(given)} {verdict}", f"write {_unit(path)}{relation} {_plain(context[word])}")
    if kind == "literal_error":
        return Finding(path, f"{shown(given)} is not one of {context['expected']}", _closest(path, given))
    if kind == "string_pattern_mismatch":
        return Finding(path, f"{shown(given)} is not a valid name", PATTERN_HINTS.get(context["pattern"], ""))
    if kind == "too_short":
        return Finding(path, "is empty: at least one entry is needed", _example(path))
    return Finding(path, detail["msg"][:1].lower() + detail["msg"][1:], _example(path))


def _unknown(path: Path) -> Finding:
    model = model_of(kind_at(Settings, path[:-1]))
    known = fields_of(model) if model is not None else ()
    return Finding(path, "is not a known setting", did_you_mean(str(path[-1]), known))


def _closest(path: Path, given: Any) -> str:
    from_field = field_at(Settings, path)
    values = getattr(from_field.annotation, "__args__", ()) if from_field else ()
    hint = did_you_mean(str(given), [str(value) for value in values])
    return hint if hint.startswith("did you mean") else _example(path)


def _type_hint(kind: str, path: Path, given: Any) -> str:
    if kind == "string_type" and not isinstance(given, (dict, list)) and given is not None:
        return "put quotes around it if it is meant as text"
    if kind == "mapping_type" or is_mapping(kind_at(Settings, path)):
        return "write names with their settings below them"
    if kind in {"model_type", "model_attributes_type"}:
        model = model_of(kind_at(Settings, path))
        return f"it can have: {', '.join(fields_of(model))}" if model else ""
    hint = _example(path)
    unit = _unit(path).rstrip(", ")
    return f"{hint} ({unit})" if hint and unit else hint


def _unit(path: Path) -> str:
    name = str(path[-1]) if path else ""
    if name.endswith("_s"):
        return "seconds, "
    if name.endswith("_bytes"):
        return "bytes, "
    return ""


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _example(path: Path) -> str:
    """`write e.g. url: http://127.0.0.1:30000`, from the field's example or else its default."""
    field = field_at(Settings, path)
    if field is None:
        return ""
    example = field.examples[0] if field.examples else field.default
    if example in (None, "", ()) or example is PydanticUndefined or model_of(field.annotation) is not None:
        return ""
    return f"write e.g. {path[-1]}: {_yaml(example)}"


def _yaml(value: Any) -> str:
    """A short value in YAML's one-line form."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and "://" in value:
        return f'"{value}"'
    return _plain(value)
