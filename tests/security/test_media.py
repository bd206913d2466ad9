"""S7: what messages may make an engine open. Addresses in parts are refused unless they are bytes, or listed hosts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.media import ANY, check_inputs, check_media

PIXEL = "data:image/png;base64,iVBORw0KGgo="
NONE: frozenset[str] = frozenset()
SOME = frozenset({"images.example.com", ".cdn.example.com"})
ALL = frozenset({ANY})

NOT_OPENED = [
    *("file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd", "file://localhost/etc/passwd"),
    *("/etc/passwd", "./secret.png", "../../etc/shadow.png", "secret.png", "~/x.png", "C:\\secret.png", "\\\\host\\x"),
    *("HTTP://example.com/x.png", "Https://example.com/x", "hTTp://169.254.169.254/", "http:/example.com/x.png"),
    *("http:///x.png", "http://", "https://", "http:example.com", "//example.com/x.png", "http://exa mple.com/"),
    *("http://user@example.com/", "http://u:p@example.com/x", "http://a@images.example.com@10.0.0.1/"),
    *("http://images.example.com\\@10.0.0.1/", "http://10.0.0.1\\.images.example.com/", "http://[::1]/x.png"),
    *("http://[::ffff:127.0.0.1]/", "http://images.example.com:99999999/", "http://images.example.com:80@10.0.0.1/"),
    *(" http://images.example.com/x", "http://images.example.com/x\n", "\thttp://10.0.0.1/", "http://10.0.0.1/ x"),
    *("ftp://example.com/x.png", "gopher://127.0.0.1:6379/_FLUSHALL", "s3://bucket/x", "gs://bucket/x", "jar:file:/x"),
    *("blob:http://x/1", "javascript:alert(1)", "php://filter", "unix:///run/x", "iVBORw0KGgo=", "", "data:", "data:x"),
    *("DATA:image/png;base64,AAAA", " data:image/png;base64,AAAA", "data:../../etc/passwd", "http://-x/", "http://x-/"),
]
REMOTE = [
    *("http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:30000/flush_cache", "http://localhost/x.png"),
    *(
        "http://2130706433/",
        "http://0x7f000001/",
        "http://017700000001/",
        "http://127.1/",
        "http://0/",
        "http://10.0.0.1",
    ),
    *("http://metadata.google.internal/", "https://example.com/x.png", "http://images.example.com.evil.org/"),
    *(
        "http://ximages.example.com/",
        "http://cdn.example.com/",
        "http://evilcdn.example.com/x",
        "http://example.com?x=/",
    ),
    *("http://example.com#images.example.com", "http://example.com/?@images.example.com"),
]
LISTED = [
    *("http://images.example.com/x.png", "https://images.example.com:8443/a/b?c=d#e", "https://IMAGES.example.com"),
    *("https://a.cdn.example.com/x", "https://a.b.cdn.example.com?x"),
]
BYTES = [
    PIXEL,
    "data:;base64,AAAA",
    "data:image;base64,/9j/",
    "data:audio/wav;rate=8000;base64,AAAA",
    "data:text/plain,x",
]

URL_FORMS: dict[str, Any] = {
    "image_url": lambda url: {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
    "image_url as text": lambda url: {"type": "image_url", "image_url": url},
    "image without type": lambda url: {"image_url": url},
    "text with uuid and image": lambda url: {"type": "text", "text": "x", "uuid": "1", "image_url": url},
    "input_image": lambda url: {"type": "input_image", "image_url": url},
    "audio_url": lambda url: {"type": "audio_url", "audio_url": {"url": url}},
    "video_url": lambda url: {"type": "video_url", "video_url": {"url": url, "max_dynamic_patch": 1}},
    "time series": lambda url: {"type": "time_series_url", "time_series_url": {"url": url}},
    "image": lambda url: {"type": "image", "image": url},
    "video frames": lambda url: {"type": "video", "video": [PIXEL, url]},
    "Anthropic's source": lambda url: {"type": "image", "source": {"type": "url", "url": url}},
    "file": lambda url: {"type": "file", "file": {"file_url": url}},
    "a tool's picture": lambda url: {
        "type": "tool_result",
        "content": [{"type": "image_url", "image_url": {"url": url}}],
    },
}


def problem(
    url: Any, form: str = "image_url", hosts: frozenset[str] = NONE, role: str = "user"
) -> tuple[str, str] | None:
    """Code and param of the refusal; None when it passes."""
    fields = {
        "messages": [{"role": "system", "content": "x"}, {"role": role, "content": [text(), URL_FORMS[form](url)]}]
    }
    return refusal(fields, hosts)


def text() -> dict[str, Any]:
    return {"type": "text", "text": "file:///etc/passwd http://169.254.169.254/"}


def refusal(fields: dict[str, Any], hosts: frozenset[str] = NONE) -> tuple[str, str] | None:
    try:
        check_media(fields, hosts)
    except InvalidRequest as error:
        return error.code or "", error.param or ""
    return None


@pytest.mark.parametrize("form", URL_FORMS)
def test_bytes_inside_the_request_pass(form: str) -> None:
    assert [problem(url, form) for url in BYTES] == [None] * len(BYTES)


@pytest.mark.parametrize("form", URL_FORMS)
@pytest.mark.parametrize("hosts", [NONE, SOME, ALL])
def test_files_paths_and_ambiguous_addresses_never_pass(form: str, hosts: frozenset[str]) -> None:
    passed = [url for url in NOT_OPENED if (problem(url, form, hosts) or ("",))[0] != "invalid_media_url"]
    assert passed == []


@pytest.mark.parametrize("form", URL_FORMS)
def test_other_servers_pass_only_where_they_are_listed(form: str) -> None:
    assert {(problem(url, form) or ("",))[0] for url in REMOTE + LISTED} == {"remote_media_refused"}
    assert {(problem(url, form, SOME) or ("",))[0] for url in REMOTE} == {"remote_media_refused"}
    assert [problem(url, form, SOME) for url in LISTED] == [None] * len(LISTED)
    assert [problem(url, form, ALL) for url in REMOTE + LISTED] == [None] * len(REMOTE + LISTED)


def test_the_refusal_names_the_part() -> None:
    assert problem("/etc/passwd") == ("invalid_media_url", "messages[1].content[1].image_url.url")
    assert problem("http://x/", "video frames") == ("remote_media_refused", "messages[1].content[1].video[1]")


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "developer", None, 7])
def test_whoever_speaks(role: Any) -> None:
    assert problem("/etc/passwd", role=role) is not None


def test_sound_and_files_as_base64_pass_and_nothing_else_in_their_place() -> None:
    def asked(part: dict[str, Any]) -> tuple[str, str] | None:
        return refusal({"messages": [{"role": "user", "content": [part]}]})

    assert asked({"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}) is None
    assert asked({"type": "input_audio", "input_audio": {"data": "/9j/4AAQ", "format": "wav"}}) is None
    assert (
        asked({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}}) is None
    )
    assert asked({"type": "file", "file": {"file_id": "file-abc123"}}) is None
    for data in ("file:///etc/passwd", "http://10.0.0.1/x", "../x.wav", "x.wav"):
        assert asked({"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}) is not None
        assert asked({"type": "file", "file": {"file_data": data}}) is not None


@pytest.mark.parametrize("kind", ["image_embeds", "audio_embeds", "video_embeds", "prompt_embeds", "image_pil"])
def test_tensors_are_refused_wherever_they_stand(kind: str) -> None:
    for part in ({"type": kind, kind: "AAAA"}, {"type": kind, "data": "AAAA"}, {kind: {"a": "AAAA"}, "uuid": "1"}):
        found = refusal({"messages": [{"role": "user", "content": [part]}]}, ALL)
        assert found is not None, part
        assert found[0] == "reserved_parameter"


def test_unknown_parts_may_hold_words_but_no_addresses() -> None:
    def asked(value: Any) -> tuple[str, str] | None:
        return refusal({"messages": [{"role": "user", "content": [{"type": "new", "new": {"member": value}}]}]}, NONE)

    assert asked("A word: and another/one.") is None
    assert asked(7) is None
    for value in ("file:///etc/passwd", "/etc/passwd", "http://10.0.0.1/", ["x", {"deep": "gopher://x"}], "~/.ssh/id"):
        assert asked(value) is not None, value


def test_words_are_not_addresses() -> None:
    words = [
        {"type": "text", "text": "/etc/passwd"},
        {"type": "text", "text": "http://x", "cache_control": {"type": "ephemeral"}},
        {"type": "refusal", "refusal": "file:///x"},
        {"type": "thinking", "thinking": "/x", "signature": "EqQBCgIYAg"},
        {"type": "tool_result", "content": "/usr/bin", "tool_use_id": "toolu_1"},
        "http://x",
    ]
    assert refusal({"messages": [{"role": "user", "content": words}]}) is None
    assert refusal({"messages": [{"role": "user", "content": "file:///etc/passwd"}]}) is None


def test_embeddings_of_pictures_and_of_messages_are_looked_at_too() -> None:
    bad = {"type": "image_url", "image_url": {"url": "/etc/passwd"}}
    message = {"role": "user", "content": [bad]}
    for value in ([{"image": "/etc/passwd"}], [{"text": "x", "video": "http://10.0.0.1"}], [message], [[message]], bad):
        with pytest.raises(InvalidRequest):
            check_inputs({"input": value}, NONE)
    for fields in ({"messages": [message]}, {"messages": [[message]]}):
        with pytest.raises(InvalidRequest):
            check_inputs(fields, NONE)
    words: list[Any] = ["file:///x", ["/etc/passwd", "http://x"], [1, 2], [[1, 2], [3]], [{"text": "/x"}], None, 7, []]
    for each in words:
        check_inputs({"input": each}, NONE)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(NOT_OPENED + REMOTE + BYTES),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "text", "image_url", "url", "content", "video", "data", "x"]), inner)
    ),
    max_leaves=20,
)


@given(json_values)
def test_any_shape_is_either_passed_or_refused(value: Any) -> None:
    """Nothing else is raised, and what is refused stays refused beside more parts."""
    alone = refusal({"messages": value})
    inside = refusal({"messages": [{"role": "user", "content": value}]})
    beside = refusal({"messages": [{"role": "user", "content": [value, text()]}]})
    assert alone is None or alone[0] in ("invalid_media_url", "remote_media_refused", "reserved_parameter")
    if type(value) is dict:
        assert inside is None or beside is not None
