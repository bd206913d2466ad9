"""An answer that broke off, and what another replica needs to go on with it so that the client sees one stream.

When a replica dies in the middle of a stream, the text that the client has goes to another one as the beginning of the
assistant's answer, and the engine goes on from there: with the same sampling and seed, and with what is left of the
request's tokens. Its chunks take on the id, the date and the model of the first ones, the second role is left out, and
the usage is that of the whole answer. Nothing here sends anything; the exchange asks.

What the client then has is not always what it would have had: the engine reads as prompt what it had generated, so
penalties that look at the output alone begin anew, a seed does too, and other rounding may choose another token. What
is promised is that there is no gap and no repetition, and that the rest is what this replica says after this beginning.

With tools that the model may call (`tool_choice: auto`) an answer that is text so far is gone on with: engines look for
calls in what they generate, hold back what may become one, and read a call that begins after the text as always. A
call that has begun is not: its beginning has no place in a message's text.

Several answers, structured output, forced tool calls, echoed prompts and the like end honestly, see `_refusal`. The
idea is LiteLLM's (its pull request 41127), as far as it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from backends.dialects.protocol import CHAT, COMPLETIONS, Dialect, NotOffered
from backends.usage import known_tokens
from gateway.body import Body, parse
from gateway.errors import InvalidRequest

MAX_CONTINUATIONS = 3
"""Of one answer. Each must bring text, so that a request that kills what it is sent to ends after the second."""
MAX_TEXT_BYTES = 1 << 20
"""Of one answer: some 250,000 tokens, which are held in memory for as long as it takes."""

_OUTPUT = ("max_tokens", "max_completion_tokens", "n_predict")
_AT_LEAST = ("min_tokens", "min_new_tokens")
_HEAD = ("id", "created", "model", "system_fingerprint")
"""What is the same in all chunks of a stream."""

_STRUCTURED = frozenset({"structured_outputs", "structural_tag", "regex", "ebnf", "json_schema", "grammar"})
"""Of vLLM, SGLang and llama.cpp, beside `response_format` and vLLM's older `guided_*`: what constrains all of the text.
Engines would begin it anew in the middle."""
_PER_ANSWER = frozenset({"return_token_ids", "return_hidden_states", "return_routed_experts", "prompt_logprobs"})
"""What engines report of the prompt or the whole answer, of which the client would get two."""
_FREE = (None, "auto", "none")
"""Values of `tool_choice` that force no call."""
_NO_TEXT = {
    "tool_calls": "tool_call",
    "function_call": "tool_call",
    "reasoning_content": "reasoning",
    "reasoning": "reasoning",
    "reasoning_details": "reasoning",
    "refusal": "refusal",
    "audio": "audio",
}
"""Members of a delta that are no text, and why an answer that had one is not gone on with."""


class Continuation:
    """One answer as far as the client has it. Synchronous; one per request, for streams only.

    A leg is what one replica sent of the answer. `observe` is shown the chunks of one leg after the other; `cut` is
    asked when one has broken off, and `body` then for what to send.
    """

    __slots__ = (
        "_asked_to_count",
        "_fields",
        "_head",
        "_leg_tokens",
        "_path",
        "_pieces",
        "_prompt_tokens",
        "_spent",
        "_text_bytes",
        "_tokens_before",
        "continuations",
        "refusal",
        "uncounted",
    )

    def __init__(self, path: str, fields: Mapping[str, Any], refusal: str) -> None:
        self.refusal = refusal
        """Why the answer cannot be gone on with; "" as long as it can."""
        self.continuations = 0
        """How often it was gone on with."""
        self.uncounted = False
        """Some text came without the engine's own count, so that `sent_tokens` may be too few."""
        self._path = path
        self._fields = fields
        self._asked_to_count = False
        self._head: dict[str, Any] = {}
        self._pieces: list[str] = []
        self._text_bytes = 0
        self._prompt_tokens: int | None = None
        """Of the request as the client sent it, where an engine has told."""
        self._tokens_before = 0
        """Of the text of earlier legs."""
        self._leg_tokens = 0
        self._spent = False
        """The client has all tokens that it asked for, and only misses the end."""

    @classmethod
    def of(cls, path: str, fields: Mapping[str, Any], choices: int) -> Continuation:
        """For a request of `choices` answers; `refusal` says at once if it is one that can never be gone on with."""
        return cls(path, fields, _refusal(path, fields, choices))

    @property
    def text(self) -> str:
        """What the client has; empty once there is a refusal."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    @property
    def sent_tokens(self) -> int:
        """Tokens of that text: by the engine's own count where its chunks tell it, else one for each chunk."""
        return self._tokens_before + self._leg_tokens

    @property
    def ends_blank(self) -> bool:
        """Whether an engine that trims texts (`EngineInfo.trims_text`) would not go on where this one stops."""
        return self._path == CHAT and self.text[-1:].isspace()

    def counting(self, dialect: Dialect) -> dict[str, bytes]:
        """Top-level values to send with a leg, so that its chunks count their tokens. The client does not see them."""
        asked = dialect.counting(self._fields)
        self._asked_to_count |= bool(asked)
        return {name: orjson.dumps(value) for name, value in asked.items()}

    def observe(self, chunk: dict[str, Any]) -> bytes | None:
        """Take note of the next chunk; what the client gets in its place (`gateway.sse.Observe`)."""
        if not chunk:
            self._refuse("unreadable")  # the client has it, and nobody knows what it says
            return None
        if not self.continuations and not self._leg_tokens:
            self._head = {name: chunk[name] for name in _HEAD if name in chunk}
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            choices = []
        if self._spent and choices and not _only_ends(choices):
            return b""
        spoken = _spoken(choices)
        counted = self._count(chunk)
        if spoken:
            self.uncounted |= counted is None
            self._leg_tokens = self._leg_tokens + 1 if counted is None else max(1, counted)
        self._keep(spoken, choices)
        hidden = _counts(chunk) if self._asked_to_count and choices else None
        if not self.continuations and hidden is None:
            return None
        if self.continuations and _only_role(choices):
            return b""
        shown = {**chunk, **self._head}
        shown.pop(hidden or "", None)
        return _event(shown)

    def cut(self) -> str:
        """The leg has broken off, after the client had got some of the answer: "" when it may go on, else why not.

        An answer that only lacks its end, since it has all the tokens that were asked for, is ended by the next leg.
        `no_progress` when the last leg, too, was a continuation, and brought no text: the request may be what kills
        the replicas. Connections that were refused are no legs; they may be followed by others.
        """
        if self.refusal:
            return self.refusal
        if self.continuations and not self._leg_tokens:
            return "no_progress"
        if self.continuations >= MAX_CONTINUATIONS:
            return "too_often"
        self.continuations += 1
        self._tokens_before += self._leg_tokens
        self._leg_tokens = 0
        # Engines end with an event of its own. What is asked for then is one token, of which nothing is passed on.
        self._spent = any(limit <= self._tokens_before for limit in _limits(self._fields, _OUTPUT).values())
        return ""

    def body(self, dialect: Dialect) -> Body:
        """The body for the next leg. Raises `NotOffered` where this engine cannot go on with the text."""
        fields = dict(self._fields)
        text, done = self.text, self._tokens_before
        if text:
            fields.update(dialect.continuation(self._path, self._fields, text))
        fields.update((name, max(1, limit - done)) for name, limit in _limits(fields, _OUTPUT).items())
        fields.update((name, max(0, limit - done)) for name, limit in _limits(fields, _AT_LEAST).items())
        fields.update((name, orjson.Fragment(value)) for name, value in self.counting(dialect).items())
        try:
            return parse(orjson.dumps(fields))
        except InvalidRequest as error:  # what had just fitted does not any more
            raise NotOffered(f"with the text the request is too much: {error}") from error

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason
        self._pieces = []

    def _keep(self, spoken: str, choices: list[Any]) -> None:
        """Keep the text, or note why the answer cannot be gone on with."""
        if self.refusal:
            return
        why = _unable(choices)
        self._text_bytes += len(spoken.encode())
        if why or self._text_bytes > MAX_TEXT_BYTES:
            self._refuse(why or "too_long")
        elif spoken:
            self._pieces.append(spoken)

    def _count(self, chunk: dict[str, Any]) -> int | None:
        """The leg's own tokens as this chunk tells them, None where it does not. A usage is made the whole answer's."""
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            prompt, completion = known_tokens(usage.get("prompt_tokens")), known_tokens(usage.get("completion_tokens"))
        elif isinstance(timings := chunk.get("timings"), dict):
            usage, completion = {}, known_tokens(timings.get("predicted_n"))
            read, cached = known_tokens(timings.get("prompt_n")), known_tokens(timings.get("cache_n"))
            prompt = None if read is None else read + (cached or 0)
        else:
            return None
        if prompt is None or completion is None:
            return None
        if not self.continuations:
            self._prompt_tokens = prompt
            return completion
        if self._prompt_tokens is None:
            # The first leg died before it told. The text may have become other tokens than it was made of.
            self._prompt_tokens = max(0, prompt - self._tokens_before)
        whole = self._tokens_before + (0 if self._spent else completion)
        usage.update(
            prompt_tokens=self._prompt_tokens, completion_tokens=whole, total_tokens=self._prompt_tokens + whole
        )
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            cached = known_tokens(details.get("cached_tokens"))
            if cached is not None and cached > self._prompt_tokens:
                usage["prompt_tokens_details"] = {**details, "cached_tokens": self._prompt_tokens}
        return completion


