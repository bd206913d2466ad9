"""The smallest set-up that serves a question, how many replicas it takes, and why smaller ones do not."""

from __future__ import annotations

import math
from dataclasses import dataclass

from backends.plan.errors import PlanError
from backends.plan.fit import Placement, Question, counted, place
from backends.plan.gpus import Gpu
from backends.plan.splits import candidates, problems

MAX_NODES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """For one kind of GPU: the smallest replica that fits, the one to take, and why smaller ones do not fit."""

    gpu: Gpu
    question: Question
    available: int | None  # GPUs there are; None: as many as it takes
    smallest: Placement | None
    chosen: Placement | None
    refused: tuple[str, ...]  # for each smaller set-up why not, in order of size

    @property
    def replicas_per_node(self) -> int:
        """Replicas on one machine; 0 where one needs several machines, or nothing fits."""
        return 0 if self.chosen is None else self.gpu.per_node // self.chosen.gpus

    @property
    def replicas(self) -> int:
        """As many as the GPUs there are make up, else as many as serve the concurrency; 0 where nothing fits."""
        if self.chosen is None:
            return 0
        if self.available is not None:
            return self.available // self.chosen.gpus
        return math.ceil(self.question.concurrency / self.chosen.concurrent)

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return 0 if self.chosen is None else self.replicas * self.chosen.gpus

    @property
    def nodes(self) -> int:
        """Machines of all replicas."""
        if self.chosen is None:
            return 0
        return (
            math.ceil(self.replicas / self.replicas_per_node)
            if self.replicas_per_node
            else (self.replicas * self.chosen.nodes)
        )

    @property
    def concurrent(self) -> int:
        """Requests of the full context at once, all replicas together."""
        return 0 if self.chosen is None else self.replicas * self.chosen.concurrent


def sizes(gpu: Gpu) -> list[int]:
    """Numbers of GPUs worth trying: powers of two within a machine, then whole machines."""
    within = [2**power for power in range(gpu.per_node.bit_length()) if 2**power <= gpu.per_node]
    return within + [gpu.per_node * nodes for nodes in range(2, MAX_NODES + 1)]


def best(question: Question, gpu: Gpu, gpus: int) -> Placement:
    """The best split of so many GPUs: the first that fits, else the one that comes closest."""
    tried = [
        place(question, gpu, split)
        for split in candidates(
            gpus, experts=question.model.experts is not None, dp_attention=question.dp_attention and gpus > 1
        )
    ]
    for each in tried:
        if each.fits:
            return each
    accepted = [each for each in tried if not problems(question.model, question.precision, each.split)]
    return max(accepted or tried, key=lambda each: (each.cache_bytes, -each.split.pp))


def advise(question: Question, gpu: Gpu, *, gpus: int | None = None, replica_gpus: int | None = None) -> Advice:
    """What to run the question on.

    With `gpus` that many are there: the smallest replica is taken of which they make up enough for the concurrency,
    else the one with which they serve most. Without, the one that takes fewest GPUs for it. `replica_gpus` says how
    many a replica has instead. Raises `PlanError` for a number of GPUs that no machines make up.
    """
    question.checked()
    for count in (gpus, replica_gpus):
        if count is not None:
            _check(gpu, count)
    if replica_gpus is not None and gpus is not None and replica_gpus > gpus:
        raise PlanError(f"gpus: a replica of {replica_gpus} is more than the {gpus} there are")
    smallest, refused = None, dict[str, None]()  # a set that keeps its order
    fitting: list[Placement] = []
    for count in [replica_gpus] if replica_gpus is not None else sizes(gpu):
        if gpus is not None and count > gpus:
            break
        if smallest is not None and gpus is None and count > max(gpu.per_node, smallest.gpus):
            break  # more machines than it takes are for those who ask for them
        placement = best(question, gpu, count)
        if placement.refused is None:
            smallest = smallest or placement
            fitting.append(placement)
        elif smallest is None:
            refused[placement.refused] = None
    chosen = _choose(question, fitting, gpus)
    return Advice(
        gpu=gpu, question=question, available=gpus, smallest=smallest, chosen=chosen, refused=tuple(refused)
    )  # fmt: skip


def _choose(question: Question, fitting: list[Placement], gpus: int | None) -> Placement | None:
    if not fitting:
        return None
    if gpus is None:
        return min(fitting, key=lambda each: (math.ceil(question.concurrency / each.concurrent) * each.gpus, each.gpus))
    for each in fitting:
        if gpus // each.gpus * each.concurrent >= question.concurrency:
            return each
    return max(fitting, key=lambda each: (gpus // each.gpus * each.concurrent, -each.gpus))


def _check(gpu: Gpu, gpus: int) -> None:
    if gpus < 1 or (gpus > gpu.per_node and gpus % gpu.per_node):
        raise PlanError(f"gpus: {gpus} of {gpu.title} are not whole machines of {gpu.per_node}")
    if gpus > gpu.per_node * MAX_NODES:
        raise PlanError(f"gpus: {counted(gpu, gpus)} are more than {MAX_NODES} machines")
