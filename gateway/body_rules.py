"""What the body of a request may ask of an engine: fields that are not a client's to set, and how much of the others.

A model server trusts whoever reaches it. Fields that it offers for benchmarks, debugging or its own siblings have
stopped whole engines: an unbounded `prompt_logprobs` takes tens of gigabytes, a bad regular expression hangs the
scheduler, a chat template is code. Three kinds are told apart:

    reserved   steers the engine itself: refused, always (`Dialect.reserved`)
    risky      has stopped engines, or is code: refused, unless `backends.<b>.allow_fields` names it (`Dialect.risky`)
    capped     fine up to a size, the same for all engines (`caps`)

Everything else is passed on as it came. Sizes are those of the bytes that the client has sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from backends.dialects.protocol import EMBEDDINGS, Dialect
from gateway.body import Body, parse
from gateway.config import Backend, Caps
from gateway.errors import InvalidRequest
from gateway.media import ANY, check_inputs, check_media

CHOICES = frozenset({"n", "best_of", "n_cmpl", "beam_width"})
LOGPROBS = frozenset({"logprobs", "top_logprobs", "prompt_logprobs", "n_probs"})
OUTPUT = frozenset({"max_tokens", "max_completion_tokens", "n_predict", "min_tokens"})
GRAMMARS = frozenset(
    {
        *("response_format", "structured_outputs", "json_schema", "ebnf", "grammar", "structural_tag"),
        *("guided_json", "guided_grammar", "guided_choice"),
    }
)
PATTERNS = frozenset({"regex", "guided_regex", "guided_whitespace_pattern"})
LISTS = frozenset(
    {
        *("stop", "stop_token_ids", "bad_words", "bad", "logit_bias", "allowed_token_ids", "logprob_token_ids"),
        "dry_sequence_breakers",
    }
)
PENALTIES = {
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.0, 100.0),
    "repeat_penalty": (0.0, 100.0),
    "length_penalty": (-100.0, 100.0),
}
"""Engines have died of others (CVE-2026-44223). OpenAI's own bounds for the first two."""
TEMPLATE_ARGUMENTS = "chat_template_kwargs"
_REFUSED_ARGUMENTS = frozenset({"chat_template", "tokenize", "tokenizer", "messages", "conversation"})
"""With these the arguments of a template are another template, or what it is applied to."""
TOOLS = "tools"
"""Schemas too, which engines make grammars of: CVE-2025-48944 was a `pattern` in one."""
_CAPPED = frozenset({*CHOICES, *LOGPROBS, *GRAMMARS, *PATTERNS, *LISTS, *PENALTIES, TEMPLATE_ARGUMENTS, TOOLS})
_SCHEMAS = frozenset({"json", "json_schema", "guided_json", "structural_tag", "schema"})
"""Members that may be a text which is a schema."""
_INNER_PATTERNS = ("regex", "pattern", "whitespace_pattern")