def _counts(chunk: dict[str, Any]) -> str | None:
    """The member by which a chunk counts tokens because it was asked to. llama.cpp's last has both unasked."""
    found = [name for name in ("usage", "timings") if isinstance(chunk.get(name), dict)]
    return found[0] if len(found) == 1 else None


def _event(chunk: dict[str, Any]) -> bytes | None:
    """None for one nested more deeply than can be written."""
    try:
        return b"data: " + orjson.dumps(chunk) + b"\n\n"
    except orjson.JSONEncodeError:
        return None


def _deltas(choices: list[Any]) -> Iterator[dict[str, Any]]:
    for choice in choices:
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if isinstance(delta, dict):
            yield delta


def _spoken(choices: list[Any]) -> str:
    """The text of the first choice, which is the only one."""
    if not choices or not isinstance(choices[0], dict):
        return ""
    choice = choices[0]
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return text if isinstance(text, str) else ""


def _unable(choices: list[Any]) -> str:
    """Why an answer that had these choices cannot be gone on with."""
    for choice in choices:
        if not isinstance(choice, dict) or choice.get("index") not in (0, None):
            return "n"
    for delta in _deltas(choices):
        for name, value in delta.items():
            if not value or name == "role" or (name == "content" and isinstance(value, str)):
                continue
            return _NO_TEXT.get(name, "other_content")
    return ""


