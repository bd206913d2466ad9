"""How many tokens a request will use, before anybody knows: what its limits reserve.

Soft mode reserves what is likely. The prompt's characters are divided by the model's characters per token, which its
own counts teach (a ratio of sums with exponentially fading weights: long prompts count for more than short ones). The
output is the 90th percentile of what this key's answers from this model had, capped by `max_tokens` and the key's cap.
The percentile follows by stochastic approximation (Robbins and Monro, 1951, in the multiplicative form of "frugal
streaming": Ma, Muthukrishnan, Sandler, 2013): up by a step when an answer was longer, down by a ninth of it when not,
so that it rests where one answer in ten is longer; and it follows when habits change.

Hard mode reserves the most that is possible: a byte-level BPE cannot make more tokens than there are bytes, the chat
template adds some of its own (`TEMPLATE_TOKENS`, `TOOL_TEMPLATE_TOKENS`), and the output is `max_tokens` for every
choice.

Pictures, sound and documents count a flat number each (`MEDIA_TOKENS`), never the length of their base64 text; that is
an estimate in hard mode too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import orjson

from backends.usage import Usage

FIRST_CHARS_PER_TOKEN = 4.0
"""English text in the usual vocabularies, before a model has shown its own."""
MIN_CHARS_PER_TOKEN, MAX_CHARS_PER_TOKEN = 1.0, 12.0
FIRST_OUTPUT = 512
"""Output tokens of a model that nothing is known of."""
FRAME_CHARS = 16
"""What a chat template puts around a message, in characters: about four tokens in ChatML."""
MEDIA_TOKENS = {
    "image_url": 1024,
    "image": 1024,
    "input_audio": 1024,
    "audio_url": 1024,
    "file": 4096,
    "video_url": 8192,
}
"""Flat counts by type of content part. GPT-4o takes 765 tokens for a 1024 * 1024 picture in detail, Qwen2.5-VL 1,369;
sound is some 10 to 25 tokens a second, so that this is a minute of it; a document is some pages."""
TEMPLATE_TOKENS = 64
"""What chat templates add at most to what is around the messages, default system prompts included; hard mode."""
TOOL_TEMPLATE_TOKENS = 512
"""The same for templates that explain how to call tools."""
HARD_FIRST_OUTPUT = 4096
"""What hard mode reserves, and has the body ask for, where neither request nor key name a number."""
MAX_TOKENS = 100_000_000
"""The largest number that is ever returned: more than any model does, little enough for exact sums in a store."""
THREAD_CHARS = 8_192
"""Above this an exact count takes more than 2 ms (measured: 4 KB a millisecond), and belongs in a thread."""

_FADE = 0.98
"""Weight of what was, at each new count: the last fifty matter."""
_PRIOR_TOKENS = 250.0
_QUANTILE = 0.9
_SEED = 10
"""Answers that are kept before the percentile begins to move: the second largest of ten starts it."""
_MAX_STEP, _MIN_STEP = 0.5, 0.08
_LAST_UP, _LAST_DOWN = math.exp(_MIN_STEP * _QUANTILE), math.exp(_MIN_STEP * (_QUANTILE - 1))
"""What a percentile is multiplied by once its steps are the smallest."""
_MAX_MODELS, _MAX_PAIRS = 4096, 65_536

CountTokens = Callable[[str], int]


class Estimate(msgspec.Struct, frozen=True, gc=False):
    """What one request will use. Tokens are 1 to `MAX_TOKENS`; output may be 0 (embeddings)."""

    input: int
    output: int
    total: int
    chars: int
    """Characters that were counted, for `Estimator.learn`; 0 where they say nothing about the model's tokens."""
    max_tokens: int | None = None
    """What the body's `max_tokens` has to be made; None: as it is. Where nothing was asked for: the key's cap, or in
    hard mode what was reserved. (Where more than the cap was asked for, the cap.)"""


