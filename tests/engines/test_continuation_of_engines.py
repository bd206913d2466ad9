"""That real engines go on with a text where it stops: at any byte of a stream, and after any kind of character.

Whatever the first leg's words are, what the second one says must be what the engine says to a fresh request with that
beginning. Whether the whole is what an unbroken run says is reported and not asserted: a text has other tokens than it
was made of where a model does not write the way its tokenizer reads, as the tiny model of random weights.
"""

from __future__ import annotations

import pytest

from tests.engines.continuing import Asked, Said, places, report
from tests.engines.replica import NAME, Replica
from tests.llamacpp import LlamaCpp
from tests.support.effort import LONG

pytestmark = pytest.mark.engine

CUTS = 50
"""Of an answer's bytes, where nobody waits for it."""
FEW = 10
SYSTEM = {"role": "system", "content": "Be brief."}
CODE = "Write a Python function that adds two numbers, with a docstring."
OTHERS = ["Answer with many emoji: how was the sea? 🌊🏄‍♀️", "Tell me about tides.", "한국어로 인사해 줘."]
BEGINNINGS = [
    "Hello",
    "Hello ",
    "Hello\n",
    "Hello\n\n",
    "def f(x):\n    ",
    "a\t",
    "a  b   ",
    " lead",
    "né",
    "smile 👩",
    "smile 👩\u200d",
    "```python\nprint('x')\n```\n\n",
    "x\u00a0",
    "e\u0301",
    "H",
]
"""What a leg may end in: words, blanks of all kinds, code, parts of an emoji of several characters."""


def smollm2(replica: LlamaCpp, prompt: str, max_tokens: int) -> Asked:
    """Without its cache: what was computed in other batches is rounded otherwise, which can choose another token."""
    messages = [SYSTEM, {"role": "user", "content": prompt}]
    return Asked(replica.url, "llamacpp", "smollm2", messages, max_tokens, {"cache_prompt": False})


def tiny(replica: Replica, prompt: str, max_tokens: int) -> Asked:
    messages = [{"role": "user", "content": prompt}]
    more = {name: value for name, value in replica.kind.addressed(None).items() if name != "model"}
    return Asked(replica.url, replica.kind.engine, NAME, messages, max_tokens, more)


def check_cuts(asked: Asked, name: str, count: int) -> None:
    """Cut the answer at `count` places; every tail is right, and every client sees one stream."""
    stream = asked.unbroken()
    whole = Said.of(stream)
    cuts = [asked.cut(stream, place) for place in places(stream, count)]
    report(name, cuts, whole.text)
    assert [cut.after for cut in cuts] == [cut.fresh for cut in cuts]
    for cut in cuts:
        assert cut.said.text.startswith(cut.before)
        assert cut.said.heads <= whole.heads  # llama.cpp's chunks have dates of their own
        assert cut.said.roles == whole.roles <= 1  # llama.cpp sends none where the first token is half a character
        assert (len(cut.said.finish_reasons), len(cut.said.usage)) == (1, 1)
        assert cut.said.usage[0]["completion_tokens"] <= asked.max_tokens


def check_beginnings(asked: Asked) -> None:
    """Whatever the text ends in, the engine goes on right after it."""
    wrong = []
    for text in BEGINNINGS:
        said, fresh = asked.after(text), asked.completed(text, asked.max_tokens)
        if said != fresh:
            wrong.append((text, said, fresh))
    assert wrong == []


@pytest.mark.parametrize(
    ("prompt", "cuts"), [(CODE, CUTS), *((prompt, FEW) for prompt in OTHERS)] if LONG else [(CODE, FEW)]
)
def test_llamacpp_goes_on_where_a_stream_was_cut(llamacpp_replica: LlamaCpp, prompt: str, cuts: int) -> None:
    check_cuts(smollm2(llamacpp_replica, prompt, 24 if LONG else 16), "llama.cpp, SmolLM2", cuts)


def test_llamacpp_goes_on_after_any_kind_of_character(llamacpp_replica: LlamaCpp) -> None:
    check_beginnings(smollm2(llamacpp_replica, "Tell me something.", 3))


@pytest.mark.slow
def test_an_engine_goes_on_where_a_stream_was_cut(replica: Replica) -> None:
    check_cuts(tiny(replica, CODE, 120), f"{replica.kind.engine}, tiny model", CUTS)


@pytest.mark.slow
def test_an_engine_goes_on_after_any_kind_of_character(replica: Replica) -> None:
    check_beginnings(tiny(replica, "Tell me something.", 12))
