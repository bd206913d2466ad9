"""Two attempts at one answer, at once or one after the other, when they meet at the worst moment."""

from __future__ import annotations

import gateway.exchange as ex, gateway.answers as an, traceback
from gateway.leg import Leg
orig=an.note_departure
def nd(exchange, relay):
    orig(exchange, relay)
    leg=relay.leg if relay else None
    if str(exchange.outcome)=='completed' and not exchange.content_events and leg and not leg.passing:
        print("ND", exchange.request_id, leg.completed, leg.whole, leg.passing, leg.reader, leg._status, leg._body_bytes, leg._done, leg.dispatched_at, getattr(leg,'_tb',None))
ex.note_departure=nd
r0=Leg.resolve
TB={}
def res(self,result):
    TB[id(self)]=''.join(traceback.format_stack(limit=7)); 
    if result is not None and result.status==200: print("RES200", result.headers, result.body[:200])
    r0(self,result)
Leg.resolve=res

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from backends.dialects.protocol import Fault
from backends.errors import Disconnected
from gateway.record import Outcome
from gateway.relay import Relay
from gateway.upstream_errors import from_status
from loadtests.behaviour import Behaviour
from loadtests.counting import counted
from loadtests.engine import FakeEngine
from loadtests.rawclient import Reply
from tests.support.client import until
from tests.support.http import ask, streaming
from tests.support.serving import Serving, serving, settings_for

PIECES = 40
DELAY_S = 0.05
STREAM = {"model": "m", "messages": [{"role": "user", "content": "count"}], "stream": True}
EDGES = pytest.mark.parametrize("edge", ["protocol", "asgi"])


@dataclass
class Hedged:
    """A gateway that sends late requests to a second replica; all come to the first as long as it is there."""

    gateway: Serving
    engines: list[FakeEngine]

    @property
    def relay(self) -> Relay:
        (relay,) = self.gateway.runtime._relays
        return relay

    async def at_rest(self) -> None:
        replicas = self.gateway.runtime.fleet.pools["pool"].replicas
        await until(lambda: [each.in_flight for each in replicas] == list(range(len(replicas))), 10.0)


@asynccontextmanager
async def hedged(*scripts: Behaviour, continuation: bool = False, edge: str = "protocol") -> AsyncIterator[Hedged]:
    engines = [FakeEngine(script) for script in scripts]
    for engine in engines:
        await engine.start()
    model = {"backend": "pool", "continuation": continuation, "hedge": {"share": 0.5, "min_delay_ms": DELAY_S * 1000}}
    replicas = [{"url": each.url, "max_in_flight": 20} for each in engines]
    pool = {"engine": "sglang", "replicas": replicas, "queue": {"enabled": False}, "connections": {"max": 4}}
    try:
        async with serving(settings_for([], edge=edge, models={"m": model}, backends={"pool": pool})) as gateway:
            found = Hedged(gateway, engines)
            for number, replica in enumerate(gateway.runtime.fleet.pools["pool"].replicas):
                replica.in_flight += number
            hedges = gateway.runtime.fleet.models["m"].hedges
            assert hedges is not None
            for _ in range(128):
                for power in range(14):
                    hedges.note(2**power, 0.001)
            yield found
    finally:
        for engine in engines:
            await engine.stop()


def events(reply: Reply | bytes) -> Iterator[dict[str, Any]]:
    body = reply if isinstance(reply, bytes) else reply.body
    for line in body.decode().replace("\r\n","\n").split("\n\n"):
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def text_of(reply: Reply | bytes) -> str:
    return "".join(
        choice["delta"].get("content") or "" for event in events(reply) for choice in event.get("choices", ())
    )


def counting(**more: Any) -> Behaviour:
    return Behaviour(chunks=PIECES, counting=True, **more)


def in_pieces(tokens: int) -> str:
    """An answer that breaks off, whose chunks tell their tokens as vLLM and SGLang do when they are asked to."""
    head = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    found = ["HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"]
    for number in range(tokens):
        chunk = {
            **head,
            "choices": [{"index": 0, "delta": {"content": f"{number:06d} "}, "finish_reason": None}],
            "usage": {"prompt_tokens": 9, "completion_tokens": number + 1, "total_tokens": number + 10},
        }
        found.append(f"data: {json.dumps(chunk)}\n\n")
    return "".join(found)
import asyncio, json, random, time, os
from dataclasses import replace
import pytest
from loadtests.behaviour import Behaviour
from tests.support.client import connect, post
from loadtests.rawclient import read_reply