class Estimator:
    """What is learned of models and keys, and the estimates that follow. Tables are bounded. For one event loop;
    `estimate` changes nothing, so a thread may call it."""

    def __init__(self, tokenizers: Mapping[str, CountTokens] | None = None) -> None:
        self._count: Mapping[str, CountTokens] = tokenizers or {}
        self._ratios: dict[str, _Ratio] = {}
        self._bytes: dict[str, _Ratio] = {}
        """Bytes of text per token generated."""
        self._outputs: dict[tuple[str, str], _Percentile] = {}
        self._model_outputs: dict[str, _Percentile] = {}

    def use_tokenizers(self, tokenizers: Mapping[str, CountTokens]) -> None:
        """Count these models' prompts exactly from now on, and only these."""
        self._count = tokenizers

    def needs_thread(self, model: str, body_bytes: int) -> bool:
        """Whether `estimate` would hold the event loop for longer than it should: call it in a thread then."""
        return body_bytes > THREAD_CHARS and model in self._count

    def chars_per_token(self, model: str) -> float:
        ratio = self._ratios.get(model)
        return FIRST_CHARS_PER_TOKEN if ratio is None else ratio.value

    def estimate(
        self,
        fields: Mapping[str, Any],
        path: str,
        body_bytes: int,
        max_tokens: int | None,
        choices: int,
        model: str,
        key_id: str,
        hard: bool = False,
        cap: int | None = None,
    ) -> Estimate:
        """What the request may use. `fields` is the body as parsed, of any shape: what is odd counts nothing.

        `choices` are all answers that are asked for, `model` the model's own name, `key_id` empty without keys, `cap`
        the key's `max_output_tokens`.
        """
        text = _Text(self._count.get(model) if not hard and self._count else None)
        text.read(fields)
        asked = max_tokens if max_tokens is not None and max_tokens >= 0 else None
        to_set = cap if cap is not None and asked is not None and asked > cap else None
        if hard:
            prompt = _upper_bound(fields, body_bytes, text)
            if asked is None:
                asked = to_set = HARD_FIRST_OUTPUT if cap is None else cap
            output = asked if cap is None or asked < cap else cap
            choices = _with_best_of(fields, choices)
        else:
            ratio = self._ratios.get(model)
            per_token = FIRST_CHARS_PER_TOKEN if ratio is None else ratio.value
            prompt = text.tokens + math.ceil(text.chars / per_token)
            output = self._output(model, key_id)
            if asked is not None and asked < output:
                output = asked
            if cap is not None:
                if cap < output:
                    output = cap
                if asked is None:
                    to_set = cap
        if path.endswith("/embeddings"):
            output, to_set = 0, None
        if not 1 <= prompt <= MAX_TOKENS:
            prompt = min(max(prompt, 1), MAX_TOKENS)
        output *= choices
        if output > MAX_TOKENS:
            output = MAX_TOKENS
        total = prompt + output
        chars = 0 if text.tokens else text.chars
        return Estimate(prompt, output, total if total < MAX_TOKENS else MAX_TOKENS, chars, to_set)

    def learn(self, model: str, key_id: str, prompt_chars: int, usage: Usage, choices: int = 1) -> None:
        """Take in what an answer that came to its end has used. `prompt_chars` is `Estimate.chars`."""
        if prompt_chars > 0 and usage.prompt_tokens > 0:
            ratio = self._ratios.get(model)
            if ratio is None:
                ratio = self._ratios[model] = _Ratio()
                _trim(self._ratios, _MAX_MODELS)
            ratio.add(prompt_chars, usage.prompt_tokens)
        if usage.completion_tokens > 0:
            length = usage.completion_tokens / choices if choices > 1 else float(usage.completion_tokens)
            of_model = self._model_outputs.get(model)
            if of_model is None:
                of_model = self._model_outputs[model] = _Percentile()
                _trim(self._model_outputs, _MAX_MODELS)
            of_model.add(length)
            of_key = self._outputs.get((key_id, model))
            if of_key is None:
                of_key = self._outputs[key_id, model] = _Percentile()
                _trim(self._outputs, _MAX_PAIRS)
            of_key.add(length)

    def learn_stream(self, model: str, content_bytes: int, tokens: int) -> None:
        """Take in how much text a stream had that came to its end with a usage report."""
        if content_bytes > 0 and tokens > 0:
            ratio = self._bytes.get(model)
            if ratio is None:
                ratio = self._bytes[model] = _Ratio()
                _trim(self._bytes, _MAX_MODELS)
            ratio.add(content_bytes, tokens)

    def expected_output(self, model: str, key_id: str, max_tokens: int | None, choices: int) -> int:
        """Tokens that all the answers together are likely to have."""
        output = self._output(model, key_id)
        if max_tokens is not None and 0 <= max_tokens < output:
            output = max_tokens
        return min(output * choices, MAX_TOKENS)

    def relayed(self, model: str, events: int, content_bytes: int) -> int:
        """Tokens that were relayed when nobody has counted them: by the bytes of their text, one an event at least."""
        ratio = self._bytes.get(model)
        per_token = FIRST_CHARS_PER_TOKEN if ratio is None else ratio.value
        return max(events, math.ceil(content_bytes / per_token))

    def _output(self, model: str, key_id: str) -> int:
        """The learned percentile of one answer: this key's, else the model's, else `FIRST_OUTPUT`."""
        found = self._outputs.get((key_id, model))
        if found is None or not found.value:
            found = self._model_outputs.get(model)
        return math.ceil(found.value) if found is not None and found.value else FIRST_OUTPUT