def _only_role(choices: list[Any]) -> bool:
    """Whether the chunk says no more than who speaks. Takes the role out of one that says more."""
    roles = False
    for delta in _deltas(choices):
        roles |= bool(delta.pop("role", None))
    if not roles:
        return False
    return all(
        not choice.get("finish_reason") and not any(choice["delta"].values())
        for choice in choices
        if isinstance(choice, dict) and isinstance(choice.get("delta"), dict)
    )


def _only_ends(choices: list[Any]) -> bool:
    """Whether the chunk ends the answer, for which the reason is made that of one with all its tokens. Takes the text
    out of it."""
    ends = False
    for choice in choices:
        if not isinstance(choice, dict):
            continue
        if "delta" in choice:
            choice["delta"] = {}
        else:
            choice["text"] = ""
        choice.pop("logprobs", None)
        if choice.get("finish_reason"):
            choice["finish_reason"] = "length"
            ends = True
    return ends


def _limits(fields: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, int]:
    """Those of the fields that are a count; a negative one stands for no limit."""
    return {name: value for name in names if type(value := fields.get(name)) is int and value >= 0}


def _refusal(path: str, fields: Mapping[str, Any], choices: int) -> str:
    """Why an answer to this request can never be gone on with; "" when it can."""
    if choices != 1 or any(fields.get(name) not in (None, 1) for name in ("n", "n_cmpl", "best_of")):
        return "n"
    if fields.get("use_beam_search"):
        return "n"
    wanted = fields.get("response_format")
    if wanted is not None and not (isinstance(wanted, dict) and wanted.get("type") == "text"):
        return "structured_output"
    if any(value and (name in _STRUCTURED or name.startswith("guided_")) for name, value in fields.items()):
        return "structured_output"
    if fields.get("echo"):
        return "echo"
    if any(value is not None and value is not False for value in map(fields.get, _PER_ANSWER)):
        return "engine_details"
    if path == CHAT:
        return _refusal_of_chat(fields)
    return _refusal_of_completion(fields) if path == COMPLETIONS else "path"


def _refusal_of_chat(fields: Mapping[str, Any]) -> str:
    if fields.get("audio") or fields.get("modalities") not in (None, ["text"]):
        return "audio"
    if fields.get("tool_choice") not in _FREE or fields.get("function_call") not in _FREE:
        return "tool_choice"
    messages = fields.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict):
        return "messages"
    # Its answer began in the request already, and engines differ in what they make of such a message.
    begun = last.get("role") == "assistant" or fields.get("continue_final_message")
    return "assistant_last" if begun or fields.get("add_generation_prompt") is False else ""


def _refusal_of_completion(fields: Mapping[str, Any]) -> str:
    if fields.get("logprobs") is not None and fields["logprobs"] is not False:
        return "logprobs_of_completions"  # they count characters from the beginning of the text
    if fields.get("suffix"):
        return "suffix"
    return "" if isinstance(fields.get("prompt"), str) else "prompt"
