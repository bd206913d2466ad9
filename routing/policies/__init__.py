"""Policies by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from random import Random
from types import MappingProxyType

from routing.policies.balanced import AtRandom, LeastOutstanding, PowerOfTwo, RoundRobin
from routing.policies.custom import PolicyError, load
from routing.policies.engines import (
    Formula,
    SmgLeastLoad,
    aibrix,
    dynamo,
    least_prefill,
    llmd,
    lmetric,
    ttft,
    vllm_load_aware,
)
from routing.policies.hashing import BoundedHash, ConsistentHash
from routing.policies.sglang import COMMAND_LINE, LIBRARY, CacheAware
from routing.types import Chooser

__all__ = ["POLICY_NAMES", "PolicyError", "make_policy"]


def _cost(rng: Random) -> Chooser:
    from routing.policies.cost import Cost

    return Cost(rng)


_POLICIES: Mapping[str, Callable[[Random], Chooser]] = MappingProxyType(
    {
        "cost": _cost,
        "random": AtRandom,
        "round_robin": RoundRobin,
        "least_outstanding": LeastOutstanding,
        "power_of_two": PowerOfTwo,
        "consistent_hash": ConsistentHash,
        "bounded_hash": BoundedHash,
        "sglang_cache_aware": partial(CacheAware, "sglang_cache_aware", LIBRARY),
        "sglang_cache_aware_cli": partial(CacheAware, "sglang_cache_aware_cli", COMMAND_LINE),
        "dynamo": partial(Formula, "dynamo", dynamo),
        "llmd": partial(Formula, "llmd", llmd),
        "lmetric": partial(Formula, "lmetric", lmetric),
        "aibrix": partial(Formula, "aibrix", aibrix),
        "vllm_load_aware": partial(Formula, "vllm_load_aware", vllm_load_aware),
        "ttft": partial(Formula, "ttft", ttft),
        "smg_least_load": SmgLeastLoad,
        "least_prefill": partial(Formula, "least_prefill", least_prefill),
    }
)

POLICY_NAMES: tuple[str, ...] = tuple(_POLICIES)
"""The default first."""


def make_policy(name: str, rng: Random) -> Chooser:
    """The policy of that name, or the user's own at `package.module:attribute`; new, with state of its own.

    Raises `PolicyError`, which names what is wrong.
    """
    make = _POLICIES.get(name)
    if make is not None:
        return make(rng)
    if ":" in name:
        return load(name, rng)
    raise PolicyError(f"{name}: no such policy; one of {', '.join(POLICY_NAMES)}, or a package.module:attribute")