SEED=int(os.environ.get("FZ","1"))

@pytest.mark.parametrize("edge",["protocol","asgi"])
@pytest.mark.parametrize("seed",range(SEED,SEED+4))
async def test_fz(edge,seed):
    rng=random.Random(seed)
    engines=[FakeEngine(counting()) for _ in range(4)]
    for e in engines: await e.start()
    def pace(body,behaviour,at):
        k=rng.random()
        ttft=rng.choice([0,0,0.01,0.05,0.08,0.2])
        base=dict(ttft_s=ttft,interval_s=rng.choice([0,0,0.002]))
        n=rng.randrange(0,PIECES)
        if k<.5: return replace(behaviour,**base)
        if k<.62: return replace(behaviour,**base,cut_after=n)
        if k<.68: return replace(behaviour,**base,truncate_after=n)
        if k<.72: return replace(behaviour,**base,error_event_after=n)
        if k<.76: return replace(behaviour,**base,early_done=n)
        if k<.80: return replace(behaviour,**base,hang_mid=n)
        if k<.84: return Behaviour(role_only_then_hang=True)
        if k<.88: return Behaviour(hang=True)
        if k<.92: return Behaviour(status=503,retry_after="0")
        if k<.96: return Behaviour(status=500)
        return replace(behaviour,**base,crlf=True,split=rng.choice([7,50]))
    for e in engines: e.pace=pace
    queue=rng.random()<.5
    model={"backend":"pool","continuation":True,"hedge":{"share":0.5,"max_busy":1.0,"min_delay_ms":30},"price":{"input":1.0,"output":1.0}}
    replicas=[{"url":e.url,"max_in_flight":8} for e in engines]
    pool={"engine":"sglang","replicas":replicas,"queue":{"enabled":queue},"connections":{"max":6},"timeouts":{"first_token_s":0.4,"idle_s":0.4}}
    out={}
    async with serving(settings_for([],edge=edge,models={"m":model},backends={"pool":pool},stream={"hold_s":0.1,"heartbeat_s":0.1})) as gw:
        hedges=gw.runtime.fleet.models["m"].hedges
        async def one(i):
            for _ in range(128//40):
                for p in range(14): hedges.note(2**p,0.001)
            async with connect(gw.host,gw.port) as c:
                await c.send(post(CHATP,STREAM))
                if rng.random()<.2:
                    await asyncio.sleep(rng.random()*0.2); return
                async with asyncio.timeout(30):
                    r=await read_reply(c.reader)
            if r.status!=200:
                out[r.status]=out.get(r.status,0)+1; return
            t=text_of(r)
            assert counted(PIECES).startswith(t),(i,t,r.body[-500:])
            err=b'"error"' in r.body
            assert (r.body.count(b"data: [DONE]"),err) in [(1,False),(0,True)],(r.body[-600:])
            if not err: assert t==counted(PIECES)
            ids={e["id"] for e in events(r) if "error" not in e}
            assert len(ids)<=1
            roles=[1 for e in events(r) for ch in e.get("choices",()) if ch["delta"].get("role")]
            assert len(roles)<=1
            out["err" if err else "ok"]=out.get("err" if err else "ok",0)+1
        for _ in range(12):
            for _ in range(40):
                for p in range(14): hedges.note(2**p,0.001)
            await asyncio.gather(*(one(i) for i in range(12)))
        await gw.settled(100,20)
        assert all(r.in_flight==0 and r.streams==0 for r in gw.runtime.fleet.pools["pool"].replicas)
        assert not gw.runtime.gate.visits and not gw.runtime._relays and not gw.runtime.fallbacks._chains
        for u in gw.runtime.fleet.pools["pool"].upstreams.values():
            await until(lambda: u.pool.active==0, 10)
            assert u.pool.waiting==0
        recs=gw.records
        for r in recs:
            assert r.replica_ttft_s is None or r.replica_ttft_s>=0
            if r.outcome is Outcome.COMPLETED: assert r.usage.completion_tokens==PIECES,repr((r.failures,r.content_events,r.attempts,r.hedged,r.continuations,r.status,r.route_reason,r.duration_s,r.response_bytes,r.replica,r.first_content_at))
        print(edge,seed,out,sum(r.hedged for r in recs),sum(r.continuations for r in recs),{str(r.outcome) for r in recs})
    for e in engines: await e.stop()
CHATP="/v1/chat/completions"
