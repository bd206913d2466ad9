"""What a policy proper is. In a file of its own, since it is never compiled (docs/adr/0014): what is not cannot
inherit from a compiled protocol, and users' policies may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # which import this module
    from routing.types import InferenceRequest, Replica, View


class Chooser(Protocol):
    """A policy proper: picks one of the candidates, all of which may be used. Synchronous, without I/O or clock.

    Called once per decision that is acted on, so it may keep state; hard rules are not its business. To explain a
    decision a deep copy of it is asked, or what its method `rehearsal()` returns, if it has one.
    """

    name: str
    wants_prefix: bool
    """Whether it looks at `View.matches`.

    A policy may also have `weighs_adapters = True`: it counts what loading a LoRA adapter costs. For any other one,
    requests go where their adapter is as long as a replica that has it may be used.
    """

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica: ...
