"""Reads the Prometheus text pages on which engines report about themselves.

`prometheus_client` has a parser too: it takes 50 ms for a busy engine's page of 170 KB, in which the event loop serves
nobody, and gives up the whole page for one malformed line. This one looks only at the lines that are asked for (1 ms
for the same page) and skips what it cannot read. It does not interpret types, exemplars and time stamps.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

MAX_LINES = 50_000
"""Of a page that is read. The largest real ones have some thousand; a million would hold the event loop for long."""
MAX_VALUE = 1e18
"""What is larger is no count of anything; sums of it would overflow."""

Sample = tuple[Mapping[str, str], float]
"""Labels and value of one line."""

_LABELS = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"([^"\\]*(?:\\.[^"\\]*)*)"\s*(?:,\s*|(?=\}))')
_ESCAPED = re.compile(r"\\(.)")
_ESCAPES = {"n": "\n"}
_NAME_ENDS = re.compile(r"[\s{]")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\Z")


def read_page(
    page: bytes, names: Collection[str], prefixes: Sequence[str] = ("",)
) -> dict[str, list[tuple[Mapping[str, str], float]]]:
    """The samples of the metrics called `names`, by the name that was asked for.

    A metric is found under each of the prefixes, and with `_total` behind its name, which newer client libraries add
    to counters. Lines that are malformed are left out, and so are values beyond `MAX_VALUE` and NaN, which says
    that there is no value. Names that the page does not have are missing from the answer; so are all names where the
    page has more than `MAX_LINES`.
    """
    spellings = {prefix + name + suffix: name for name in names for prefix in prefixes for suffix in ("_total", "")}
    found: dict[str, list[Sample]] = {}
    if page.count(b"\n") > MAX_LINES:
        return found
    for line in page.decode("utf-8", "replace").split("\n"):
        end = _NAME_ENDS.search(line)
        if end is None:
            continue
        name = spellings.get(line[: end.start()])
        if name is None:
            continue
        sample = _read_sample(line, end.start())
        if sample is not None:
            found.setdefault(name, []).append(sample)
    return found


def total(samples: Sequence[Sample]) -> float | None:
    """The sum over all labels; None when there is no sample."""
    return math.fsum(value for _, value in samples) if samples else None


def _read_sample(line: str, name_end: int) -> Sample | None:
    labels: dict[str, str] = {}
    at = name_end
    if line[at] == "{":
        at += 1
        while (label := _LABELS.match(line, at)) is not None:
            text = label.group(2)
            labels[label.group(1)] = _ESCAPED.sub(_unescape, text) if "\\" in text else text
            at = label.end()
        if not line.startswith("}", at):
            return None
        at += 1
    words = line[at:].split(None, 1)
    # Not float() alone, which also reads "1_000", "nan" and "infinity".
    if not words or _NUMBER.match(words[0]) is None:
        return None
    value = float(words[0])
    return (labels, value) if abs(value) <= MAX_VALUE else None


def _unescape(match: re.Match[str]) -> str:
    return _ESCAPES.get(match.group(1), match.group(1))
