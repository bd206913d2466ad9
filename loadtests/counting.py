"""A text that says where it is: each piece is its own number, so that a gap, a repetition or a wrong order shows.

The fake engine writes it with ``counting``. A request whose last message is the beginning of that text, from the
assistant, is answered from exactly there on, as engines do with `continue_final_message` or a prefilled answer.
"""

from __future__ import annotations

import msgspec

PIECE_BYTES = 7


class NotMyText(ValueError):
    """The beginning that came is no beginning of the text."""


class _Message(msgspec.Struct):
    role: str = ""
    content: object = None


class _Body(msgspec.Struct):
    messages: list[_Message] = []
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


_decode = msgspec.json.Decoder(_Body).decode


def piece(number: int) -> str:
    return f"{number:06d} "


def counted(pieces: int) -> str:
    """The first so many pieces of the text."""
    return "".join(map(piece, range(pieces)))


def piece_after(begun_bytes: int, number: int) -> str:
    """The number-th piece of an answer that goes on after so many bytes; the first may be the rest of one."""
    first, inside = divmod(begun_bytes, PIECE_BYTES)
    return piece(first + number)[inside if number == 0 else 0 :]


def asked(body: bytes, chunks: int) -> tuple[int, int, bool]:
    """Bytes of the text that the request begins with, pieces that are left to write, whether `max_tokens` ends it.

    `chunks` is how many the whole text has. Raises `NotMyText`, and `msgspec.ValidationError` for no JSON of a chat.
    """
    found = _decode(body)
    begun = ""
    if found.messages and found.messages[-1].role == "assistant":
        content = found.messages[-1].content
        if not isinstance(content, str) or not counted(len(content) // PIECE_BYTES + 1).startswith(content):
            raise NotMyText(f"this is not how the text begins: {content!r}")
        begun = content
    left = chunks - len(begun) // PIECE_BYTES
    limits = [limit for limit in (found.max_tokens, found.max_completion_tokens) if limit is not None]
    limit = min(limits, default=left)
    return len(begun), max(0, min(left, limit)), limit < left
