"""What must agree at the end of a soak: what clients saw, what was counted, what was logged, what engines served.

Nothing here does I/O.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loadtests.served_log import Line
from loadtests.soak_traffic import Seen

MAY_BE_CUT = frozenset({"never reads", "reads slowly"})
"""The gateway ends these by itself, in the middle."""
BLOCKS = 12
T_95 = 2.228
"""Student's t for a 95 % interval with `BLOCKS` - 2 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line through a memory's size over time, by least squares."""

    mb_per_hour: float
    error_mb_per_hour: float
    """Half the width of the 95 % interval. Neighbouring samples are not independent, so that it is taken from the means
    of `BLOCKS` equal parts."""


def slope(points: Sequence[tuple[float, float]]) -> Slope:
    """For (seconds, MB) at even intervals, at least two for each block.

    >>> slope([(second, 100 + second / 3600) for second in range(240)])
    Slope(mb_per_hour=1.0, error_mb_per_hour=0.0)
    """
    size = len(points) // BLOCKS
    if size < 2:
        raise ValueError(f"{len(points)} samples are too few for a slope")
    blocks = [points[number * size : (number + 1) * size] for number in range(BLOCKS)]
    hours = [statistics.fmean(at_s for at_s, _ in block) / 3600 for block in blocks]
    sizes = [statistics.fmean(mb for _, mb in block) for block in blocks]
    fit = statistics.linear_regression(hours, sizes)
    left_over = sum((mb - fit.intercept - fit.slope * at) ** 2 for at, mb in zip(hours, sizes, strict=True))
    spread = sum((at - statistics.fmean(hours)) ** 2 for at in hours)
    error = T_95 * math.sqrt(left_over / (BLOCKS - 2) / spread)
    return Slope(round(fit.slope, 6), round(error, 6))


@dataclass(slots=True)
class Books:
    """Everything that was written down."""

    seen: Sequence[Seen]
    usage: Sequence[Mapping[str, Any]]
    """The usage log."""
    counted: Mapping[str, float]
    """`tidegate_requests_total` by outcome."""
    refused: float
    """`tidegate_refused_total`."""
    served: Sequence[Line]
    """What the engines wrote down."""
    problems: list[str] = field(default_factory=list)

    def audit(self) -> dict[str, Any]:
        """Compare all of it: fills `problems`, returns figures."""
        figures = {**self._outcomes(), **self._clients(), **self._tokens()}
        figures["outcomes"] = dict(sorted(Counter(line["outcome"] for line in self.usage).items()))
        return figures

    def _outcomes(self) -> dict[str, Any]:
        ids = Counter(line["id"] for line in self.usage)
        twice = [id_ for id_, count in ids.items() if count > 1]
        if twice:
            self.problems.append(f"{len(twice)} requests are in the usage log twice, such as {twice[0]}")
        logged = Counter(line["outcome"] for line in self.usage)
        if logged != Counter({outcome: round(count) for outcome, count in self.counted.items()}):
            self.problems.append(f"logged {dict(logged)}, counted {dict(self.counted)}")
        if logged["internal"]:
            self.problems.append(f"{logged['internal']} requests failed inside the gateway")
        return {"logged": len(self.usage), "counted": round(sum(self.counted.values())), "refused": round(self.refused)}

    def _clients(self) -> dict[str, Any]:
        """Each client's own end against the log's."""
        by_id = {line["id"]: line for line in self.usage}
        for each in self.seen:
            self._judge(each, by_id.get(each.id))
        answered = {each.id for each in self.seen if each.id}
        unseen = sum(line["id"] not in answered for line in self.usage)
        silent = sum(not each.id and each.sent for each in self.seen)
        refused_to_face = sum(bool(each.id) and each.id not in by_id for each in self.seen)
        in_silence = round(self.refused) - refused_to_face
        vanished = silent - unseen - in_silence
        if in_silence < 0:
            self.problems.append(f"{refused_to_face} clients were refused, {self.refused:g} counted")
        if vanished < 0:
            self.problems.append(f"{-vanished} more requests are on record than clients have sent")
        return {
            "sent": sum(each.sent for each in self.seen),
            "given_up_while_sending": sum(not each.sent for each in self.seen),
            "left_before_any_answer": silent,
            "vanished": vanished,
        }

    def _judge(self, each: Seen, line: Mapping[str, Any] | None) -> None:
        wrong = each.state in ("wrong", "unreachable") or (each.state == "broken" and each.way not in MAY_BE_CUT)
        if not wrong and line is not None:
            wrong = (each.state == "completed") != (line["outcome"] == "completed") and each.state not in (
                "left",
                "broken",
            )
        if wrong:
            said = "" if line is None else f", the log says {line['outcome']} {line['error_code']}"
            self.problems.append(f"{each.way}: {each.state} {each.status} after {each.took_s:.1f} s{said}")
        if line is not None and each.state == "completed" and each.completion_tokens is not None:
            told = each.prompt_tokens, each.completion_tokens
            if told != (line["prompt_tokens"], line["completion_tokens"]):
                self.problems.append(f"{each.way}: told {told}, charged {line}")

    def _tokens(self) -> dict[str, Any]:
        """Complete answers to the token; of broken ones, how the estimate lies to what was passed on and planned."""
        planned: dict[str, int] = {}
        served: dict[str, int] = {}
        for line in self.served:
            if line.status == 200:
                (served if line.event == "answered" else planned)[line.id] = line.tokens
        exact = wrong = estimated = passed_on = could_be = 0
        for record in self.usage:
            charged = record["completion_tokens"]
            if record["outcome"] == "completed" and not record["usage_estimated"]:
                exact += charged
                if charged != served.get(record["id"]):
                    wrong += 1
            elif charged:
                estimated += charged
                passed_on += record["content_events"]
                could_be += planned.get(record["id"], 0)
        if wrong:
            self.problems.append(f"{wrong} complete answers are charged with other tokens than were served")
        return {
            "tokens_exact": exact,
            "tokens_estimated": estimated,
            "events_of_broken": passed_on,
            "planned_of_broken": could_be,
        }
