"""The part of the schema about single requests: how much of an engine one of them may ask for."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from gateway.config.values import Section, Whole

_Count = Annotated[Whole, Field(ge=1, le=1_000_000)]


class Caps(Section):
    """Ceilings on the fields of a request that decide what it costs an engine, whoever sends it."""

    choices: _Count = Field(
        default=128,
        description="Answers in one request (`n`, `best_of`). 128 is OpenAI's own limit; engines have taken 16384.",
    )
    logprobs: Annotated[Whole, Field(ge=0, le=1000)] = Field(
        default=20,
        description="Log-probabilities for each token (`top_logprobs`, `logprobs`, `prompt_logprobs`, `n_probs`). "
        "Twenty as at OpenAI: all of a vocabulary for each token of a long prompt are tens of gigabytes.",
    )
    output_tokens: Annotated[Whole, Field(ge=1, le=100_000_000)] | None = Field(
        default=None,
        description="Tokens of output that one answer may ask for. Null: keys' `max_output_tokens` and the engine's "
        "context bound it.",
    )
    grammar_bytes: Annotated[Whole, Field(ge=1, le=16_777_216)] = Field(
        default=131_072,
        description="JSON schemas and grammars for the output, in bytes. 128 KiB hold the largest schemas of tools; "
        "the engine compiles each one it has not seen.",
    )
    pattern_bytes: Annotated[Whole, Field(ge=1, le=1_048_576)] = Field(
        default=4096,
        description="A regular expression for the output, in schemas and tools too, in bytes. 4 KiB: longer ones can "
        "hold an engine for minutes.",
    )
    list_items: _Count = Field(
        default=1024,
        description="Entries in lists of tokens and texts (`stop`, `logit_bias`, `bad_words`, ...). OpenAI allows 300 "
        "biases and 4 stops.",
    )
