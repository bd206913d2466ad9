"""What a request to the admin listener asks for in its query, checked."""

from __future__ import annotations

from collections.abc import Collection

from starlette.requests import Request

from gateway.errors import InvalidRequest

MAX_NAME_CHARACTERS = 256


def whole(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number. Raises `InvalidRequest`."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 9 and least <= int(text) <= most):
        raise InvalidRequest(f"{name} must be a whole number from {least} to {most}.", param=name)
    return int(text)


def one_of(request: Request, name: str, choices: Collection[str], default: str) -> str:
    """One of a few words. Raises `InvalidRequest`."""
    text = request.query_params.get(name, default)
    if text not in choices:
        raise InvalidRequest(f"{name} must be one of {', '.join(choices)}.", param=name)
    return text


def name_of(request: Request, name: str) -> str | None:
    """A name to look for; None: whatever it is. Raises `InvalidRequest`."""
    text = request.query_params.get(name)
    if text is None or text == "":
        return None
    if len(text) > MAX_NAME_CHARACTERS or not text.isprintable():
        raise InvalidRequest(f"{name} must have at most {MAX_NAME_CHARACTERS} printable characters.", param=name)
    return text
