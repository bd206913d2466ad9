"""Exact prefix keys: a prompt as the engine will see it, by the model's own chat template and tokenizer.

Keys over text (`gateway.prompt`) say how long a common prefix is in bytes; keys over tokens say it in the engine's own
units, and see what a template leaves out. That costs a millisecond for 4 KB of text, so it is an option, for models
with `models.<name>.tokenizer`. The template is the operator's, from `models.<name>.chat_template` or from beside the
tokenizer; it runs in Jinja's sandbox with the names that Hugging Face's `transformers` gives it
(`utils/chat_template_utils.py`: `raise_exception`, `strftime_now`, `tojson`, loop controls). A template that a request
brings along is never run.

What cannot be rendered here, pictures above all, has keys over its text; that is said once for each model and reason.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from backends.dialects.protocol import CHAT, EMBEDDINGS
from gateway.config import Settings
from gateway.limits.estimate import THREAD_CHARS
from gateway.prompt import SALT_FIELDS
from routing.keys import TAILS, packed, token_prefix
from routing.prefix import Prefix

if TYPE_CHECKING:
    from jinja2 import Template

logger = logging.getLogger(__name__)

MAX_TEMPLATE_BYTES = 1_048_576
MAX_CONFIG_BYTES = 16_777_216
"""Of tokenizer_config.json; those of Llama 3 have 50 KB, the largest known some megabytes."""

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""`transformers` marks the model's own text with this tag, for training; here it means nothing."""
_PROBE = [{"role": "user", "content": "x"}]


class Unrenderable(Exception):
    """Why this prompt has no keys over tokens; a few fixed texts, so that each is said once."""


class ExactPrompts:
    """Makes prefixes over tokens for the models that have a tokenizer and a template. Threads may share one."""

    def __init__(self, models: Mapping[str, ExactPrompt] | None = None) -> None:
        self._models = models or {}
        self._said: set[tuple[str, str]] = set()

    def __contains__(self, model: object) -> bool:
        return model in self._models

    def needs_thread(self, model: str, body_bytes: int) -> bool:
        """Whether `prefix` would hold the event loop for longer than it should: call it in a thread then."""
        return body_bytes > THREAD_CHARS and model in self._models

    def prefix(self, model: str, path: str, fields: Mapping[str, Any], seed: int) -> Prefix | None:
        """The prompt's keys, its exact length in tokens in `total`; None where keys over text must do. Never raises.

        `model` is the model's own name, `path` the OpenAI path that was called, `fields` the body as parsed.
        """
        exact = self._models.get(model)
        if exact is None:
            return None
        try:
            return exact.prefix(path, fields, seed)
        except Unrenderable as error:
            reason = str(error)
        except Exception as error:  # templates raise what they like, the tokenizer's library bare Exceptions
            reason = f"the template or tokenizer failed ({type(error).__name__})"
        if (model, reason) not in self._said:
            self._said.add((model, reason))
            logger.warning("model %s: a prompt is recognised by its text, not by its tokens: %s", model, reason)
        return None


class ExactPrompt:
    """One model's template and tokenizer. `encode` gives a text's token ids, with the special tokens that the model
    puts around a bare prompt or without them; `render` gives a conversation's text, None where no template is known."""

    def __init__(
        self, encode: Callable[[str, bool], list[int]], render: Callable[[Mapping[str, Any]], str] | None
    ) -> None:
        self._encode = encode
        self._render = render
        self._answer = b"" if render is None else self._answer_begins(render)

    def prefix(self, path: str, fields: Mapping[str, Any], seed: int) -> Prefix:
        """Raises `Unrenderable`, and whatever a template raises."""
        if any(fields.get(name) for name in SALT_FIELDS):
            raise Unrenderable("the request asks for a cache of its own")
        if path == CHAT:
            if self._render is None:
                raise Unrenderable("no chat template is known")
            ids = packed(self._encode(self._render(_context(fields)), False))
            return token_prefix(ids, seed, self._turns(ids))
        prompt = fields.get("input" if path == EMBEDDINGS else "prompt")
        if type(prompt) is list and len(prompt) == 1:
            prompt = prompt[0] if type(prompt[0]) is not int else prompt
        if type(prompt) is str:
            return token_prefix(self._encode(prompt, True), seed)
        if type(prompt) is list and prompt and all(type(each) is int for each in prompt):
            return token_prefix(prompt, seed)
        raise Unrenderable("not one prompt of text or token ids")

    def _answer_begins(self, render: Callable[[Mapping[str, Any]], str]) -> bytes:
        """What the template puts where the model begins to write, as tokens; empty where that cannot be told."""
        try:
            without = render({"messages": _PROBE, "add_generation_prompt": False})
            text = render({"messages": _PROBE, "add_generation_prompt": True})
        except Exception:  # a template that wants more than one message; its conversations have checkpoints only
            return b""
        if not text.startswith(without):
            return b""
        return packed(self._encode(text[len(without) :], False))

    def _turns(self, ids: bytes) -> list[int]:
        """Where former prompts have ended: after the last places at which the model has begun to write."""
        answer = self._answer
        found: list[int] = []
        end = len(ids)
        while answer and len(found) < TAILS:
            begin = ids.rfind(answer, 0, end)
            if begin < 0:
                break
            if begin % 4 == 0:
                found.append((begin + len(answer)) // 4)
                end = begin
            else:
                end = begin + len(answer) - 1
        return found


def load_templates(settings: Settings, now: Callable[[], datetime] = datetime.now) -> ExactPrompts:
    """Templates and tokenizers of the models that have a tokenizer; takes up to a second each: use a thread.

    Raises nothing: where something cannot be used, the log says what, and the model's prompts have keys over text.
    """
    models: dict[str, ExactPrompt] = {}
    for name, model in settings.models.items():
        if model.tokenizer is None:
            if model.chat_template is not None:
                logger.warning("model %s: chat_template is not used, since there is no tokenizer", name)
            continue
        try:
            models[name] = load_exact(model.tokenizer, model.chat_template, now)
        except Exception as error:  # the libraries raise bare Exceptions
            logger.warning(
                "model %s: prompts are recognised by their text, not by their tokens: %s", name, str(error)[:500]
            )
    return ExactPrompts(models)


def load_exact(tokenizer: Path, template: Path | None, now: Callable[[], datetime] = datetime.now) -> ExactPrompt:
    """One model's; without a template there or beside the tokenizer, for bare prompts only.

    Raises what the libraries do, `OSError` and `ValueError`.
    """
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(tokenizer))
    loaded.no_truncation()
    loaded.no_padding()

    def encode(text: str, special: bool) -> list[int]:
        # Not `encode`: it holds the interpreter's lock to its end, 0.5 s for a megabyte, so that no thread would help
        # (tokenizers 0.23.3, measured); the batch lets it go, and "fast" leaves out the offsets that nobody reads.
        ids: list[int] = loaded.encode_batch_fast([text], add_special_tokens=special)[0].ids
        return ids

    source, names = _template_of(tokenizer.parent, template)
    return ExactPrompt(encode, None if source is None else _renderer(source, names, now))


