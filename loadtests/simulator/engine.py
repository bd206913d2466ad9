"""A model of one inference engine at the level of its iterations.

    step = step_ms + request_ms * running + kv_ms * context tokens of those that decode
         + prefill_ms * prompt tokens in the step, each times (1 + curve * its position)

Every step gives each decoding request one token and takes up to `chunk` prompt tokens, first come first served
(chunked prefill, as vLLM's and SGLang's schedulers mix it). A prompt is admitted when its uncached tokens fit into
the KV cache, of which a hundredth is kept for what is decoded. When that runs out as well, the request that was
admitted last is put back and computed again later, its cached part excepted. A LoRA adapter that is not in memory is
loaded before the request can begin; meanwhile the engine stands still, as vLLM's and SGLang's do. While all slots are
in use others pass, but not for ever: in the end the adapter that is there for longest takes no further requests, until
its slot is free (`routing.adapters.next_to_go`).

Where nothing changes from step to step, the engine jumps: the time of n decode steps has a closed form.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from math import sqrt
from typing import Any

from loadtests.simulator.cache import Cache, Path
from loadtests.simulator.traffic import Job

WATERMARK = 0.01
"""Share of the KV cache that no prompt is admitted into: vLLM's."""
PATIENCE_LOADS = 10.0
"""How long a request waits for a slot while others pass, in times of loading (`routing.adapters.HOLD_LOADS`)."""


@dataclass(frozen=True, slots=True)
class Constants:
    """Times in milliseconds; see the module."""

    prefill_ms: float = 0.04
    curve: float = 3.3e-5
    step_ms: float = 8.0
    request_ms: float = 0.05
    kv_ms: float = 4e-5
    chunk: int = 2048
    kv_tokens: int = 400_000
    max_running: int = 256
    adapter_slots: int = 0
    adapter_ms: float = 250.0

    @property
    def adapters(self) -> bool:
        return self.adapter_slots > 0


class Sequence:
    """One request inside an engine."""

    __slots__ = (
        "adapter",
        "cached",
        "dead",
        "depth",
        "done",
        "entry",
        "finish_step",
        "first",
        "generated",
        "job",
        "joined_step",
        "path",
        "private",
        "prompt",
        "segment_at",
        "since",
        "tag",
    )

    def __init__(self, job: Job, tag: Any) -> None:
        self.job = job
        self.tag = tag
        """The caller's."""
        self.path: Path = job.path
        self.prompt = job.prompt_tokens
        self.adapter = job.adapter
        self.cached = -1
        """Prompt tokens that were found in the cache when it was admitted first."""
        self.done = 0
        """Prompt tokens that are computed."""
        self.depth = 0
        """Nodes of the path that it keeps."""
        self.segment_at = 0
        """Position where the segment after those begins."""
        self.private = 0
        """KV tokens that it holds outside the tree; those it decodes are counted by the engine."""
        self.generated = 0
        self.since = 0.0
        """When it arrived."""
        self.joined_step = 0
        self.finish_step = 0
        self.entry = 0
        self.first = False
        self.dead = False


