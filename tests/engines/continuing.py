"""Breaks a real engine's stream off at any byte, and has the engine go on, as the gateway would; without a gateway.

The other half of each comparison is not asked in the words under test: the prompt is written out here, text and all,
and completed by `/v1/completions`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from backends.dialects import DIALECTS
from backends.dialects.protocol import CHAT, COMPLETIONS
from gateway.continuation import Continuation
from gateway.sse import StreamReader

TIMEOUT_S = 120.0
RESULTS = "CONTINUATION_RESULTS"
"""Variable: the file that takes a line of JSON for each engine, for `continuation_report`."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a client has got from a stream."""

    text: str
    finish_reasons: list[str]
    roles: int
    heads: set[tuple[str, int, str]]
    usage: list[dict[str, Any]]

    @classmethod
    def of(cls, stream: bytes) -> Said:
        chunks = [json.loads(event[6:]) for event in stream.split(b"\n\n") if event.startswith(b"data: {")]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        pieces = [choice["delta"].get("content") if "delta" in choice else choice["text"] for choice in choices]
        return cls(
            "".join(piece or "" for piece in pieces),
            [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
            sum(bool(choice.get("delta", {}).get("role")) for choice in choices),
            {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks},
            [chunk["usage"] for chunk in chunks if chunk.get("usage")],
        )


@dataclass(frozen=True, slots=True)
class Cut:
    """A stream that was broken off at one place, and gone on with."""

    before: str
    said: Said
    fresh: str
    """What the engine says to prompt and text written out."""

    @property
    def after(self) -> str:
        return self.said.text.removeprefix(self.before)


@dataclass(frozen=True, slots=True)
class Asked:
    """An engine, and a chat that it is asked to answer. `more`: further fields of every request to it."""

    url: str
    engine: str
    model: str
    messages: list[dict[str, str]]
    max_tokens: int
    more: Mapping[str, Any]

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.more,
        }

    def written_out(self) -> str:
        """The prompt as ChatML, which the templates of SmolLM2 and of the tiny model write."""
        turns = (f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in self.messages)
        return "".join(turns) + "<|im_start|>assistant\n"

    def unbroken(self) -> bytes:
        """The raw stream of the first leg, asked for as the gateway asks."""
        counting = Continuation.of(CHAT, self.fields, 1).counting(DIALECTS[self.engine])
        asked = {name: json.loads(value) for name, value in counting.items()}
        return _post(self.url, CHAT, {**self.fields, **asked})

    def cut(self, stream: bytes, place: int) -> Cut:
        """Break the stream off after so many bytes, and have the engine go on."""
        dialect = DIALECTS[self.engine]
        continuation = Continuation.of(CHAT, self.fields, 1)
        continuation.counting(dialect)
        first = StreamReader(observe=continuation.observe).feed(stream[:place])
        assert continuation.cut() == ""
        body, before, left = continuation.body(dialect), continuation.text, self.max_tokens - continuation.sent_tokens
        second = StreamReader(observe=continuation.observe).feed(_post(self.url, CHAT, body.raw))
        return Cut(before, Said.of(first + second), self.completed(before, left))

    def after(self, before: str) -> str:
        """What the engine says after this beginning, asked as a continuation."""
        told = DIALECTS[self.engine].continuation(CHAT, self.fields, before)
        return Said.of(_post(self.url, CHAT, {**self.fields, **told})).text

    def completed(self, before: str, max_tokens: int) -> str:
        """What a fresh request with this beginning gives; with no tokens left, nothing."""
        if not max_tokens:
            return ""
        fields = {"model": self.model, "prompt": self.written_out() + before, "max_tokens": max_tokens}
        answer = _post(self.url, COMPLETIONS, {**fields, "temperature": 0, "stream": True, **self.more})
        return Said.of(answer).text


def places(stream: bytes, count: int) -> list[int]:
    """So many places to break a stream off at, after its first text and before its end, evenly over its bytes."""
    begin = next(end for end in _ends(stream) if Said.of(stream[:end]).text)
    end = next(end for end in _ends(stream) if Said.of(stream[:end]).finish_reasons)
    return [begin + (end - 1 - begin) * number // max(1, count - 1) for number in range(count)]


def report(engine: str, cuts: list[Cut], whole: str) -> None:
    """Print how often the answer was that of the unbroken run, and keep it where a report is being written."""
    right = sum(cut.after == cut.fresh for cut in cuts)
    same = sum(cut.said.text == whole for cut in cuts)
    print(f"{engine}: {len(cuts)} cuts, {right} tails as a fresh request gives, {same} answers as the unbroken one")
    if RESULTS in os.environ:
        with Path(os.environ[RESULTS]).open("a") as file:
            print(json.dumps({"engine": engine, "cuts": len(cuts), "right": right, "same": same}), file=file)


def _ends(stream: bytes) -> list[int]:
    """Where each event of the stream ends."""
    found, end = [], 0
    while (end := stream.find(b"\n\n", end) + 2) > 1:
        found.append(end)
    return found


def _post(url: str, path: str, body: bytes | dict[str, Any]) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{url}{path}", content=content, headers=headers, trust_env=False, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    return answer.content
