"""Pictures, sound and video in messages: what an engine may be made to open for a client.

Engines fetch what a message names. SGLang 0.5.23 opens `file://` and bare paths on its own disk (`load_image` in
`srt/utils/common.py`), every engine fetches `http://` from wherever it stands, which reaches addresses that clients do
not, and torch tensors (`image_embeds` and the like, vLLM) are parsed by code that was never meant for strangers. So a
part of a message is either text, or every address in it is one of

    data:<type>;base64,...      the bytes themselves
    http(s)://host/...          where the operator lets engines fetch from that host (`remote_media`)

in exactly this spelling: what two URL parsers could read differently (user names, backslashes, upper-case schemes,
white space) is refused. The host is compared by name. What the name resolves to is the engine's business, so a host is
listed because it is trusted, not because it looks public.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from gateway.errors import InvalidRequest

_TEXT_PART = frozenset({"type", "text", "cache_control"})
_NEVER_ADDRESSES = frozenset({"type", "text", "content", "thinking", "reasoning", "refusal", "title", "context"})
"""Members of parts that are words for the model."""
_BYTES = frozenset({"data", "file_data"})
"""Members that hold base64, and nothing an engine opens."""
_OPENED = frozenset({"url", "image", "video", "audio", "file", "path", "file_path", "uri", "input_image"})
_DATA = re.compile(r"data:[A-Za-z0-9.+/-]*(?:;[A-Za-z0-9._+=-]*){0,4},")
_REMOTE = re.compile(r"https?://([A-Za-z0-9](?:[A-Za-z0-9.-]{0,252}[A-Za-z0-9])?)(?::[0-9]{1,5})?(?:[/?#][^\\\s]*)?")
_ADDRESS = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*://|file:|data:|/|~|\\\\)")
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]*")
_SAMPLE = 4096
_TENSORS = "_embeds"
ANY = "*"


def check_media(fields: dict[str, Any], hosts: frozenset[str]) -> None:
    """Raise `InvalidRequest` for a part of a message that names what the engine may not open.

    `hosts`: names that engines may fetch from; one that begins with a dot stands for all below it, `ANY` for all.
    """
    messages = fields.get("messages")
    if type(messages) is list:
        for index, message in enumerate(messages):
            if type(message) is dict:
                content = message.get("content")
                if type(content) is list:
                    _check_parts(content, f"messages[{index}].content", hosts)
                elif type(content) is dict:
                    _check_part(content, f"messages[{index}].content", hosts)
            elif type(message) is list:  # a batch of conversations, which vLLM's embeddings take
                check_media({"messages": message}, hosts)


def check_inputs(fields: dict[str, Any], hosts: frozenset[str]) -> None:
    """The same for embeddings, whose `input` may hold pictures (SGLang) or messages (vLLM)."""
    check_media(fields, hosts)
    inputs = fields.get("input")
    if type(inputs) is dict:
        inputs = [inputs]
    if type(inputs) is list and inputs and type(inputs[0]) is not int:
        for index, each in enumerate(inputs):
            if type(each) is dict:
                if "content" in each:
                    check_media({"messages": [each]}, hosts)
                _check_part(each, f"input[{index}]", hosts)
            elif type(each) is list and each and type(each[0]) is dict:
                check_media({"messages": each}, hosts)


def _check_parts(parts: Iterable[Any], where: str, hosts: frozenset[str]) -> None:
    for index, part in enumerate(parts):
        if type(part) is dict and not _TEXT_PART.issuperset(part):
            _check_part(part, f"{where}[{index}]", hosts)


def _check_part(part: dict[str, Any], where: str, hosts: frozenset[str]) -> None:
    kind = part.get("type")
    if type(kind) is str and kind.endswith((_TENSORS, "image_pil")):
        raise _reserved(f"{where}.type")
    _check(part, "", where, hosts)


def _check(value: Any, name: str, where: str, hosts: frozenset[str]) -> None:
    """Bodies nest at most 64 deep, so recursion is bounded."""
    if type(value) is str:
        if name not in _NEVER_ADDRESSES:
            _check_text(value, name, where, hosts)
    elif type(value) is dict:
        for member, each in value.items():
            if member.endswith((_TENSORS, "image_pil")) and each is not None:
                raise _reserved(f"{where}.{member[:64]}")
            _check(each, member, f"{where}.{member[:64]}", hosts)
    elif type(value) is list:
        if name == "content":
            _check_parts(value, where, hosts)
            return
        for index, each in enumerate(value):
            _check(each, name, f"{where}[{index}]", hosts)


def _check_text(value: str, name: str, where: str, hosts: frozenset[str]) -> None:
    if name in _BYTES:
        if _BASE64.fullmatch(value[:_SAMPLE]) or _DATA.match(value):
            return
    elif name in _OPENED or name.endswith(("url", "_uri", "_path")):
        if _DATA.match(value):
            return
        remote = _REMOTE.fullmatch(value)
        if remote is not None:
            if _may_fetch(remote[1].lower(), hosts):
                return
            raise InvalidRequest(
                f"{where} is on another server, which the model server may not fetch from; send it as a data: URL "
                "with base64 instead.",
                param=where,
                code="remote_media_refused",
            )
    elif not _ADDRESS.match(value):
        return
    raise InvalidRequest(
        f"{where} must be a data: URL with base64, or an http(s):// URL without user name; files, paths and other "
        "schemes are not opened.",
        param=where,
        code="invalid_media_url",
    )


def _may_fetch(host: str, hosts: frozenset[str]) -> bool:
    if ANY in hosts or host in hosts:
        return True
    return any(each.startswith(".") and host.endswith(each) for each in hosts)


def _reserved(where: str) -> InvalidRequest:
    return InvalidRequest(
        f"{where}: tensors are not accepted in place of pictures, sound or text.",
        param=where,
        code="reserved_parameter",
    )