class Engine:
    """One engine. The caller calls `wake` whenever the time that `plan` returned has come, unless a later call returned
    another one. All times in seconds.
    """

    def __init__(
        self,
        constants: Constants,
        on_first: Callable[[Sequence, float], None],
        on_finish: Callable[[Sequence, float], None],
        *,
        jump: bool = True,
    ) -> None:
        self.constants = constants
        self.cache = Cache()
        self.slowness = 1.0
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.decoding = 0
        self.private = 0
        """KV tokens outside the tree."""
        self.context = 0
        """Tokens that decoding requests look back at."""
        self.loaded: dict[str, int] = {}
        """Adapters in memory, the least recently used first, and how many running requests use each."""
        self._loaded_at: dict[str, float] = {}
        self.adapter_loads = 0
        self.preemptions = 0
        self.prefilled_tokens = 0
        self.prefill_busy_ms = 0.0
        self.busy_s = 0.0
        self.step = 0
        self._jump = jump
        self._on_first = on_first
        self._on_finish = on_finish
        self._finishing: list[tuple[int, int, Sequence]] = []
        self._entries = 0
        self._begun = 0.0
        self._steps = 0
        """Of the run that is under way; 0: idle."""
        self._step_ms = 0.0
        self._growth_ms = 0.0
        self._chunk: list[tuple[Sequence, int]] = []
        self._load_ms = 0.0

    @property
    def busy(self) -> bool:
        return self._steps > 0

    @property
    def running(self) -> int:
        return self.decoding + len(self.prefilling)

    @property
    def used_tokens(self) -> int:
        """KV tokens of running requests."""
        return self.private + self.cache.locked

    def submit(self, sequence: Sequence, now: float) -> float | None:
        """A request arrives. Returns when to wake the engine, None: as planned before."""
        sequence.since = now
        self.waiting.append(sequence)
        return self.interrupt(now) if self._steps else self._plan(now)

    def interrupt(self, now: float) -> float | None:
        """Something has changed that the next step heeds: a jump that is under way is cut short there. When to wake."""
        if self._steps > 1:
            steps = self._steps_until(now)
            if steps < self._steps:
                self._steps = steps
                return self._begun + self._elapsed_ms(steps) / 1000.0
        return None

    def wake(self, now: float) -> float | None:
        """The planned steps are done. Returns when to wake it again, None: when something is submitted."""
        steps = self._steps
        self._steps = 0
        self.busy_s += now - self._begun
        self.step += steps
        self.private += self.decoding * steps
        self.context += self.decoding * steps
        over = self.private + self.cache.tokens - self.constants.kv_tokens
        if over > 0:
            self.cache.evict(over)
        if self._chunk:
            self._prefilled(now)
        finishing, step = self._finishing, self.step
        while finishing and finishing[0][0] <= step:
            _, _, sequence = heappop(finishing)
            if not sequence.dead:
                self._finish(sequence, now)
        return self._plan(now)

    def crash(self) -> list[Sequence]:
        """Everything in it is lost. Returns the requests it had."""
        lost = [*self.waiting, *self.prefilling, *(each for _, _, each in self._finishing if not each.dead)]
        for each in lost:
            each.dead = True
        self.waiting.clear()
        self.prefilling.clear()
        self._finishing.clear()
        self._chunk.clear()
        self.cache = Cache()
        self.decoding = self.private = self.context = self._steps = 0
        self.loaded.clear()
        self._loaded_at.clear()
        return lost

    # --- planning

    def _plan(self, now: float) -> float | None:
        if self.waiting:
            self._admit(now)
        constants = self.constants
        decoding = self.decoding
        free = constants.kv_tokens - self.private - self.cache.locked
        while decoding > free and decoding > 1:
            self._preempt()
            decoding = self.decoding
            free = constants.kv_tokens - self.private - self.cache.locked
        running = decoding + len(self.prefilling)
        if not running:
            return None
        step_ms = constants.step_ms + constants.request_ms * running + constants.kv_ms * self.context
        growth_ms = constants.kv_ms * decoding
        self._begun = now
        if self.prefilling:
            prefill_ms = self._take_chunk(constants.chunk - decoding)
            self.prefill_busy_ms += prefill_ms * self.slowness
            step_ms += prefill_ms
            steps = 1
        else:
            steps = self._finishing[0][0] - self.step
            if not self._jump:
                steps = 1
            elif steps * decoding > free:
                steps = max(1, free // decoding)
        step_ms += self._load_ms  # only ever with a prompt to prefill
        self._load_ms = 0.0
        self._step_ms = step_ms * self.slowness
        self._growth_ms = growth_ms * self.slowness
        self._steps = steps
        return now + self._elapsed_ms(steps) / 1000.0

    def _elapsed_ms(self, steps: int) -> float:
        return steps * self._step_ms + self._growth_ms * (steps * (steps - 1) // 2)

    def _steps_until(self, now: float) -> int:
        """Fewest steps of this run that end at `now` or later."""
        elapsed_ms = (now - self._begun) * 1000.0
        first, growth = self._step_ms, self._growth_ms
        if growth > 0.0:
            half = first - 0.5 * growth
            steps = int((sqrt(half * half + 2.0 * growth * elapsed_ms) - half) / growth)
        else:
            steps = int(elapsed_ms / first)
        steps = max(1, steps - 1)
        while self._begun + self._elapsed_ms(steps) / 1000.0 < now:
            steps += 1
        return steps

    def _admit(self, now: float) -> None:
        constants, cache, waiting = self.constants, self.cache, self.waiting
        room = constants.kv_tokens - self.private - int(WATERMARK * constants.kv_tokens)
        # No further than this step's prompt tokens go: what waits until there are some left finds more in the cache.
        budget = constants.chunk - self.decoding - sum(each.prompt - each.done for each in self.prefilling)
        without_slot: list[Sequence] = []
        closing = ""
        while budget > 0 and waiting and self.decoding + len(self.prefilling) < constants.max_running:
            sequence = waiting[0]
            adapter = sequence.adapter
            if adapter is not None and constants.adapters:
                fits = self._adapter_fits(adapter)
                if not fits and not closing and now - sequence.since > PATIENCE_LOADS * constants.adapter_ms / 1000.0:
                    closing = min(self._loaded_at, key=self._loaded_at.__getitem__)
                if not fits or adapter == closing:
                    without_slot.append(waiting.popleft())
                    continue
            cached, depth = cache.match(sequence.path)
            cached = min(cached, sequence.prompt - 1)
            cache.lock(sequence.path, 0, depth)
            needed = sequence.prompt - cached
            if needed > room - cache.locked and self.running:
                cache.unlock(sequence.path, depth)
                break
            waiting.popleft()
            if adapter is not None and constants.adapters:
                self._use_adapter(adapter, now)
            room -= needed
            budget -= needed
            self.private += needed
            over = self.private + cache.tokens - constants.kv_tokens
            if over > 0:
                cache.evict(over)
            sequence.private = needed
            sequence.done = cached
            sequence.depth = depth
            sequence.segment_at = sum(length for _, length in sequence.path[: max(0, depth - 1)])
            if sequence.cached < 0:
                sequence.cached = cached
            self.prefilling.append(sequence)
        waiting.extendleft(reversed(without_slot))

    def _take_chunk(self, budget: int) -> float:
        """Choose the prompt tokens of the next step; their milliseconds."""
        constants = self.constants
        curve = constants.curve
        chunk = self._chunk
        budget = max(budget, 1)
        total = 0.0
        for sequence in self.prefilling:
            left = sequence.prompt - sequence.done
            take = left if left < budget else budget
            chunk.append((sequence, take))
            total += take * (1.0 + curve * (sequence.done + 0.5 * take))
            self.prefilled_tokens += take
            budget -= take
            if not budget:
                break
        return total * constants.prefill_ms

    # --- what a step has done

    def _prefilled(self, now: float) -> None:
        """The prompt tokens of the step are in the cache; who has all of them has its first token, too."""
        chunk, self._chunk = self._chunk, []
        for sequence, take in chunk:
            if sequence.dead:
                continue
            sequence.done += take
            self._keep(sequence, take)
            if sequence.done < sequence.prompt:
                continue
            self.prefilling.remove(sequence)
            sequence.generated += 1
            sequence.private += 1
            self.private += 1
            if not sequence.first:
                sequence.first = True
                self._on_first(sequence, now)
            left = sequence.job.output_tokens - sequence.generated
            sequence.joined_step = self.step
            self.decoding += 1
            self.context += sequence.prompt + 1
            self._entries += 1
            sequence.entry = self._entries
            sequence.finish_step = self.step + left
            if left <= 0:
                self._finish(sequence, now)
            else:
                heappush(self._finishing, (sequence.finish_step, sequence.entry, sequence))

    def _keep(self, sequence: Sequence, tokens: int) -> None:
        """Move computed prompt tokens from the request's own to the tree; what another has put there first is freed."""
        cache, path = self.cache, sequence.path
        self.private -= tokens
        sequence.private -= tokens
        number = max(0, sequence.depth - 1)
        begin, done = sequence.segment_at, sequence.done
        while True:
            segment, length = path[number]
            held = min(length, done - begin)
            cache.extend(segment, path[number - 1][0] if number else None, held)
            if number >= sequence.depth:
                cache.lock(path, number, number + 1)
                sequence.depth = number + 1
            if done <= begin + length:
                break
            begin += length
            number += 1
        sequence.segment_at = begin

    def _finish(self, sequence: Sequence, now: float) -> None:
        sequence.dead = True
        self._leave(sequence)
        self._on_finish(sequence, now)

    def _leave(self, sequence: Sequence) -> None:
        """It decodes no longer; its answer so far stays in the cache."""
        decoded = self.step - sequence.joined_step
        self.decoding -= 1
        self.context -= sequence.prompt + 1 + decoded
        self.private -= sequence.private + decoded
        path, answer = sequence.path, sequence.job.answer
        if path[-1][0] != answer:
            path = sequence.path = (*path, (answer, sequence.generated + decoded))
        before = path[-2][0]
        self.cache.extend(answer, before, sequence.generated + decoded)
        self.cache.lock(path, sequence.depth, len(path))
        self.cache.unlock(path, len(path))
        adapter = sequence.adapter
        if adapter is not None and adapter in self.loaded:
            self.loaded[adapter] -= 1

    def _preempt(self) -> None:
        """The KV cache is full: who was admitted last waits again."""
        live = [each for each in self._finishing if not each[2].dead]
        victim = max(live, key=lambda each: each[1])[2]
        self._finishing = [each for each in live if each[2] is not victim]
        self._finishing.sort()
        self.preemptions += 1
        decoded = self.step - victim.joined_step
        self._leave(victim)
        victim.generated += decoded
        victim.path = (*victim.path[:-1], (victim.job.answer, victim.generated))
        victim.prompt = victim.job.prompt_tokens + victim.generated
        victim.done = victim.depth = victim.private = 0
        self.waiting.appendleft(victim)

    # --- adapters

    def _adapter_fits(self, adapter: str) -> bool:
        loaded = self.loaded
        return adapter in loaded or len(loaded) < self.constants.adapter_slots or not all(loaded.values())

    def _use_adapter(self, adapter: str, now: float) -> None:
        loaded = self.loaded
        uses = loaded.pop(adapter, None)
        if uses is None:
            if len(loaded) >= self.constants.adapter_slots:
                idle = next(name for name, count in loaded.items() if not count)
                del loaded[idle], self._loaded_at[idle]
            self._loaded_at[adapter] = now
            self.adapter_loads += 1
            self._load_ms += self.constants.adapter_ms
        loaded[adapter] = (uses or 0) + 1
