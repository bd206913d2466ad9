"""Generated workloads. Each is a `Source`: so many requests, at so many per second, from one random generator."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate, count
from random import Random

from loadtests.simulator.traffic import Job, Source, Workload, poisson, prefix_of


class Numbers:
    """Numbers of segments, each given out once."""

    def __init__(self) -> None:
        self._next = count(1)

    def __call__(self) -> int:
        return next(self._next)


def zipf(items: int, exponent: float = 1.0) -> list[float]:
    """Cumulated weights of Zipf's law, for `pick`."""
    return list(accumulate(1.0 / rank**exponent for rank in range(1, items + 1)))


def pick(cumulated: Sequence[float], rng: Random) -> int:
    return bisect(cumulated, rng.random() * cumulated[-1])


def around(mean: float, rng: Random, spread: float = 0.5) -> int:
    """A whole number from `mean * (1 - spread)` to `mean * (1 + spread)`."""
    return max(1, int(mean * (1.0 - spread + 2.0 * spread * rng.random())))


def skewed(mean: float, rng: Random, sigma: float = 1.0, most: int = 60_000) -> int:
    """Log-normal, as lengths of prompts and answers are: most are short, few are very long."""
    value = mean * rng.lognormvariate(-0.5 * sigma * sigma, sigma)
    return max(1, min(most, int(value)))


def shared_prefix(
    customers: int = 150, context: int = 6000, question: int = 1200, answer: int = 1000, exponent: float = 0.0
) -> Source:
    """Each request has the context of one customer and a question of its own: llm-d's 150 customers of 6,000 tokens, or
    SGLang's generated-shared-prefix. `exponent` above 0: customers are asked for by Zipf's law."""
    weights = zipf(customers, exponent)

    def make(size: int, per_s: float, rng: Random) -> Workload:
        number = Numbers()
        contexts = [number() for _ in range(customers)]
        jobs: list[Job] = []
        for index, at in enumerate(poisson(size, per_s, rng)):
            asked = around(question, rng, 0.2)
            path = ((contexts[pick(weights, rng)], context), (number(), asked))
            jobs.append(_single(index, at, path, around(answer, rng), number, rng, ends=(context,)))
        return Workload("shared-prefix", jobs)

    return make


