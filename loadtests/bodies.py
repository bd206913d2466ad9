"""Request bodies for load: conversations of a given size, several different ones, the same in every run."""

from __future__ import annotations

import json
import random

TEXT = """the gateway sends each prompt to the replica whose cache is warm and holds back what it cannot serve
now because a queue inside an engine is longer than it looks and nobody sees who waits in it"""
WORDS = TEXT.split()


def chat_bodies(size_bytes: int, *, model: str = "bench", count: int = 8, seed: int = 7) -> list[bytes]:
    """Chat requests of exactly so many bytes: a system prompt all share, then turns of some 400 bytes."""
    return [_chat_body(size_bytes, model, random.Random(seed * 1000 + number)) for number in range(count)]


def _chat_body(size_bytes: int, model: str, rng: random.Random) -> bytes:
    system = {"role": "system", "content": "You are a careful assistant. Answer in one sentence."}
    messages = [system, {"role": "user", "content": ""}]
    options = {"temperature": 0.7, "max_tokens": 128, "user": f"user-{rng.randrange(10**6):06}"}

    def encoded() -> bytes:
        return json.dumps({"model": model, "messages": messages, **options}, separators=(",", ":")).encode()

    missing = size_bytes - len(encoded())
    if missing < 0:
        raise ValueError(f"a chat request does not fit into {size_bytes} bytes")
    while missing > 900:
        role = "assistant" if len(messages) % 2 else "user"
        messages.insert(-1, {"role": role, "content": _text(400, rng)})
        missing = size_bytes - len(encoded())
    messages[-1]["content"] = _text(missing, rng)
    return encoded()


def _text(size: int, rng: random.Random) -> str:
    text = ""
    while len(text) < size:
        text += rng.choice(WORDS) + " "
    return text[:size]