@dataclass(frozen=True, slots=True)
class BodyRules:
    """One pool's."""

    refused: frozenset[str]
    """Fields that clients may not set."""
    watched: frozenset[str]
    """All fields that are looked at: one comparison of sets for a request that has none of them."""
    media_hosts: frozenset[str]
    caps: Caps

    def check(self, path: str, body: Body) -> None:
        """Raise `InvalidRequest` for what may not be asked of this pool; `param` names it."""
        fields = body.fields
        if not self.watched.isdisjoint(fields):
            for name, value in fields.items():
                if name in self.watched and value is not None:
                    self._check_field(name, value, body)
        if path == EMBEDDINGS:
            check_inputs(fields, self.media_hosts)
            return
        messages = fields.get("messages")
        if type(messages) is list:
            for message in messages:  # text alone, mostly
                if type(message) is not dict or type(message.get("content")) is not str:
                    check_media(fields, self.media_hosts)
                    return

    def allow(self, path: str, body: Body) -> bool:
        """The same as an answer, for a pool that a request may be moved to."""
        try:
            self.check(path, body)
        except InvalidRequest:
            return False
        return True

    def _check_field(self, name: str, value: Any, body: Body) -> None:
        caps = self.caps
        if name in self.refused:
            raise InvalidRequest(
                f"{name!r} steers the model server itself; the gateway sets it, and clients may not.",
                param=name,
                code="reserved_parameter",
            )
        if name in CHOICES:
            _at_most(name, value, caps.choices)
        elif name in LOGPROBS:
            _at_most(name, value, caps.logprobs)
            if type(value) is int and value < 0:
                raise _too_much(name, "must not be negative, which means all of the vocabulary")
        elif name in OUTPUT:
            if caps.output_tokens is not None:
                _at_most(name, value, caps.output_tokens)
                if value < 0:
                    raise _too_much(name, "must not be negative, which means as many as there is room for")
        elif name in GRAMMARS:
            _size(name, body, caps.grammar_bytes)
            if type(value) is not str or name in _SCHEMAS:
                _check_patterns(name, value, caps.pattern_bytes)
        elif name == TOOLS:
            begin, end = body.spans[name]
            said = body.raw[begin:end]
            # Seldom, where walking over fifty tools takes 0.5 ms. An escape may hide a key.
            if end - begin > caps.pattern_bytes and (b"pattern" in said or b'"regex' in said or b"\\u00" in said):
                _check_patterns(name, value, caps.pattern_bytes)
        elif name in PATTERNS:
            _size(name, body, caps.pattern_bytes)
        elif name in LISTS:
            if isinstance(value, list | dict) and len(value) > caps.list_items:
                raise _too_much(name, f"may have {caps.list_items} entries at most")
            _size(name, body, 64 * caps.list_items)
        elif name in PENALTIES:
            least, most = PENALTIES[name]
            if type(value) not in (int, float):
                raise InvalidRequest(f"{name!r} must be a number.", param=name, code="invalid_type")
            if not least <= value <= most:
                raise _too_much(name, f"must be from {least:g} to {most:g}")
        elif name == TEMPLATE_ARGUMENTS and isinstance(value, dict):
            for argument in _REFUSED_ARGUMENTS & value.keys():
                where = f"{name}.{argument}"
                raise InvalidRequest(
                    f"{where!r} replaces the chat template or its input, which clients may not.",
                    param=where,
                    code="reserved_parameter",
                )


def body_rules(backend: Backend, dialects: Iterable[Dialect], hosted: bool, caps: Caps) -> BodyRules:
    """The rules of a pool: those of all its engines together. `hosted`: all of its replicas are rented."""
    allowed = frozenset(backend.allow_fields)
    refused = frozenset[str]()
    for dialect in dialects:
        refused |= dialect.reserved | (dialect.risky - allowed)
    watched = refused | _CAPPED
    if caps.output_tokens is not None:
        watched |= OUTPUT
    hosts = backend.remote_media
    if hosts is None:
        # A rented API fetches from its own network. Ours stands in the operator's.
        hosts = (ANY,) if hosted else ()
    return BodyRules(refused, watched, frozenset(host.lower() for host in hosts), caps)


def _at_most(name: str, value: Any, most: int) -> None:
    """Only whole numbers: engines that read leniently would take `"9999"` or `9999.0` for one that was not compared."""
    if type(value) is not int and not (type(value) is bool and name == "logprobs"):
        raise InvalidRequest(f"{name!r} must be a whole number.", param=name, code="invalid_type")
    if value > most:
        raise _too_much(name, f"may be {most} at most")


def _size(name: str, body: Body, most_bytes: int) -> None:
    begin, end = body.spans[name]
    if end - begin > most_bytes:
        raise _too_much(name, f"may have {most_bytes} bytes at most")


def _check_patterns(name: str, value: Any, most: int) -> None:
    """Regular expressions inside of schemas and of the forms that engines read beside them: `structured_outputs.regex`,
    `pattern` at any depth. Bodies nest at most 64 deep; a schema that is a text is read as engines read it."""
    if type(value) is dict:
        for inner, each in value.items():
            if inner in _INNER_PATTERNS and type(each) is str and len(each) > most:
                raise _too_much(f"{name}.{inner}", f"may have {most} bytes at most")
            if inner == "patternProperties" and type(each) is dict and any(len(key) > most for key in each):
                raise _too_much(f"{name}.{inner}", f"may have patterns of {most} bytes at most")
            if type(each) is dict or type(each) is list or (type(each) is str and inner in _SCHEMAS):
                _check_patterns(name, each, most)
    elif type(value) is list:
        for each in value:
            if type(each) is dict or type(each) is list:
                _check_patterns(name, each, most)
    elif type(value) is str and len(value) > most and value.lstrip()[:1] == "{":
        try:
            read = parse(value.encode()).fields
        except InvalidRequest:
            raise _too_much(name, "is not valid JSON") from None
        _check_patterns(name, read, most)


def _too_much(name: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"{name!r} {why}.", param=name, code="value_out_of_range")
