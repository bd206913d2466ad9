"""Keys over tokens: what the engine would see, and text instead where that cannot be told."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from backends.dialects.protocol import CHAT, COMPLETIONS, EMBEDDINGS
from gateway.config import Settings
from gateway.templates import ExactPrompt, ExactPrompts, load_templates
from routing.keys import BLOCK_TOKENS, seed_of, token_prefix
from routing.prefix import Prefix

SEED = seed_of("chat")
SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'forbidden' %}
        {{- raise_exception('no such role') }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + ' ' + call.function.arguments['city'] }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
    {%- if loop.index > 1000 %}{% break %}{% endif %}
{%- endfor %}
{%- if dated is defined %}{{- strftime_now('%Y-%m-%d') }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as models come in: a byte-level BPE, and its template in tokenizer_config.json."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=500, initial_alphabet=ByteLevel.alphabet(), special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 50, trainer)
    tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    tokenizer.enable_truncation(4096)
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<|begin|>", "special": True}, "pad_token": None, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def exact(model: Path) -> ExactPrompts:
    return load_templates(settings(model), lambda: datetime(2026, 7, 14, tzinfo=UTC))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    loaded = Tokenizer.from_file(str(model / "tokenizer.json"))
    loaded.no_truncation()
    return loaded


def settings(folder: Path, **more: Any) -> Settings:
    chat = {"backend": "pool", "tokenizer": folder / "tokenizer.json", **more}
    return Settings.model_validate({"models": {"chat": chat, "other": {"backend": "pool"}}})


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def of_chat(exact: ExactPrompts, *messages: Any, **fields: Any) -> Prefix:
    prefix = exact.prefix("chat", CHAT, {"messages": list(messages), **fields}, SEED)
    assert prefix is not None
    return prefix


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_a_chat_has_the_tokens_that_the_template_makes(exact: ExactPrompts, tokenizer: Tokenizer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Malm\\u00f6"}'}}
    prefix = of_chat(
        exact,
        {"role": "system", "content": "the fox"},
        user([{"type": "text", "text": "the lazy dog " * 50}]),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "<b>rain</b> & wind"},
        tools=[{"name": "weather", "unit": "°C"}],
    )
    text = (
        '<|begin|><|im_start|>system\n{"name": "weather", "unit": "°C"}<|im_end|>\n'
        "<|im_start|>system\nthe fox<|im_end|>\n"
        "<|im_start|>user\n" + "the lazy dog " * 50 + "<|im_end|>\n"
        "<|im_start|>assistant\nweather Malmö<|im_end|>\n"
        "<|im_start|>tool\n<b>rain</b> & wind<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = ids_of(tokenizer, text)
    whole = token_prefix(ids, SEED)
    assert (prefix.digests, prefix.ends, prefix.total) == (whole.digests, whole.ends, len(ids))
    assert prefix.tails[0] == whole.tails[0]
    assert prefix.unit_tokens == 1.0
    assert prefix.ends[0] == BLOCK_TOKENS


@given(contents=st.lists(st.text("the quick<|>\n é", min_size=1, max_size=30), min_size=1, max_size=4))
def test_the_next_turn_has_the_last_prompt_among_its_tails(exact: ExactPrompts, contents: list[str]) -> None:
    conversation = [user(contents[0])]
    for content in contents[1:]:
        conversation += [{"role": "assistant", "content": "yes"}, user(content)]
    before = of_chat(exact, *conversation)
    after = of_chat(exact, *conversation, {"role": "assistant", "content": "the fox"}, user("more"))
    assert before.tails[0] in after.tails
    assert len(after.tails) == min(4, len(contents) + 1)


def test_settings_of_the_template_count(exact: ExactPrompts) -> None:
    plain = of_chat(exact, user("a"))
    assert of_chat(exact, user("a"), add_generation_prompt=False).total < plain.total
    assert of_chat(exact, user("a"), continue_final_message=True).total < plain.total
    assert of_chat(exact, user("a"), chat_template_kwargs={"dated": True}).total > plain.total
    # They change nothing that the template is given anyway.
    hostile = {"messages": [], "tools": [1], "bos_token": "", "add_generation_prompt": False}
    assert of_chat(exact, user("a"), tools=[{"a": 1}], chat_template_kwargs=hostile).total > plain.total


def test_bare_prompts_have_the_models_special_tokens(exact: ExactPrompts, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox " * 3000).ids
    assert (ids[0], len(ids) > 4096) == (0, True)
    whole = token_prefix(ids, SEED)
    for path, name in ((COMPLETIONS, "prompt"), (EMBEDDINGS, "input")):
        for prompt in ("the fox " * 3000, ["the fox " * 3000], ids, [ids]):
            assert exact.prefix("chat", path, {name: prompt}, SEED) == whole


@pytest.mark.parametrize(
    ("path", "fields", "reason"),
    [
        (CHAT, {}, "no messages"),
        (CHAT, {"messages": "x"}, "no messages"),
        (CHAT, {"messages": [7]}, "a message without a role"),
        (CHAT, {"messages": [{"role": ["user"], "content": "a"}]}, "a message without a role"),
        (CHAT, {"messages": [user([{"type": "image_url", "image_url": {"url": "data:"}}])]}, "other than text"),
        (CHAT, {"messages": [user({"text": "a"})]}, "other than text"),
        (CHAT, {"messages": [user("a")], "chat_template": "{{ 1 }}"}, "its own chat template"),
        (CHAT, {"messages": [user("a")], "cache_salt": "x"}, "a cache of its own"),
        (COMPLETIONS, {"prompt": "a", "extra_key": "x"}, "a cache of its own"),
        (CHAT, {"messages": [{"role": "forbidden", "content": "a"}]}, r"failed \(TemplateError\)"),
        (CHAT, {"messages": [{**user("a"), "tool_calls": [7, {"function": 8}]}]}, r"failed \(UndefinedError\)"),
        (CHAT, {"messages": [{**user("a"), "tool_calls": 7}]}, "failed"),
        (CHAT, {"messages": [user("\udfff")]}, "failed"),
        (CHAT, {"messages": [user("a")], "tools": [object]}, "failed"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "not one prompt"),
        (COMPLETIONS, {"prompt": [[1], [2]]}, "not one prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "not one prompt"),
        (COMPLETIONS, {"prompt": [-1, 2]}, r"failed \(OverflowError\)"),
        (EMBEDDINGS, {"input": None}, "not one prompt"),
    ],
)
def test_what_cannot_be_rendered_has_no_keys_and_that_is_said_once(
    model: Path, path: str, fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    exact = load_templates(settings(model))
    for _ in range(3):
        assert exact.prefix("chat", path, fields, SEED) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "model chat: a prompt is recognised by its text" in record.message
    assert re.search(reason, record.message)
    assert exact.prefix("chat", CHAT, {"messages": [user("a")]}, SEED) is not None


def test_other_models_are_none_of_its_business(exact: ExactPrompts) -> None:
    assert "chat" in exact
    assert "other" not in exact
    assert exact.prefix("other", CHAT, {"messages": [user("a")]}, SEED) is None
    assert ExactPrompts().prefix("chat", CHAT, {"messages": [user("a")]}, SEED) is None


def test_long_prompts_belong_in_a_thread(exact: ExactPrompts) -> None:
    assert [exact.needs_thread("chat", size) for size in (100, 100_000)] == [False, True]
    assert exact.needs_thread("other", 100_000) is False


def test_a_thread_leaves_the_event_loop_free(exact: ExactPrompts) -> None:
    """The library's plain `encode` keeps the interpreter's lock to its end."""
    fields = {"messages": [user("the quick brown fox jumps over a lazy cat " * 30_000)]}
    ticks = 0
    thread = threading.Thread(target=exact.prefix, args=("chat", CHAT, fields, SEED))
    begin = time.perf_counter()
    thread.start()
    longest_s, last = 0.0, begin
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        longest_s, last = max(longest_s, now - last), now
        ticks += 1
    assert ticks > 10
    assert longest_s < (last - begin) / 2


def test_a_template_may_lie_beside_the_tokenizer_or_anywhere(model: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("J{{ messages[0].content }}{{ bos_token }}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.jinja").write_text("MINE{{ messages[0].content }}")
    beside = of_chat(load_templates(settings(tmp_path)), user("fox"))
    named = of_chat(load_templates(settings(tmp_path, chat_template=elsewhere / "mine.jinja")), user("fox"))
    loaded = Tokenizer.from_file(str(model / "tokenizer.json"))
    assert beside == token_prefix(ids_of(loaded, "Jfox<|begin|>"), SEED)
    assert named == token_prefix(ids_of(loaded, "MINEfox"), SEED)


def test_of_several_templates_the_default_is_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D{{ messages[0].content }}"}, 7]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    loaded = Tokenizer.from_file(str(model / "tokenizer.json"))
    prefix = of_chat(load_templates(settings(tmp_path)), user("fox"))
    assert prefix == token_prefix(ids_of(loaded, "Dfox"), SEED)


def test_without_a_template_only_bare_prompts_have_tokens(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    for text in ("[]", "{}", '{"chat_template": 7}', '{"chat_template": [{"name": "tool_use", "template": "T"}]}'):
        (tmp_path / "tokenizer_config.json").write_text(text)
        exact = load_templates(settings(tmp_path))
        assert exact.prefix("chat", CHAT, {"messages": [user("a")]}, SEED) is None
        assert exact.prefix("chat", COMPLETIONS, {"prompt": "the fox"}, SEED) is not None
    assert {"no chat template is known" in record.message for record in caplog.records} == {True}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chat_template.jinja", "{% if %}"),
        ("chat_template.jinja", "x" * 1_048_577),
        ("tokenizer_config.json", "{"),
        ("tokenizer.json", "{}"),
    ],
)
def test_what_cannot_be_loaded_is_said_and_text_is_used(
    model: Path, tmp_path: Path, name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(text)
    exact = load_templates(settings(tmp_path))
    assert "chat" not in exact
    (record,) = caplog.records
    assert "model chat: prompts are recognised by their text" in record.message


def test_a_template_without_a_tokenizer_is_said_to_be_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_text("x")
    chat = {"backend": "pool", "chat_template": path}
    assert "chat" not in load_templates(Settings.model_validate({"models": {"chat": chat}}))
    assert "there is no tokenizer" in caplog.text


def test_templates_run_in_a_sandbox(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    exact = load_templates(settings(tmp_path))
    assert exact.prefix("chat", CHAT, {"messages": [user("a")]}, SEED) is None
    assert "SecurityError" in caplog.text


def test_a_template_whose_answers_begin_nowhere_has_checkpoints_only(model: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    for text in (
        "{% for m in messages %}{{ m.content }};{% endfor %}",
        "{{ add_generation_prompt }}{{ messages | map(attribute='content') | join }}",
        "{{ messages[1].role.upper() }}{{ messages[2].content.upper() }}",
    ):
        (tmp_path / "chat_template.jinja").write_text(text)
        prefix = of_chat(load_templates(settings(tmp_path)), user("a"), user("b"), user("c" * 2000))
        assert len(prefix.tails) == 1
        assert prefix.digests


def test_an_answers_beginning_is_looked_for_token_by_token() -> None:
    """The bytes of two neighbouring ids may look like it."""
    begins = 0x0100_0000
    ids = {"a": [7, begins], "b": [7, 0, 1, 0, 9, begins, 9, begins], "begins": [begins]}

    def render(context: Mapping[str, Any]) -> str:
        content: str = context["messages"][-1]["content"]
        return content if content != "x" else "begins" * context["add_generation_prompt"]

    exact = ExactPrompts({"chat": ExactPrompt(lambda text, special: ids[text], render)})
    prefix = of_chat(exact, user("b"))
    assert [end for _, end in prefix.tails] == [8, 6]
    assert [end for _, end in of_chat(exact, user("a")).tails] == [2]
