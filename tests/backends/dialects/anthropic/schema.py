"""The request types of the anthropic SDK, made strict: what they do not name is an error.

As they stand they cannot check anything: unknown members of a TypedDict are ignored, `Iterable` is validated only when
somebody iterates, and the models of answers, which allow any member, are accepted as content too.
"""

from __future__ import annotations

import collections.abc
import os
import types
from functools import cache
from typing import IO, Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints

from anthropic._types import SequenceNotStr
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from pydantic import BaseModel, ConfigDict, TypeAdapter
from typing_extensions import TypedDict, is_typeddict


class Whole(MessageCreateParamsNonStreaming, total=False):
    """The SDK 2.12.0 describes API version 2026-10-21, which has lost what 2023-06-01 still takes.

    The three members are in `types/message_create_params.py` of the SDK 0.121.0.
    """

    temperature: float
    top_p: float
    top_k: int


class Streamed(MessageCreateParamsStreaming, total=False):
    """The same, as a stream."""

    temperature: float
    top_p: float
    top_k: int


def strict(kind: Any) -> Any:
    """The same type, with unknown members forbidden, lists for iterables, and without what is no JSON."""
    if is_typeddict(kind):
        if getattr(kind, "__pydantic_config__", {}).get("extra") == "allow":
            return dict[str, object]  # a JSON schema
        members: dict[str, Any] = {}
        for name, hint in get_type_hints(kind, include_extras=True).items():
            # Not `__required_keys__`: it does not see a `Required` in an annotation that is still text.
            needed = get_origin(hint) is Required
            inner = get_args(hint)[0] if needed or get_origin(hint) is NotRequired else hint
            members[name] = Required[strict(inner)] if needed else NotRequired[strict(inner)]
        build: Any = TypedDict  # called with a name that is not known until now, which type checkers refuse
        made = build(kind.__name__, members)
        made.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
        return made
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return strict(args[0])
    if origin in (Union, types.UnionType):
        kept = [strict(each) for each in args if not _is_no_json(each)]
        return Union[tuple(kept)]  # noqa: UP007
    if origin in (collections.abc.Iterable, collections.abc.Sequence, list, SequenceNotStr):
        return list[strict(args[0])]  # type: ignore[misc]
    if origin is dict or origin is Literal or not args:
        return kind
    raise AssertionError(f"{kind} is of a form that this does not know")


def _is_no_json(kind: Any) -> bool:
    """Models of answers, and files that the SDK would read."""
    if (get_origin(kind) or kind) in (IO, os.PathLike, bytes):
        return True
    if get_origin(kind) is Annotated:
        return _is_no_json(get_args(kind)[0])
    if get_origin(kind) is Union:
        return all(_is_no_json(each) for each in get_args(kind))
    return isinstance(kind, type) and issubclass(kind, BaseModel)


@cache
def request_types() -> dict[bool, TypeAdapter[Any]]:
    """What checks a request, by whether it is one for a stream. Takes seconds to make."""
    return {False: TypeAdapter(strict(Whole)), True: TypeAdapter(strict(Streamed))}