def _template_of(folder: Path, template: Path | None) -> tuple[str | None, dict[str, str]]:
    """The template's text, None where there is none, and the special tokens that it may name."""
    beside = folder / "tokenizer_config.json"
    config: Any = None
    if beside.is_file():
        config = json.loads(_read(beside, MAX_CONFIG_BYTES))
    if not isinstance(config, dict):
        config = {}
    names: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            value = value.get("content")
        if name.endswith("_token") and isinstance(value, str):
            names[name] = value
    if template is None and (folder / "chat_template.jinja").is_file():
        template = folder / "chat_template.jinja"
    if template is not None:
        return _read(template, MAX_TEMPLATE_BYTES), names
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in source if isinstance(each, dict)}
        source = named.get("default")
    return (source if isinstance(source, str) else None), names


def _read(path: Path, most_bytes: int) -> str:
    if path.stat().st_size > most_bytes:
        raise ValueError(f"{path.name} is larger than {most_bytes} bytes")
    return path.read_text(encoding="utf-8")


def _renderer(source: str, names: Mapping[str, str], now: Callable[[], datetime]) -> Callable[[Mapping[str, Any]], str]:
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own escapes what HTML would read."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    source = _GENERATION.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", source)
    template: Template = environment.from_string(source)

    def render(context: Mapping[str, Any]) -> str:
        return template.render({**names, **context})

    return render


def _context(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a template is given for this request. Raises `Unrenderable`."""
    messages = fields.get("messages")
    if type(messages) is not list or not messages:
        raise Unrenderable("no messages")
    if fields.get("chat_template"):
        raise Unrenderable("the request brings its own chat template")
    context: dict[str, Any] = {"tools": None, "documents": fields.get("documents")}
    if type(effort := fields.get("reasoning_effort")) is str:
        context["reasoning_effort"] = effort
    options = fields.get("chat_template_kwargs")
    if type(options) is dict:
        context.update(options)
    if tools := fields.get("tools"):
        context["tools"] = tools
    context["messages"] = [_plain(message) for message in messages]
    context["add_generation_prompt"] = (
        fields.get("add_generation_prompt") is not False and fields.get("continue_final_message") is not True
    )
    return context


def _plain(message: Any) -> dict[str, Any]:
    """A message as engines hand it to templates: its text in one string, the arguments of its calls as an object."""
    if type(message) is not dict or type(message.get("role")) is not str:
        raise Unrenderable("a message without a role")
    plain = {name: value for name, value in message.items() if value is not None}
    content = plain.get("content", "")
    if type(content) is list:
        # vLLM joins them with a line break, SGLang with a space, templates that read lists with nothing: most have one.
        content = "\n".join(_text(part) for part in content)
    elif type(content) is not str:
        raise Unrenderable("content other than text")
    plain["content"] = content
    calls = plain.get("tool_calls")
    if type(calls) is list:
        plain["tool_calls"] = [_with_arguments(call) for call in calls]
    return plain


def _text(part: Any) -> str:
    text = part.get("text") if type(part) is dict else part
    if type(text) is not str:
        raise Unrenderable("content other than text")
    return text


def _with_arguments(call: Any) -> Any:
    function = call.get("function") if type(call) is dict else None
    if type(function) is not dict or type(arguments := function.get("arguments")) is not str:
        return call
    try:
        return {**call, "function": {**function, "arguments": json.loads(arguments)}}
    except ValueError:
        return call
