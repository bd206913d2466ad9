"""The order of the rules that exclude a replica."""

from __future__ import annotations

from routing.credential import Credential, Credentials
from routing.filters import SOFT, exclusion_reason
from routing.health import HealthState
from routing.types import InferenceRequest, Replica


def replica(**fields: object) -> Replica:
    return Replica("r", "pool", "http://x", "sglang", **fields)  # type: ignore[arg-type]


def request(adapter: str | None = None, *regions: str) -> InferenceRequest:
    return InferenceRequest("req_1", "m", stream=False, prompt_bytes=1, regions=regions, adapter=adapter)


def test_an_adapter_must_be_known_to_be_resident() -> None:
    holder, other, unknown = replica(adapters=frozenset({"french"})), replica(adapters=frozenset()), replica()
    assert exclusion_reason(request("french"), holder, 0.0, ()) is None
    assert exclusion_reason(request("french"), other, 0.0, ()) == "adapter"
    assert exclusion_reason(request("french"), unknown, 0.0, ()) == "adapter"
    assert exclusion_reason(request(), other, 0.0, ()) is None


def test_facts_are_named_before_suspicions_so_that_panic_cannot_overrule_them() -> None:
    credential = Credentials([Credential()])
    credential.refused(0.0)
    one = replica(
        region="mars", adapters=frozenset(), draining=True, max_in_flight=1, in_flight=1, credential=credential
    )
    one.cooldown.failed(0.0)

    def reason() -> str | None:
        return exclusion_reason(request("french", "eu"), one, 0.1, tried)

    tried = [one]
    assert reason() == "region"
    one.region = "eu"
    assert reason() == "adapter"
    one.adapters = frozenset({"french"})
    assert reason() == "already_tried"
    tried = []
    assert reason() == "draining"
    one.draining = False
    assert reason() == "full"
    one.in_flight = 0
    assert reason() == "credential_refused"
    credential.accepted()
    assert reason() == "cooling_down"


def test_every_state_that_excludes_is_soft() -> None:
    assert {str(state) for state in HealthState} - {"healthy", "warming"} == SOFT