class _Text:
    """What of a body becomes prompt: characters to be estimated, and tokens that are known."""

    __slots__ = ("_count", "chars", "media_chars", "media_tokens", "tokens")

    def __init__(self, count: CountTokens | None = None) -> None:
        self._count = count
        self.chars = 0
        self.tokens = 0
        """Known exactly, media included."""
        self.media_chars = 0
        """Characters of the body that are pictures and the like."""
        self.media_tokens = 0

    def read(self, fields: Mapping[str, Any]) -> None:
        messages = fields.get("messages")
        if type(messages) is list:
            self._messages(messages)
        else:
            prompt = fields.get("prompt")
            if prompt is None:
                prompt = fields.get("input")
            self._prompt(prompt)
        if value := fields.get("tools"):
            self._tree(value)
        if value := fields.get("functions"):
            self._tree(value)
        if self._count is not None:
            self.chars = 0

    def _messages(self, messages: list[Any]) -> None:
        chars = FRAME_CHARS * (len(messages) + 1)
        if self._count is not None:
            self.tokens += chars // 4
        for message in messages:
            if type(message) is not dict:
                continue
            content = message.get("content")
            if type(content) is str:
                chars += len(content)
                if self._count is not None:
                    self.tokens += self._count(content)
            elif type(content) is list:
                self._parts(content)
            if len(message) > 2:
                for name in ("name", "tool_calls", "function_call", "reasoning_content"):
                    if message.get(name):
                        self._tree(message[name])
        self.chars += chars

    def _parts(self, parts: list[Any]) -> None:
        for part in parts:
            if type(part) is str:
                self._string(part)
            elif type(part) is dict:
                text = part.get("text")
                if type(text) is str:
                    self._string(text)
                flat = MEDIA_TOKENS.get(kind) if type(kind := part.get("type")) is str else None
                if flat is not None:
                    self.media_tokens += flat
                    self.tokens += flat
                    self.media_chars += _data_chars(part.get(kind))

    def _prompt(self, prompt: Any) -> None:
        if type(prompt) is str:
            self._string(prompt)
        elif type(prompt) is list and prompt:
            first = prompt[0]
            if type(first) is int:
                self.tokens += len(prompt)
            else:
                for each in prompt:
                    if type(each) is str:
                        self._string(each)
                    elif type(each) is list:
                        self.tokens += len(each)

    def _string(self, text: str) -> None:
        self.chars += len(text)
        if self._count is not None:
            self.tokens += self._count(text)

    def _tree(self, value: Any) -> None:
        """Templates write such values as JSON, more or less."""
        text = value if type(value) is str else orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
        self.chars += len(text)
        if self._count is not None:
            self.tokens += self._count(text if isinstance(text, str) else text.decode())


def _data_chars(value: Any) -> int:
    """Characters of a content part that are its data: an address (often a `data:` URL) or base64 text."""
    if type(value) is str:
        return len(value)
    if type(value) is dict:
        return sum(len(item) for item in value.values() if type(item) is str)
    return 0


def _upper_bound(fields: Mapping[str, Any], body_bytes: int, text: _Text) -> int:
    """No byte-level BPE makes more of this prompt: JSON writes no text in fewer bytes than UTF-8 has for it."""
    prompt = body_bytes - text.media_chars + text.media_tokens + TEMPLATE_TOKENS
    return prompt + TOOL_TEMPLATE_TOKENS if fields.get("tools") or fields.get("functions") else prompt


def _with_best_of(fields: Mapping[str, Any], choices: int) -> int:
    """Answers that are made, where more are asked for than are given back (`best_of` of legacy completions)."""
    best_of, n = fields.get("best_of"), fields.get("n")
    given = n if type(n) is int and n > 0 else 1
    return choices // given * best_of if type(best_of) is int and given < best_of < 100_000 else choices


class _Ratio:
    """Characters per token of one model."""

    __slots__ = ("_chars", "_tokens", "value")

    def __init__(self) -> None:
        self._chars, self._tokens = FIRST_CHARS_PER_TOKEN * _PRIOR_TOKENS, _PRIOR_TOKENS
        self.value = FIRST_CHARS_PER_TOKEN

    def add(self, chars: int, tokens: int) -> None:
        self._chars = self._chars * _FADE + chars
        self._tokens = self._tokens * _FADE + tokens
        value = self._chars / self._tokens
        if value < MIN_CHARS_PER_TOKEN:
            value = MIN_CHARS_PER_TOKEN
        self.value = value if value < MAX_CHARS_PER_TOKEN else MAX_CHARS_PER_TOKEN


class _Percentile:
    """The length that nine answers in ten do not exceed; 0 until enough were seen."""

    __slots__ = ("_seen", "_step", "value")

    def __init__(self) -> None:
        self._seen: list[float] = []
        self._step = _MAX_STEP
        self.value = 0.0

    def add(self, length: float) -> None:
        if not self.value:
            self._seen.append(length)
            if len(self._seen) == _SEED:
                self.value = max(sorted(self._seen)[-2], 1.0)
                self._seen = []
            return
        if self._step > _MIN_STEP:
            self._step = max(self._step * _FADE, _MIN_STEP)
            value = self.value * math.exp(self._step * (_QUANTILE if length > self.value else _QUANTILE - 1))
        else:
            value = self.value * (_LAST_UP if length > self.value else _LAST_DOWN)
        if value < 1.0:
            value = 1.0
        self.value = value if value < MAX_TOKENS else float(MAX_TOKENS)


def _trim(table: dict[Any, Any], most: int) -> None:
    """What came first makes room."""
    if len(table) > most:
        del table[next(iter(table))]
