"""What a request is told that was shed: the status is the same, the code names what was short."""

from __future__ import annotations

from gateway.errors import Overloaded
from gateway.overload.levels import Cause


class ShortOfMemory(Overloaded):
    code = "overloaded_memory"


class ShortOfDescriptors(Overloaded):
    code = "overloaded_descriptors"


class ShortOfBytes(Overloaded):
    code = "overloaded_bytes"


class LoopBehind(Overloaded):
    code = "overloaded_event_loop"


SHED: dict[Cause, type[Overloaded]] = {
    Cause.MEMORY: ShortOfMemory,
    Cause.DESCRIPTORS: ShortOfDescriptors,
    Cause.BYTES: ShortOfBytes,
    Cause.LOOP: LoopBehind,
}