def siblings(burst: int = 16, prompt: int = 8000, own: int = 200, answer: int = 200, gap_s: float = 0.005) -> Source:
    """Bursts of requests that share a long prompt nobody has sent before, `gap_s` apart: an agent that fans out."""

    def make(size: int, per_s: float, rng: Random) -> Workload:
        number = Numbers()
        drafts: list[tuple[float, int, int]] = []
        for start in poisson(-(-size // burst), per_s / burst, rng):
            shared = number()
            drafts.extend((start + each * gap_s, shared, number()) for each in range(burst))
        drafts.sort()
        jobs = [
            _single(index, at, ((shared, prompt), (mine, own)), around(answer, rng), number, rng, ends=(prompt,))
            for index, (at, shared, mine) in enumerate(drafts[:size])
        ]
        return Workload("siblings", jobs)

    return make


def distinct(prompt: int = 3000, answer: int = 250, sigma: float = 1.0) -> Source:
    """No two prompts have anything in common."""

    def make(size: int, per_s: float, rng: Random) -> Workload:
        number = Numbers()
        jobs = [
            _single(index, at, ((number(), skewed(prompt, rng, sigma)),), skewed(answer, rng, 0.8, 4000), number, rng)
            for index, at in enumerate(poisson(size, per_s, rng))
        ]
        return Workload("distinct", jobs)

    return make


def output_mix(prompt: int = 1000, short: int = 20, long: int = 1500, told: bool = True) -> Source:
    """Half of the requests want a few tokens, half of them many, and `max_tokens` says so."""

    def make(size: int, per_s: float, rng: Random) -> Workload:
        number = Numbers()
        jobs: list[Job] = []
        for index, at in enumerate(poisson(size, per_s, rng)):
            few = rng.random() < 0.5
            answer = around(short if few else long, rng)
            job = _single(index, at, ((number(), skewed(prompt, rng, 0.8)),), answer, number, rng)
            if told:
                job.max_output_tokens = 2 * short if few else 2 * long
            jobs.append(job)
        return Workload("output-mix", jobs)

    return make


def lora(adapters: int = 64, system: int = 300, prompt: int = 700, answer: int = 150) -> Source:
    """Requests for adapters by Zipf's law; each adapter has its own system prompt, and its own cache."""
    weights = zipf(adapters)
    names = tuple(f"adapter-{each}" for each in range(adapters))

    def make(size: int, per_s: float, rng: Random) -> Workload:
        number = Numbers()
        systems = [number() for _ in range(adapters)]
        jobs: list[Job] = []
        for index, at in enumerate(poisson(size, per_s, rng)):
            which = pick(weights, rng)
            path = ((systems[which], system), (number(), around(prompt, rng)))
            job = _single(index, at, path, around(answer, rng), number, rng, ends=(system,))
            job.adapter = names[which]
            jobs.append(job)
        return Workload("lora", jobs, adapters=names)

    return make


def two_regions(near: str = "us", far: str = "eu", prompt: int = 300, answer: int = 60, share: float = 0.65) -> Source:
    """Short prompts, `share` of them sent in the first region."""

    def make(size: int, per_s: float, rng: Random) -> Workload:
        number = Numbers()
        jobs: list[Job] = []
        for index, at in enumerate(poisson(size, per_s, rng)):
            job = _single(index, at, ((number(), around(prompt, rng)),), around(answer, rng), number, rng)
            job.origin = near if rng.random() < share else far
            jobs.append(job)
        return Workload("two-regions", jobs, slo_ttft_ms=300.0)

    return make


def tiers(ms_per_usd: float = 2e7) -> Source:
    """Half of the requests are a batch job's, to which a dollar is worth much time; the others are people's."""
    inner = distinct(2000, 250)

    def make(size: int, per_s: float, rng: Random) -> Workload:
        workload = inner(size, per_s, rng)
        for job in workload.jobs:
            if rng.random() < 0.5:
                job.ms_per_usd = ms_per_usd
                job.priority = 2
        workload.name = "tiers"
        return workload

    return make


def chats(
    system: int = 800,
    apps: int = 4,
    opening: int = 1200,
    message: int = 150,
    answer: int = 250,
    turns: int = 6,
    pause_s: float = 4.0,
    *,
    paced: bool = False,
    name: str = "chats",
) -> Source:
    """Conversations whose prompts grow by each answer. A user begins to answer when the reply is complete, and takes a
    while; `paced` ones take equally long every time, so that their requests never meet.

    It takes the length of a conversation until as many end as begin; until then nothing is counted.
    """
    token_s = 0.012
    """A guess of the time per token, to lay out the times of a conversation before anybody has answered."""

    def make(size: int, per_s: float, rng: Random) -> Workload:
        number = Numbers()
        systems = [number() for _ in range(apps)]
        typical_s = turns * (pause_s + answer * token_s)
        drafts: list[tuple[float, int, Job]] = []
        start, conversation = 0.0, 0
        until = typical_s + size / per_s
        while start < until:
            start += rng.expovariate(per_s / turns)
            conversation += 1
            length = around(turns, rng, 0.75)
            drafts.extend(_conversation(start, conversation, length, systems[rng.randrange(apps)], number, rng))
        drafts.sort(key=lambda draft: draft[:2])
        return Workload(name, _numbered([job for _, _, job in drafts][:size]), warm_s=typical_s)

    def _conversation(
        at: float, conversation: int, length: int, first: int, number: Numbers, rng: Random
    ) -> list[tuple[float, int, Job]]:
        path: tuple[tuple[int, int], ...] = ((first, system),)
        ends: list[int] = []
        found: list[tuple[float, int, Job]] = []
        session, gateway = f"s{conversation}", rng.random()
        for turn in range(length):
            path = (*path, (number(), skewed(message if turn else opening, rng, 0.7, 20_000)))
            tokens, reply = sum(each for _, each in path), skewed(answer, rng, 0.5, 4000)
            reply_segment = number()
            job = Job(
                0, at, path, tokens, reply, reply_segment, prefix_of(path, ends), session=session, gateway=rng.random()
            )
            job.gateway = gateway if paced else job.gateway
            job.after = turn - 1 if turn else None  # by turn; `_numbered` makes it an index
            found.append((at, conversation, job))
            ends.append(tokens)
            path = (*path, (reply_segment, reply))
            at += pause_s if paced else reply * token_s + 0.3 + rng.expovariate(1.0 / pause_s)
        return found

    return make


def _numbered(jobs: list[Job]) -> list[Job]:
    last: dict[str, int] = {}
    for index, job in enumerate(jobs):
        job.index = index
        session = job.session or ""
        job.after = last.get(session)
        last[session] = index
    return jobs


def _single(
    index: int,
    at: float,
    path: tuple[tuple[int, int], ...],
    answer: int,
    number: Numbers,
    rng: Random,
    ends: Sequence[int] = (),
) -> Job:
    tokens = sum(length for _, length in path)
    return Job(index, at, path, tokens, answer, number(), prefix_of(path, ends), gateway=rng.random())
