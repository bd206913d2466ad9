"""The conversations that `loadtests.real_chats` holds with real engines: made of nothing but a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

_WORDS = (
    "the and for are but not you all any can had her was one our out day get has him his how man new now old see two "
    "way who boy did its let put say she too use air ask big box buy car cut eat end far few got hot job key law lay "
    "led lid lie lot low map may men met pay per run sat set sit six son sun ten top try war yes yet"
)
WORDS = tuple(_WORDS.split())
"""Of three letters; short and common, so that most tokenisers have a token for each."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked in one run."""

    sessions: int = 30
    systems: int = 8
    """Different system prompts; each session has one of them."""
    system_words: tuple[int, int] = (340, 860)
    """Shortest and longest; about 600 and 1,500 tokens of the tests' tiny model."""
    turns: tuple[int, int] = (4, 6)
    user_words: tuple[int, int] = (20, 80)
    answer_tokens: tuple[int, int] = (8, 16)
    per_s: float = 0.45
    """Sessions that begin in a second, on the average."""
    think_s: float = 2.0
    """Mean time from an answer to the next question."""


@dataclass(frozen=True, slots=True)
class Turn:
    think_s: float
    """Seconds after the last answer."""
    text: str
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Session:
    at_s: float
    """When its first question comes, in seconds from the start."""
    system: str
    turns: Sequence[Turn]


def text_of(words: int, rng: Random) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def sessions(plan: Plan, seed: int) -> list[Session]:
    """In order of time; the same for the same seed."""
    rng = Random(seed)
    shortest, longest = plan.system_words
    step = (longest - shortest) / max(1, plan.systems - 1)
    systems = [text_of(round(shortest + number * step), rng) for number in range(plan.systems)]
    found: list[Session] = []
    at_s = 0.0
    for _ in range(plan.sessions):
        turns = [
            Turn(
                rng.expovariate(1.0 / plan.think_s) if number else 0.0,
                text_of(rng.randint(*plan.user_words), rng),
                rng.randint(*plan.answer_tokens),
            )
            for number in range(rng.randint(*plan.turns))
        ]
        found.append(Session(at_s, rng.choice(systems), turns))
        at_s += rng.expovariate(plan.per_s)
    return found
