"""Content parts of OpenAI's messages as Anthropic's content blocks.

Anthropic refuses text blocks without a visible character ("text content blocks must contain non-whitespace text"), so
those are left out: empty messages are common in OpenAI conversations and mean nothing.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any

from backends.dialects.protocol import Untranslatable

Block = dict[str, Any]

_DATA_URL = re.compile(r"data:([^;,]*)((?:;[^;,]*)*?);base64,", re.IGNORECASE)
_MAX_DATA_HEAD = 1024
"""Characters before the data. Ten megabytes of semicolons would be looked through for a second."""
_IMAGES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})
"""`Base64ImageSourceParam` of the anthropic SDK 2.12.0."""


def blocks_of(content: Any, where: str) -> list[Block]:
    """The blocks for a message's `content`: None, a string, or a list of parts. Raises `Untranslatable`."""
    if content is None:
        return []
    if isinstance(content, str):
        return text_blocks(content)
    if not isinstance(content, list):
        raise Untranslatable(f"{where} must be a string or a list of content parts.", where)
    blocks: list[Block] = []
    for index, part in enumerate(content):
        at = f"{where}[{index}]"
        made = _part(part, at)
        keep_cache_control(made, part, at)
        blocks += made
    return blocks


def only_text(blocks: list[Block], where: str, who: str) -> list[Block]:
    """The same blocks. Raises `Untranslatable` when one is not text."""
    for block in blocks:
        if block["type"] != "text":
            raise Untranslatable(f"Anthropic takes only text in {who}, not a block of type {block['type']}.", where)
    return blocks


def text_blocks(text: str) -> list[Block]:
    """One block, or none when there is nothing to see."""
    return [{"type": "text", "text": text}] if text.strip() else []


def keep_cache_control(blocks: list[Block], source: Mapping[str, Any], where: str) -> None:
    """Put the `cache_control` of a part, message or tool on the last of its blocks, as OpenRouter and LiteLLM do.

    Blocks of thinking cannot carry one. Raises `Untranslatable` when it is not an object.
    """
    mark = source.get("cache_control")
    if mark is None:
        return
    if not isinstance(mark, dict):
        raise Untranslatable("cache_control must be an object.", f"{where}.cache_control")
    for block in reversed(blocks):
        if block["type"] not in ("thinking", "redacted_thinking"):
            block["cache_control"] = mark
            return


def _part(part: Any, at: str) -> list[Block]:
    if not isinstance(part, dict):
        raise Untranslatable(f"{at} must be an object.", at)
    kind = part.get("type")
    if kind in ("text", "refusal"):
        text = part.get(kind)
        if not isinstance(text, str):
            raise Untranslatable(f"{at}.{kind} must be a string.", f"{at}.{kind}")
        return text_blocks(text)
    if kind == "image_url":
        return [_image(part.get("image_url"), f"{at}.image_url")]
    if kind == "file":
        return [_document(part.get("file"), f"{at}.file")]
    if kind == "input_audio":
        raise Untranslatable("Anthropic's models take no audio.", f"{at}.input_audio")
    raise Untranslatable(f"Anthropic has no content part of type {kind!r}.", f"{at}.type")


def _image(image: Any, where: str) -> Block:
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise Untranslatable(f"{where} needs a url.", where)
    if url[:8].lower() == "https://":
        return {"type": "image", "source": {"type": "url", "url": url}}
    media_type, data = _data_url(url, where, "Images must be given as an https:// or a base64 data: URL.")
    media_type = "image/jpeg" if media_type == "image/jpg" else media_type
    if media_type not in _IMAGES:
        raise Untranslatable(f"Anthropic takes JPEG, PNG, GIF and WebP images, not {media_type or 'unnamed'}.", where)
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def _document(file: Any, where: str) -> Block:
    if not isinstance(file, dict):
        raise Untranslatable(f"{where} must be an object.", where)
    given = file.get("file_data")
    if not isinstance(given, str):
        raise Untranslatable("Anthropic cannot read files stored with OpenAI; send file_data.", f"{where}.file_id")
    block: Block = {"type": "document", "source": _document_source(given, f"{where}.file_data")}
    name = file.get("filename")
    if isinstance(name, str) and name:
        block["title"] = name
    return block


def _document_source(given: str, where: str) -> Block:
    if given[:8].lower() == "https://":
        return {"type": "url", "url": given}
    media_type, data = _data_url(given, where, "file_data must be a base64 data: URL.")
    if media_type == "application/pdf":
        return {"type": "base64", "media_type": media_type, "data": data}
    if media_type == "text/plain":
        try:
            text = base64.b64decode(data, validate=True).decode()
        except (binascii.Error, ValueError) as error:
            raise Untranslatable("file_data is no UTF-8 text in base64.", where) from error
        return {"type": "text", "media_type": media_type, "data": text}
    raise Untranslatable(f"Anthropic takes PDF and plain text files, not {media_type or 'unnamed'}.", where)


def _data_url(url: str, where: str, otherwise: str) -> tuple[str, str]:
    """Media type and base64 text of a data: URL."""
    head = _DATA_URL.match(url, 0, _MAX_DATA_HEAD)
    if head is None:
        raise Untranslatable(otherwise, where)
    return head.group(1).strip().lower(), url[head.end() :]
