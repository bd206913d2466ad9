"""Exact counts of a prompt's text, where a model's `tokenizer.json` is configured.

The library is imported here and nowhere else, and only when a model has one: it takes tens of megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from gateway.config import ConfigError, Problem, Settings
from gateway.limits.estimate import CountTokens


def load_tokenizers(settings: Settings, file: str = "configuration") -> Mapping[str, CountTokens]:
    """A counter for each model that has a tokenizer, by the model's name. Takes up to a second each: use a thread.

    Raises `ConfigError` with every one that cannot be used.
    """
    counters: dict[str, CountTokens] = {}
    problems: list[Problem] = []
    for name, model in settings.models.items():
        if model.tokenizer is None:
            continue
        try:
            counters[name] = _load(str(model.tokenizer))
        except Exception as error:  # the library raises bare Exceptions
            place = f"models.{name}.tokenizer"
            problems.append(Problem(file, None, place, f"cannot be used: {error}"[:500], "name its tokenizer.json"))
    if problems:
        raise ConfigError(problems)
    return counters


def _load(path: str) -> CountTokens:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()  # as many files as come from training ask for
    tokenizer.no_padding()

    def count(text: str) -> int:
        # Not `encode`: it holds the interpreter's lock to its end, so that no thread would help (`gateway.templates`).
        return len(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0])

    return count
