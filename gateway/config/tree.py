"""Walking the schema: what may stand below a setting. Shared by everything that reads raw configuration."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gateway.config.problems import Path

Kind = Any
"""A type annotation as pydantic keeps it: a model, a mapping, a tuple, or a plain value."""


def _origin(kind: Kind) -> Any:
    return get_origin(kind)


def kind_of(kind: Kind) -> Kind:
    """The annotation without `Annotated` and without `| None`."""
    while True:
        origin = _origin(kind)
        if origin is Annotated:
            kind = get_args(kind)[0]
        elif origin in (Union, types.UnionType):
            kind = next(arg for arg in get_args(kind) if arg is not types.NoneType)
        else:
            return kind


def may_be_none(kind: Kind) -> bool:
    """Whether null is a value of its own here."""
    if _origin(kind) is Annotated:
        return may_be_none(get_args(kind)[0])
    return types.NoneType in get_args(kind)


def model_of(kind: Kind) -> type[BaseModel] | None:
    """The model an annotation stands for, if it is one."""
    bare = kind_of(kind)
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def is_mapping(kind: Kind) -> bool:
    return _origin(kind_of(kind)) is Mapping


def is_list(kind: Kind) -> bool:
    return _origin(kind_of(kind)) is tuple


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """A model's settings by the name that the file has for them, which for a word of Python's is an alias."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def child(kind: Kind, key: str | int) -> Kind | None:
    """What stands below a key or a position, or None when nothing can."""
    model = model_of(kind)
    if model is not None:
        field = fields_of(model).get(str(key))
        return None if field is None else field.annotation
    if is_mapping(kind) and isinstance(key, str):
        return get_args(kind_of(kind))[1]
    if is_list(kind) and isinstance(key, int):
        return get_args(kind_of(kind))[0]
    return None


def kind_at(root: Kind, path: Path) -> Kind | None:
    """What stands at a path below `root`, or None when the path leads nowhere."""
    for part in path:
        if root is None:
            return None
        root = child(root, part)
    return root


def field_at(root: Kind, path: Path) -> FieldInfo | None:
    """The definition of the setting at a path, when it is a field of a model."""
    model = model_of(kind_at(root, path[:-1])) if path else None
    return fields_of(model).get(str(path[-1])) if model is not None else None


def setting_paths(kind: Kind, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting as documentation writes it, `backends.<name>.replicas[].url`, with its definition."""
    model = model_of(kind)
    if model is None:
        return
    for name, field in fields_of(model).items():
        path = f"{prefix}.{name}" if prefix else name
        below: Kind = field.annotation
        if is_mapping(below) and model_of(get_args(kind_of(below))[1]) is not None:
            yield from setting_paths(get_args(kind_of(below))[1], f"{path}.<name>")
        elif is_list(below) and model_of(get_args(kind_of(below))[0]) is not None:
            yield from setting_paths(get_args(kind_of(below))[0], f"{path}[]")
        elif model_of(below) is not None:
            yield from setting_paths(below, path)
        else:
            yield path, field
