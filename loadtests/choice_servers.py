"""The servers that were weighed, each with the same trivial handler: read the body, answer 581 bytes.

``python -m loadtests.choice_servers --candidate "uvicorn, httptools, raw ASGI" --port 7500`` serves with one of
them. `loadtests.choices` starts each and reads its CPU time from /proc. The two Tidegate rows are the real edges, with
everything that guards a connection, over an exchange that does nothing but answer.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Literal

import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.order import Call
from gateway.reply import Reply
from gateway.runtime import Runtime
from loadtests.processes import python

REPLY = b'{"id":"chatcmpl-bench","choices":[],"text":"' + b"x" * 535 + b'"}'
HEADERS = [(b"content-type", b"application/json")]
READY = "/livez"


async def raw(scope: Scope, receive: Receive, send: Send) -> None:
    """The least that an ASGI application can do."""
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    length = (b"content-length", b"%d" % len(REPLY))
    await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS, length]})
    await send({"type": "http.response.body", "body": REPLY})


def starlette_app() -> ASGIApp:
    """The same as an ordinary function from request to response."""

    async def answer(request: Request) -> Response:
        await request.body()
        return Response(REPLY, media_type="application/json")

    async def livez(request: Request) -> Response:
        return Response(b"")

    return Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"]), Route(READY, livez)])


async def answer_at_once(call: Call, reply: Reply, runtime: Runtime) -> None:
    """Stands in for `gateway.exchange.serve`."""
    reply.send(200, HEADERS, REPLY)


def _tidegate(edge: Literal["protocol", "asgi"], port: int) -> None:
    from gateway.api import build_app
    from gateway.config import Server, Settings
    from gateway.ledger import Ledger
    from gateway.listener import bind_tcp, inference_listener, listen
    from gateway.metrics import Metrics
    from routing.policies.balanced import LeastOutstanding
    from routing.router import Router

    for module in ("gateway.edges.protocol", "gateway.edges.asgi"):
        importlib.import_module(module).__dict__["serve"] = answer_at_once

    async def main() -> None:
        settings = Settings(server=Server(edge=edge))
        runtime = Runtime(settings, Router(LeastOutstanding(Random(0))), Metrics(), Ledger(None))
        listener, sweep = inference_listener(build_app(runtime), runtime)
        runtime.ticker.add(sweep)
        sock = bind_tcp("127.0.0.1", port, "--port")
        listen([sock])
        await listener.serve([sock])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def _uvicorn(app: ASGIApp, parser: Literal["httptools", "h11"], port: int) -> None:
    uvicorn.run(
        app,
        port=port,
        loop="uvloop",
        http=parser,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )


SERVERS: Mapping[str, Callable[[int], None]] = {
    "Tidegate's protocol edge": lambda port: _tidegate("protocol", port),
    "Tidegate's ASGI edge": lambda port: _tidegate("asgi", port),
    "uvicorn, httptools, raw ASGI": lambda port: _uvicorn(raw, "httptools", port),
    "uvicorn, httptools, Starlette": lambda port: _uvicorn(starlette_app(), "httptools", port),
    "uvicorn, h11, raw ASGI": lambda port: _uvicorn(raw, "h11", port),
}
GRANIAN = "granian, raw ASGI"


def command(candidate: str, port: int) -> list[str]:
    """How to start one; granian wants to be its own program."""
    if candidate != GRANIAN:
        return python("-m", "loadtests.choice_servers", f"--candidate={candidate}", f"--port={port}")
    options: dict[str, Any] = {"interface": "asgi", "workers": 1, "runtime-threads": 1, "loop": "uvloop", "http": 1}
    options |= {"host": "127.0.0.1", "port": port, "log-level": "warning"}
    given = [f"--{name}={value}" for name, value in options.items()]
    return python("-m", "granian", *given, "--no-ws", "loadtests.choice_servers:raw")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.choice_servers", description="HTTP servers.")
    parser.add_argument("--candidate", choices=list(SERVERS), required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(argv)
    SERVERS[options.candidate](options.port)


if __name__ == "__main__":
    main()
