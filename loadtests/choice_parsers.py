"""The JSON parsers that were weighed: what each costs and what it lets through.

``python -m loadtests.choice_parsers --candidate orjson`` prints the CPU time per body as one JSON object,
``--strictness`` what each parser does with input that a strict one refuses. `loadtests.choices` runs both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import orjson

from gateway.body import parse
from loadtests.bodies import WORDS

Parse = Callable[[bytes], object]
SIZES = {"1 KB": 1024, "32 KB": 32_768}
FEW, MANY = 100, 100_000

CASES: Mapping[str, bytes] = {
    "duplicate key": b'{"model":"a","model":"b"}',
    "NaN": b'{"a":NaN}',
    "1e999": b'{"a":1e999}',
    "invalid UTF-8": b'{"a":"\xff"}',
    "surrogate in UTF-8": b'{"a":"\xed\xa0\x80"}',
    "lone surrogate": rb'{"a":"\ud800"}',
    "byte order mark": b'\xef\xbb\xbf{"a":1}',
    f"{FEW} levels": b'{"a":' + b"[" * FEW + b"]" * FEW + b"}",
    f"{MANY:,} levels": b'{"a":' + b"[" * MANY + b"]" * MANY + b"}",
}
"""Bodies that two readers may read differently, or that a reader behind us may fail on."""


PARSERS: Mapping[str, Parse] = {
    "json": json.loads,
    "orjson": orjson.loads,
    "msgspec": msgspec.json.Decoder().decode,
    "msgspec, dict of Raw": msgspec.json.Decoder(dict[str, msgspec.Raw]).decode,
    "gateway.body.parse": parse,
}


def conversation(size_bytes: int, number: int = 0) -> bytes:
    """A chat request of about so many bytes that looks like a real one.

    Unlike `loadtests.bodies`, whose text is plain words, it has what slows parsers down: line ends and quotes to
    unescape, letters outside ASCII, and a tool's schema where there is room for it.
    """
    rng = random.Random(number)
    messages = [{"role": "system", "content": "Tu réponds brièvement — in the language of the question."}]
    body: dict[str, Any] = {"model": "bench", "messages": messages, "temperature": 0.7, "max_tokens": 256}
    if size_bytes >= 4096:
        body["tools"] = [_tool(name) for name in ("search", "read_file", "run_command", "write_file")]
    left = size_bytes - len(_encoded(body))
    while left > 0:
        role = "assistant" if len(messages) % 2 == 0 else "user"
        messages.append({"role": role, "content": _paragraphs(min(left, rng.randrange(200, 1200)), rng)})
        left = size_bytes - len(_encoded(body))
    return _encoded(body)


def _paragraphs(size: int, rng: random.Random) -> str:
    text = ""
    while len(text) < size:
        text += " ".join(rng.choice(WORDS) for _ in range(8))
        text += rng.choice([" ", " ", ' — "naïve" ', "\n\n", '\n    print("x\\n")\n', ". "])
    return text[:size]


def _tool(name: str) -> dict[str, Any]:
    text = {"type": "string", "description": "What to look at, as the user named it."}
    schema = {"type": "object", "properties": {"path": text, "query": text}, "required": ["path"]}
    return {"type": "function", "function": {"name": name, "description": f"Call {name}.", "parameters": schema}}


def _encoded(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def cpu_seconds() -> float:
    """User and system time of this process so far, to the microsecond."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cost_us(read: Parse, size_bytes: int, *, cpu_s: float) -> float:
    """CPU microseconds per body, over at least cpu_s seconds of parsing eight different bodies in turn."""
    bodies = [conversation(size_bytes, number) for number in range(8)]
    batch = max(8, 400_000 // size_bytes)
    for body in itertools.islice(itertools.cycle(bodies), batch):
        read(body)
    done = 0
    began = cpu_seconds()
    while (used := cpu_seconds() - began) < cpu_s:
        for body in itertools.islice(itertools.cycle(bodies), batch):
            read(body)
        done += batch
    return used * 1e6 / done


def accepts(read: Parse, body: bytes) -> bool:
    """Whether the parser takes it; any exception is a refusal, even one that its caller would not expect."""
    try:
        read(body)
    except Exception:
        return False
    return True


def strictness() -> dict[str, dict[str, bool]]:
    """For each parser and case: was it accepted?"""
    return {name: {case: accepts(read, body) for case, body in CASES.items()} for name, read in PARSERS.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.choice_parsers", description="JSON parsers.")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--candidate", choices=list(PARSERS))
    wanted.add_argument("--strictness", action="store_true")
    parser.add_argument("--cpu-s", type=float, default=1.0, help="how long to parse bodies of each size")
    options = parser.parse_args(argv)
    if options.strictness:
        print(json.dumps(strictness()))
        return
    read = PARSERS[options.candidate]
    print(json.dumps({name: round(cost_us(read, size, cpu_s=options.cpu_s), 3) for name, size in SIZES.items()}))


if __name__ == "__main__":
    main()
