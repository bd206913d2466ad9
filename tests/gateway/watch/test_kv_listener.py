"""Which streams a listener makes of what an engine says, and what it forgets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq

from backends.dialects.protocol import KvEventsEndpoint
from backends.kvevents.decode import BlockStored
from backends.kvevents.endpoint import EndpointRefused
from backends.upstream import Upstream
from gateway.config import KvEvents
from gateway.watch.kv_listener import MAX_RANKS, KvListener


@pytest.fixture
def listener() -> Any:
    context: Any = zmq.Context()
    upstream = SimpleNamespace(replica=SimpleNamespace(dp_rank=None), side=SimpleNamespace(host="10.0.0.1"), info=None)
    yield KvListener(cast(Upstream, upstream), KvEvents(endpoint="auto"), context)
    context.term()


def test_an_engine_of_countless_ranks_is_not_believed(listener: Any) -> None:
    assert len(listener._make(KvEventsEndpoint("tcp://*:5557", dp_size=MAX_RANKS))) == MAX_RANKS
    with pytest.raises(EndpointRefused, match="ranks"):
        listener._make(KvEventsEndpoint("tcp://*:1", dp_size=65_000))


def test_nothing_is_kept_of_another_endpoint(listener: Any) -> None:
    listener._subscribers = listener._make(KvEventsEndpoint("tcp://*:5557", dp_size=2))
    listener._view.rank(1).stored(BlockStored((7,), None, (), 16))
    assert listener.summary().blocks == {"GPU": 1}
    listener._subscribers = listener._make(KvEventsEndpoint("tcp://*:6557", dp_size=1))
    assert listener.summary().blocks == {}
    assert set(listener.summary().ranks) == {0}
