"""Which streams a listener makes of what an engine says, and what it forgets."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import zmq

from backends.dialects.protocol import KvEventsEndpoint
from backends.kvevents.decode import BlockStored
from backends.kvevents.endpoint import EndpointRefused
from backends.signals import Signals
from backends.upstream import Upstream
from gateway.config import KvEvents
from gateway.watch.kv_listener import MAX_RANKS, KvListener
from routing.keys import seed_of, token_prefix
from routing.router import PoolState
from routing.types import Replica
from tests.backends.kvevents.publisher import CLEARED, Publisher, removed, stored
from tests.gateway.watch.test_watcher import until


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


@pytest.mark.parametrize("replay", [True, False])
async def test_routing_follows_an_engines_cache_and_doubt_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, replay: bool
) -> None:
    caplog.set_level(logging.INFO)
    seed = seed_of("m")
    asked = token_prefix([7] * 512, seed)
    state, replica = PoolState(), Replica("r", "pool", "http://r", "vllm")
    signals = Signals("r")
    upstream = SimpleNamespace(replica=replica, side=SimpleNamespace(host=None), info=None, signals=signals)
    path = str(tmp_path / "kv")
    chosen = KvEvents(endpoint=f"ipc://{path}", replay_endpoint=f"ipc://{path}r" if replay else None)
    with zmq.Context() as context, Publisher(path, replay=replay) as engine:
        engine.publish(stored(1, 2, tokens=128, token_ids=[7] * 256))
        listener = KvListener(cast(Upstream, upstream), chosen, cast(Any, context), state, lambda adapter, salt: seed)
        task = asyncio.create_task(listener.run())
        try:
            await until(lambda: replica in state.slots, 20)
            slot = state.slots[replica]

            def match() -> int:
                return state.index.match(asked).get(slot, 0)

            if replay:
                await until(lambda: match() == 256, 20)
                await until(lambda: listener.summary().trusted, 20)
                assert not signals.lacking
            else:
                # Nobody can tell when a subscription has reached the publisher.
                while not signals.lacking:
                    await asyncio.to_thread(engine.publish, stored(90, tokens=128))
                    await asyncio.sleep(0.01)
                assert "late join" in signals.lacking["kv_events"]
                await asyncio.to_thread(engine.publish, stored(1, 2, tokens=128, token_ids=[7] * 256))
            await asyncio.to_thread(
                engine.publish, stored(3, 4, tokens=128, token_ids=[7] * 256, parent_block_hash=2), removed(4)
            )
            await until(lambda: match() == 384, 20)
            await asyncio.to_thread(engine.publish, CLEARED)
            await until(lambda: match() == 0, 20)
            await until(lambda: listener.summary().trusted and not signals.lacking, 20)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    assert len([each for each in caplog.messages if "gives no kv_events" in each]) == (0 if replay else 1)
