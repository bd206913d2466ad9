"""The index against a model that is slow and plain: lists in order of use, searched from one end to the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from xxhash import xxh3_64_intdigest

from routing.beliefs import SLACK, rounded
from routing.index import PrefixIndex
from routing.prefix import Digest, Prefix

UNIT_TOKENS = 0.25
SLOTS = 4
MAX_KEYS = 60


def key(path: tuple[int, ...]) -> Digest:
    return xxh3_64_intdigest(bytes(path))


def prefix(path: tuple[int, ...], rest: int) -> Prefix:
    """A prompt whose text up to the n-th checkpoint is `path[:n]`, and then `rest` bytes more; its tails are the whole
    prompt and the prompts of the same rest before it."""
    digests = [key(path[: number + 1]) for number in range(len(path))]
    ends = [512 * (number + 1) for number in range(len(path))]
    tails = [
        (key((*path[:number], 255, rest)), 512 * number + rest)
        for number in range(len(path), max(-1, len(path) - 3), -1)
    ]
    return Prefix(digests, ends, 512 * len(path) + rest, tails, UNIT_TOKENS)


PROMPTS = st.builds(
    prefix,
    st.lists(st.integers(0, 2), max_size=7).map(tuple),
    st.sampled_from([40, 200]),
)


@dataclass
class Entry:
    digest: Digest
    tokens: int
    shared: bool = False
    confirmed: bool = False


@dataclass
class Model:
    """One slot: entries, the oldest first."""

    budget: int
    entries: list[Entry] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(each.tokens for each in self.entries)

    def get(self, digest: Digest) -> Entry | None:
        return next((each for each in self.entries if each.digest == digest), None)

    def holds(self, digest: Digest) -> bool:
        return self.get(digest) is not None

    def use(self, digest: Digest, tokens: int, confirmed: bool) -> bool:
        entry = self.get(digest)
        if entry is None:
            self.entries.append(Entry(digest, tokens, confirmed=confirmed))
            return True
        self.entries.remove(entry)
        self.entries.append(entry)
        entry.shared = True
        entry.confirmed |= confirmed
        return False

    def give_up(self, tokens: int) -> None:
        while tokens > 0 and self.entries:
            tokens -= self.entries.pop(0).tokens

    def fit(self) -> None:
        if self.tokens > self.budget:
            self.give_up(self.tokens - self.budget + self.budget // SLACK)

    def match(self, prefix: Prefix) -> tuple[int, bool]:
        """Whose every checkpoint is held; and whether no later checkpoint or tail is held without one before it."""
        end = 0
        whole = True
        for digest, position in zip(prefix.digests, prefix.ends, strict=True):
            if self.holds(digest):
                whole = whole and end == position - 512
                end = position if whole else end
            elif whole:
                whole = not any(self.holds(each) for each in prefix.digests[prefix.digests.index(digest) :])
                break
        for digest, position in prefix.tails:
            if self.holds(digest):
                whole = whole and position // 512 * 512 <= end
                end = max(end, position)
        return end, whole


class Comparison(RuleBasedStateMachine):
    """Every rule is done to both."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(MAX_KEYS)
        self.models: dict[int, Model] = {}
        self.added: list[tuple[int, tuple[Digest, ...]]] = []

    @initialize()
    def begin(self) -> None:
        self.add_target(1000)

    @rule(budget=st.sampled_from([400, 1000, 3000]))
    def add_target(self, budget: int) -> None:
        if len(self.models) < SLOTS:
            slot = self.index.add_target(budget)
            assert slot == min(set(range(SLOTS)) - set(self.models))
            self.models[slot] = Model(budget)

    def slot(self, data: st.DataObject) -> int | None:
        return data.draw(st.sampled_from(sorted(self.models))) if self.models else None

    @rule(data=st.data())
    def remove_target(self, data: st.DataObject) -> None:
        if len(self.models) > 1 and (slot := self.slot(data)) is not None:
            self.index.remove_target(slot)
            del self.models[slot]
            self.added = [each for each in self.added if each[0] != slot]

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        if (slot := self.slot(data)) is not None:
            self.index.reset(slot)
            self.models[slot].entries.clear()

    @rule(data=st.data(), budget=st.sampled_from([200, 1000, 3000]))
    def resize(self, data: st.DataObject, budget: int) -> None:
        if (slot := self.slot(data)) is not None:
            self.index.resize(slot, budget)
            self.models[slot].budget = budget
            self.models[slot].fit()

    @rule(data=st.data(), prompt=PROMPTS)
    def insert(self, data: st.DataObject, prompt: Prefix) -> None:
        slot = self.slot(data)
        if slot is None:
            return
        model = self.models[slot]
        keys = [prompt.tails[0], *reversed(list(zip(prompt.digests, prompt.ends, strict=True)))]
        expected = []
        for digest, end in keys:
            begin = max([each for each in prompt.ends if each < end], default=0)
            if model.use(digest, rounded((end - begin) * UNIT_TOKENS), confirmed=False):
                expected.append(digest)
        model.fit()
        self.keep_cap()
        new = self.index.insert(slot, prompt)
        assert list(new) == [each for each in expected if model.holds(each)]
        assert not set(new) & set(self.index.renewed)
        self.added.append((slot, new))
        self.match(prompt)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if self.added:
            slot, new = self.added.pop(data.draw(st.integers(0, len(self.added) - 1)))
            self.index.drop(slot, new)
            model = self.models[slot]
            model.entries = [each for each in model.entries if each.digest not in new or each.shared or each.confirmed]

    @rule(data=st.data())
    def tell(self, data: st.DataObject) -> None:
        """What one replica holds is said of another, as peers do."""
        if len(self.models) > 1 and (slot := self.slot(data)) is not None:
            other = self.slot(data)
            confirmed = data.draw(st.booleans())
            assert other is not None
            digests, tokens = self.index.held(other)
            self.index.add(slot, digests, tokens, confirmed)
            for digest, weight in zip(digests, tokens, strict=True):
                self.models[slot].use(digest, weight, confirmed)
            self.models[slot].fit()
            self.keep_cap()

    @rule(data=st.data(), tokens=st.integers(0, 800))
    def evict(self, data: st.DataObject, tokens: int) -> None:
        if (slot := self.slot(data)) is not None:
            self.index.evict(slot, tokens)
            self.models[slot].give_up(tokens)

    @rule(data=st.data(), prompt=PROMPTS)
    def discard(self, data: st.DataObject, prompt: Prefix) -> None:
        if (slot := self.slot(data)) is not None:
            self.index.discard(slot, prompt.digests[-2:])
            model = self.models[slot]
            model.entries = [
                each for each in model.entries if each.digest not in prompt.digests[-2:] or not each.confirmed
            ]

    @rule(prompt=PROMPTS)
    def ask(self, prompt: Prefix) -> None:
        self.match(prompt)

    def match(self, prompt: Prefix) -> None:
        found = self.index.match(prompt)
        assert 0 not in found.values()
        assert set(found) <= set(self.models)
        for slot, model in self.models.items():
            expected, whole = model.match(prompt)
            if whole:
                assert found.get(slot, 0) == expected
            elif found.get(slot, 0):
                held = [*zip(prompt.digests, prompt.ends, strict=True), *prompt.tails]
                assert any(end == found[slot] and model.holds(digest) for digest, end in held)

    def keep_cap(self) -> None:
        while (over := sum(len(each.entries) for each in self.models.values()) - MAX_KEYS) > 0:
            fullest = max(self.models.values(), key=lambda each: len(each.entries))
            del fullest.entries[: max(over, len(fullest.entries) // 64)]

    @invariant()
    def same_keys_in_the_same_order(self) -> None:
        stats = self.index.stats()
        assert stats.pairs == sum(len(each.entries) for each in self.models.values()) <= MAX_KEYS
        for slot, model in self.models.items():
            digests, tokens = self.index.held(slot)
            assert digests == [each.digest for each in model.entries]
            assert tokens == [each.tokens for each in model.entries]
            assert stats.targets[slot].tokens == model.tokens <= model.budget
            assert self.index.weights(slot, digests) == tokens


class ComparisonOfMasks(Comparison):
    """The same where two holders are many, so that masks are made and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(MAX_KEYS, many=2)

    @initialize()
    def begin(self) -> None:
        for budget in (400, 1000, 3000, 3000):
            self.add_target(budget)


TestComparison = Comparison.TestCase
TestComparison.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestComparisonOfMasks = ComparisonOfMasks.TestCase
TestComparisonOfMasks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
