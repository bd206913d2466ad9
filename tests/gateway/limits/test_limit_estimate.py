"""Estimates: what a request is expected to use, what it can use at most, and how both are learned."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from backends.usage import Usage
from gateway.config import ConfigError, Settings
from gateway.limits.estimate import (
    FIRST_OUTPUT,
    FRAME_CHARS,
    HARD_FIRST_OUTPUT,
    MAX_CHARS_PER_TOKEN,
    MAX_TOKENS,
    MEDIA_TOKENS,
    TEMPLATE_TOKENS,
    TOOL_TEMPLATE_TOKENS,
    Estimate,
    Estimator,
)
from gateway.limits.tokenizers import load_tokenizers

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def estimate(estimator: Estimator, fields: dict[str, Any], path: str = CHAT, **changes: Any) -> Estimate:
    arguments = {"max_tokens": None, "choices": 1, "model": "chat", "key_id": "key_1", **changes}
    return estimator.estimate(fields, path, len(orjson.dumps(fields)), **arguments)


def chat(*contents: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": content} for content in contents]}


def test_a_prompt_is_its_characters_and_a_frame_for_each_message() -> None:
    found = estimate(Estimator(), chat("x" * 400, "y" * 401))
    assert found.chars == 801 + 3 * FRAME_CHARS
    assert (found.input, found.output) == (213, FIRST_OUTPUT)
    assert (found.total, found.max_tokens) == (213 + FIRST_OUTPUT, None)


@pytest.mark.parametrize(
    ("fields", "path", "tokens"),
    [
        ({"prompt": "x" * 400}, COMPLETIONS, 100),
        ({"prompt": ["x" * 400, "y" * 40]}, COMPLETIONS, 110),
        ({"prompt": [5, 6, 7]}, COMPLETIONS, 3),
        ({"prompt": [[5, 6], [7]]}, COMPLETIONS, 3),
        ({"input": "x" * 40}, EMBEDDINGS, 10),
        ({"input": ["x" * 40] * 3}, EMBEDDINGS, 30),
        ({"input": [1] * 2000}, EMBEDDINGS, 2000),
        ({"prompt": ""}, COMPLETIONS, 1),
        ({"messages": "x", "prompt": {}}, CHAT, 1),
        ({"messages": [7, None, {"content": 5}, {"content": [7, None]}]}, CHAT, 20),
    ],
)
def test_prompts_of_every_shape_are_counted(fields: dict[str, Any], path: str, tokens: int) -> None:
    assert estimate(Estimator(), fields, path).input == tokens


def test_tools_names_and_parts_count() -> None:
    plain = estimate(Estimator(), chat("x" * 40)).chars
    tool = {"type": "function", "function": {"name": "f", "description": "d" * 100, "parameters": {}}}
    assert estimate(Estimator(), {**chat("x" * 40), "tools": [tool]}).chars == plain + len(orjson.dumps([tool]))
    assert estimate(Estimator(), chat([{"type": "text", "text": "x" * 40}])).chars == plain
    named = {"messages": [{"role": "user", "content": "x" * 40, "name": "bob"}]}
    assert estimate(Estimator(), named).chars == plain + 3


@pytest.mark.parametrize("hard", [False, True])
def test_a_picture_counts_flat_and_not_by_its_base64_text(hard: bool) -> None:
    def with_data(size: int) -> Estimate:
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * size}}
        sound = {"type": "input_audio", "input_audio": {"data": "B" * size, "format": "wav"}}
        return estimate(Estimator(), chat([{"type": "text", "text": "what?"}, picture, sound]), hard=hard, cap=100)

    small, large = with_data(4), with_data(4_000_000)
    assert small.input == large.input
    assert 2 * MEDIA_TOKENS["image_url"] < large.input < 2 * MEDIA_TOKENS["image_url"] + 500
    assert large.chars == 0, "tokens of pictures say nothing about characters"


def test_output_is_capped_by_the_request_and_by_the_key() -> None:
    estimator, body = Estimator(), chat("x")
    found = [
        (each.output, each.max_tokens)
        for each in (
            estimate(estimator, body, max_tokens=100),
            estimate(estimator, body, max_tokens=100, choices=3),
            estimate(estimator, body, max_tokens=0),
            estimate(estimator, body, max_tokens=10**30),
            estimate(estimator, body, cap=50),
            estimate(estimator, body, max_tokens=100, cap=50),
            estimate(estimator, body, max_tokens=-1),
        )
    ]
    first = FIRST_OUTPUT
    assert found == [(100, None), (300, None), (0, None), (first, None), (50, 50), (50, 50), (first, None)]


def test_hard_mode_reserves_all_that_is_possible() -> None:
    estimator, body = Estimator(), {**chat("x" * 1000), "tools": [{}]}
    size = len(orjson.dumps(body))
    found = estimate(estimator, body, max_tokens=3000, choices=2, hard=True)
    assert (found.input, found.output) == (size + TEMPLATE_TOKENS + TOOL_TEMPLATE_TOKENS, 6000)
    found = estimate(estimator, body, hard=True, cap=700)
    assert (found.output, found.max_tokens) == (700, 700)
    found = estimate(estimator, body, hard=True)
    assert (found.output, found.max_tokens) == (HARD_FIRST_OUTPUT, HARD_FIRST_OUTPUT)
    found = estimate(estimator, {"prompt": "x", "n": 2, "best_of": 5}, COMPLETIONS, choices=2, max_tokens=10, hard=True)
    assert found.output == 50


def test_embeddings_have_no_output() -> None:
    for hard in (False, True):
        found = estimate(Estimator(), {"input": "x" * 40}, EMBEDDINGS, hard=hard)
        assert (found.output, found.max_tokens, found.total) == (0, None, found.input)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
bodies = st.dictionaries(
    st.sampled_from(["messages", "prompt", "input", "tools", "functions", "n", "best_of"]), anything
) | st.builds(lambda contents: chat(*contents), st.lists(anything, max_size=4))


@given(
    body=bodies,
    path=st.sampled_from([CHAT, COMPLETIONS, EMBEDDINGS]),
    max_tokens=st.none() | st.integers(-5, 10**30),
    cap=st.none() | st.integers(1, 10**6),
    choices=st.integers(1, 99_999),
    hard=st.booleans(),
)
def test_no_body_breaks_an_estimate_and_caps_hold(
    body: dict[str, Any], path: str, max_tokens: int | None, cap: int | None, choices: int, hard: bool
) -> None:
    found = estimate(Estimator(), body, path, max_tokens=max_tokens, cap=cap, choices=choices, hard=hard)
    assert 1 <= found.input <= MAX_TOKENS
    assert 0 <= found.output <= MAX_TOKENS
    assert max(found.input, found.output) <= found.total <= MAX_TOKENS
    if not hard:
        assert found.output <= choices * min(x for x in (cap, max_tokens, MAX_TOKENS) if x is not None and x >= 0)


def test_a_model_shows_its_characters_per_token() -> None:
    estimator = Estimator()
    for _ in range(200):
        estimator.learn("chat", "key_1", 3000, Usage(2000, 0))
    assert estimator.chars_per_token("chat") == pytest.approx(1.5, rel=0.01)
    assert estimator.chars_per_token("other") == 4.0
    assert estimate(estimator, {"prompt": "x" * 300}, COMPLETIONS).input == pytest.approx(200, abs=3)
    for _ in range(200):
        estimator.learn("chat", "key_1", 10**6, Usage(1, 0))
    assert estimator.chars_per_token("chat") == MAX_CHARS_PER_TOKEN


def test_counts_that_say_nothing_teach_nothing() -> None:
    estimator = Estimator()
    for _ in range(50):
        estimator.learn("chat", "key_1", 0, Usage(5000, 0))
        estimator.learn("chat", "key_1", 5000, Usage(0, 0))
    assert estimator.chars_per_token("chat") == 4.0
    assert estimate(estimator, chat("x")).output == FIRST_OUTPUT


def share_above(estimator: Estimator, lengths: list[int]) -> float:
    output = estimate(estimator, chat("x")).output
    return sum(length > output for length in lengths) / len(lengths)


def test_one_answer_in_ten_is_longer_than_the_learned_length_and_it_follows() -> None:
    rng, estimator = random.Random(7), Estimator()
    for mean in (4.0, 7.0, 3.0):
        lengths = [max(1, round(rng.lognormvariate(mean, 0.8))) for _ in range(2000)]
        shares = []
        for index, length in enumerate(lengths):
            estimator.learn("chat", "key_1", 0, Usage(0, length))
            if index >= 500:
                shares.append(share_above(estimator, lengths))
        assert sum(shares) / len(shares) == pytest.approx(0.1, abs=0.04)


def test_a_new_key_begins_with_its_models_length() -> None:
    estimator = Estimator()
    for _ in range(9):
        estimator.learn("chat", "key_1", 0, Usage(0, 40))
    assert estimate(estimator, chat("x")).output == FIRST_OUTPUT
    estimator.learn("chat", "key_2", 0, Usage(0, 40))
    assert estimate(estimator, chat("x"), key_id="key_3").output == 40
    for _ in range(10):
        estimator.learn("chat", "key_4", 0, Usage(0, 3000), choices=3)
    assert estimate(estimator, chat("x"), key_id="key_4", choices=2).output == 2000


def test_tables_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.limits.estimate._MAX_MODELS", 5)
    monkeypatch.setattr("gateway.limits.estimate._MAX_PAIRS", 7)
    estimator = Estimator()
    for number in range(50):
        estimator.learn(f"m{number}", f"k{number}", 100, Usage(25, 10))
    assert [len(table) for table in (estimator._ratios, estimator._model_outputs, estimator._outputs)] == [5, 5, 7]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE as real models have them, trained here."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    corpus = ["the quick brown fox jumps over the lazy dog", "def f(x): return x + 1", "Straße, naïve, 東京"] * 50
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@settings(max_examples=200)
@given(contents=st.lists(st.text(max_size=200), min_size=1, max_size=5))
def test_the_hard_bound_holds_for_a_real_vocabulary(tokenizer_file: Path, contents: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    rendered = "".join(f"<|im_start|>user\n{content}<|im_end|>\n" for content in contents) + "<|im_start|>assistant\n"
    parts = [part for content in contents for part in ("user\n", content, "\n")] + ["assistant\n"]
    real = sum(len(tokenizer.encode(part).ids) for part in parts) + 2 * len(contents) + 1
    assert len(rendered) >= len("".join(parts))
    assert estimate(Estimator(), chat(*contents), hard=True).input >= real
    prompt = {"prompt": contents}
    count = sum(len(tokenizer.encode(content).ids) for content in contents)
    assert estimate(Estimator(), prompt, COMPLETIONS, hard=True).input >= count


def with_tokenizer(path: Path) -> Settings:
    return Settings.model_validate({"models": {"chat": {"backend": "pool", "tokenizer": path}, "b": {"backend": "p"}}})


def test_a_tokenizer_counts_exactly(tokenizer_file: Path) -> None:
    counters = load_tokenizers(with_tokenizer(tokenizer_file))
    assert list(counters) == ["chat"]
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    texts = ["the quick brown fox", "naïve 東京 <|endoftext|>"]
    exact = sum(len(tokenizer.encode(text).ids) for text in texts)
    estimator = Estimator(counters)
    found = estimate(estimator, {"prompt": texts}, COMPLETIONS)
    assert (found.input, found.chars) == (exact, 0)
    assert estimate(estimator, chat(*texts)).input == exact + 3 * FRAME_CHARS // 4
    assert (
        estimate(estimator, chat([{"type": "text", "text": texts[0]}, texts[1]])).input == exact + 2 * FRAME_CHARS // 4
    )
    assert estimate(estimator, {"prompt": texts}, COMPLETIONS, model="b").chars > 0
    assert (estimator.needs_thread("chat", 10**6), estimator.needs_thread("chat", 100)) == (True, False)
    assert estimator.needs_thread("b", 10**6) is False
    estimator.use_tokenizers({})
    assert estimate(estimator, {"prompt": texts}, COMPLETIONS).chars > 0


def test_a_tokenizer_that_truncates_still_counts_the_whole_prompt(tokenizer_file: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    path = tmp_path / "truncating.json"
    tokenizer.save(str(path))
    count = load_tokenizers(with_tokenizer(path))["chat"]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert count("the fox") == len(tokenizer.encode("the fox").ids) < 8
    assert count("the fox " * 50) == len(tokenizer.encode("the fox " * 50).ids) > 8


def test_counting_in_a_thread_leaves_the_event_loop_free(tokenizer_file: Path) -> None:
    count = load_tokenizers(with_tokenizer(tokenizer_file))["chat"]
    thread = threading.Thread(target=count, args=("the quick brown fox " * 60_000,))
    started = before = time.perf_counter()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        thread.join(0.001)
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    assert longest < (before - started) / 2


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {}}')
    with pytest.raises(ConfigError, match=r"models\.chat\.tokenizer: cannot be used"):
        load_tokenizers(with_tokenizer(path))
