"""What each engine is sent so that it goes on with a text; that they do is shown in `tests/engines`."""

from __future__ import annotations

from typing import Any

import pytest

from backends.dialects import DIALECTS
from backends.dialects.protocol import CHAT, COMPLETIONS, EMBEDDINGS, NotOffered
from backends.side import SideChannel
from tests.backends.scripted import Peer, scripted

ASKED: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Say it."}], "seed": 7}
GOING_ON = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Well, \n"}]
HOSTED = sorted(name for name, dialect in DIALECTS.items() if dialect.hosted)
OWN = sorted(set(DIALECTS) - set(HOSTED))


@pytest.mark.parametrize("engine", ["vllm", "llamacpp"])
def test_the_text_becomes_the_beginning_of_the_assistants_message(engine: str) -> None:
    assert DIALECTS[engine].continuation(CHAT, ASKED, "Well, \n") == {
        "messages": GOING_ON,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert ASKED["messages"] == GOING_ON[:1], "the caller's messages are not changed"


def test_sglang_is_not_told_to_leave_out_the_beginning_of_the_turn() -> None:
    sglang = DIALECTS["sglang"]
    assert sglang.continuation(CHAT, ASKED, "Well, \n") == {"messages": GOING_ON, "continue_final_message": True}
    set_by_client = sglang.continuation(CHAT, {**ASKED, "add_generation_prompt": False}, "Well, \n")
    assert set_by_client["add_generation_prompt"] is True


@pytest.mark.parametrize("engine", ["trtllm", "lmdeploy", "openai"])
def test_engines_whose_chat_api_has_no_such_thing_are_not_asked(engine: str) -> None:
    with pytest.raises(NotOffered):
        DIALECTS[engine].continuation(CHAT, ASKED, "Well")


@pytest.mark.parametrize("engine", HOSTED)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_hosted_apis_are_not_asked(engine: str, path: str) -> None:
    with pytest.raises(NotOffered):
        DIALECTS[engine].continuation(path, {**ASKED, "prompt": "Once"}, "Well")


@pytest.mark.parametrize("engine", OWN)
def test_a_text_completion_goes_on_from_prompt_and_text(engine: str) -> None:
    fields = {"prompt": "Once ", "max_tokens": 9}
    assert DIALECTS[engine].continuation(COMPLETIONS, fields, "upon\n") == {"prompt": "Once upon\n"}


@pytest.mark.parametrize("engine", OWN)
def test_the_number_of_tokens_that_an_engine_assumes_is_said(engine: str) -> None:
    told = DIALECTS[engine].continuation(COMPLETIONS, {"prompt": "Once "}, "upon")
    assert told == {"prompt": "Once upon", **({} if engine == "llamacpp" else {"max_tokens": 16})}


@pytest.mark.parametrize("engine", OWN)
@pytest.mark.parametrize("prompt", [[1, 2, 3], ["Once"], [["Once"]], None, 5])
def test_prompts_that_are_not_one_text_are_not_continued(engine: str, prompt: Any) -> None:
    with pytest.raises(NotOffered):
        DIALECTS[engine].continuation(COMPLETIONS, {"prompt": prompt}, "upon")


@pytest.mark.parametrize("messages", [None, "Say it.", [], {}])
@pytest.mark.parametrize("engine", ["sglang", "vllm", "llamacpp"])
def test_a_chat_without_messages_is_not_continued(engine: str, messages: Any) -> None:
    with pytest.raises(NotOffered):
        DIALECTS[engine].continuation(CHAT, {"messages": messages}, "Well")


@pytest.mark.parametrize("engine", OWN)
def test_nothing_else_can_be_continued(engine: str) -> None:
    with pytest.raises(NotOffered):
        DIALECTS[engine].continuation(EMBEDDINGS, {"input": "x"}, "Well")


def test_vllm_is_not_sent_what_it_would_answer_with_the_whole_prompt() -> None:
    with pytest.raises(NotOffered):
        DIALECTS["vllm"].continuation(CHAT, ASKED, "half \ufffd")
    assert DIALECTS["vllm"].continuation(CHAT, ASKED, "half \ufffd.")["continue_final_message"] is True


@pytest.mark.parametrize(("with_blank", "trims"), [(15, True), (16, False), (None, False)])
async def test_vllm_is_asked_whether_its_chat_template_trims(with_blank: int | None, trims: bool) -> None:
    """0.32.0 answers so with a template that says `content | trim`, and with one that does not."""

    async def script(peer: Peer) -> None:
        while True:
            line = await peer.request()
            found = line.startswith(b"POST /tokenize ")
            count = with_blank if rb"a\n" in line else 15
            body = b'{"count":%d}' % count if found and count is not None else b'{"detail":"Not Found"}'
            status = 200 if body.startswith(b'{"count"') else 404
            await peer.send(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))

    async with scripted(script) as server:
        side = SideChannel(origin=f"http://127.0.0.1:{server.origin.port}")
        try:
            info = await DIALECTS["vllm"].info(side)
        finally:
            await side.aclose()
    assert info.trims_text is trims
