"""Experiments 30, 34 and 35: bodies that are too large, compressed, or come in the worst of pieces, both ways."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

from loadtests.hammer_runs import Finding
from tests.faults.conftest import Report
from tests.faults.crowd import Answer
from tests.faults.forms import LONG
from tests.faults.hostile import Holder, good, held, took_ms, until_lost, watched
from tests.faults.rig import Rig, completed, rig
from tests.support.client import post, until

CHAT = "/v1/chat/completions"
MB = 1_000_000
LIMIT = 10_485_760
"""`server.max_body_bytes` by default."""
LATE_MS = 3000.0
"""What a machine with two busy cores may add to the slowest of some dozens of answers. The report has the figure."""


def over(client: Holder) -> bool:
    """It was answered, or cut."""
    return bool(client.data) or client.lost_s is not None


def unsent(client: Holder) -> int:
    return 0 if client.transport is None else client.transport.get_write_buffer_size()


async def upload(found: Rig, head: str, piece: bytes, pieces: int) -> tuple[int, int]:
    """Send a head and a body for as long as the gateway takes it: status, bytes of body that the kernel took."""
    message = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode()
    async with held(found, 1, message) as (client,):
        for _ in range(pieces):
            if over(client):
                break
            client.send(piece)
            await until(lambda: over(client) or unsent(client) <= 262_144, 10.0)
        with contextlib.suppress(TimeoutError):
            await until(lambda: over(client), 10.0)
        return client.status, client.sent_bytes - len(message)


async def test_30_bodies_of_100_megabytes(tmp_path: Path, report: Report) -> None:
    piece = b" " * 65_536
    pieces = 100 * MB // len(piece)
    chunk = b"%x\r\n%b\r\n" % (len(piece), piece)
    async with rig(tmp_path, replicas=1, server={"port": 0, "body_timeout_s": 1}) as found:
        async with watched(found) as watch:
            declared = await upload(found, "Content-Length: 100000000", piece, 0)
            insisting = await upload(found, "Content-Length: 100000000", piece, pieces)
            chunked = await upload(found, "Transfer-Encoding: chunked", chunk, pieces)
            longer = await upload(found, "Content-Length: 100", piece, pieces)
            shorter = await upload(found, "Content-Length: 9000000", piece, 10)
            beside = await good(found, 20)
        reached = sum(line.event == "received" for line in found.replicas[0].log) - 20 - len(beside)
        found.spared_mb = 2 * LIMIT / MB + 8
        bad = await found.judge()
    report(
        "30",
        Finding(
            "100 MB bodies",
            "declared and not sent; declared and sent; in chunks; 100 bytes declared; 9 MB declared and 0.6 sent",
            "413 before the body is read; chunks cut at the limit; too long ends the connection; too short 408; "
            f"memory at most 2 x {LIMIT / MB:.0f} MB; nothing reaches a model server",
            f"{declared[0]}; {insisting[0]}; {chunked[0]} after {chunked[1] / MB:.1f} MB were sent; {longer[0]}; "
            f"{shorter[0]}; peak + {watch.grown_mb:.1f} MB; {reached} reached one",
            (declared[0], insisting[0], chunked[0], shorter[0]) == (413, 413, 413, 408)
            and longer[0] in (0, 400)  # 0: its answer was under way, so that there was no place for another
            and chunked[1] <= LIMIT + 48 * MB  # the kernel takes up to 32 MB that nobody reads any more
            and watch.grown_mb <= 2 * LIMIT / MB + 4
            and reached == 0
            and completed(beside) == len(beside)
            and not bad,
            {"chunked_sent": chunked[1], "grown_mb": watch.grown_mb, "problems": bad},
        ),
    )


async def test_34_decompression_bombs_both_ways(tmp_path: Path, report: Report) -> None:
    bomb = gzip.compress(bytes(512 * MB if LONG else 64 * MB), 6 if LONG else 1)
    answer = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n%b"
        % (len(bomb), bomb)
    ).decode("latin-1")
    async with rig(tmp_path, replicas=2) as found:
        plain = found.body(fake={"raw": answer})
        streamed = found.body(fake={"raw": answer}, stream=True)
        async with watched(found) as watch:
            async with held(found, 10, post(CHAT, bomb, "Content-Encoding: gzip")) as clients:
                await until_lost(clients, 10.0)
            answers = [found.crowd.ask(body) for body in (plain, streamed) for _ in range(5)]
            await found.crowd.ended(answers)
            beside = await good(found, 20)
        found.spared_mb = 64.0
        bad = await found.judge()
    asked, said = {client.status for client in clients}, {answer.status for answer in answers}
    codes = {answer.error.get("code") for answer in answers}
    most_mb = 10 * len(json.dumps(plain)) / MB * 3 + 24  # the requests themselves, which carry the bomb to the engine
    report(
        "34",
        Finding(
            "decompression bombs",
            f"{len(bomb) / MB:.2f} MB of gzip that are {512 if LONG else 64} MB, 10 x as a request, 10 x as an answer",
            "requests 415; answers refused at their head; nothing is ever unpacked",
            f"requests {asked}; answers {said} {codes}; peak + {watch.grown_mb:.1f} MB",
            asked == {415}
            and said == {502}
            and codes == {"upstream_compressed"}
            and watch.grown_mb <= most_mb
            and completed(beside) == len(beside)
            and not bad,
            {"grown_mb": watch.grown_mb, "most_mb": most_mb, "problems": bad},
        ),
    )


async def beside_one(
    found: Rig, fake: dict[str, Any], count: int, within_s: float
) -> tuple[list[Answer], list[Answer], float]:
    """The answers to some requests of this kind, those of others meanwhile, and what the memory grew by."""
    async with watched(found) as watch:
        answers = [found.crowd.ask(found.body(stream=True, max_tokens=2_000_000, fake=fake)) for _ in range(count)]
        beside = await good(found, 40)
        await found.crowd.ended(answers, within_s)
    assert all(answer.state == "completed" for answer in beside)
    busy = {answer.headers.get("x-tidegate-replica") for answer in answers}
    # A fake engine that is busy with one of them lets others wait: that is not the gateway's doing.
    return answers, [each for each in beside if each.headers["x-tidegate-replica"] not in busy], watch.grown_mb


async def test_35_a_line_without_an_end(tmp_path: Path, report: Report) -> None:
    size = 1000 * MB if LONG else 16 * MB
    async with rig(tmp_path, replicas=6) as found:  # each answer fails at two
        alone = await good(found, 40)
        answers, beside, grown_mb = await beside_one(found, {"big_event_bytes": size}, 2, 60.0)
        found.spared_mb = 64.0
        bad = await found.judge()
    received = max(len(answer.body) for answer in answers)
    report(
        "35",
        Finding(
            "event without an end",
            f"two answers whose first event has {size // MB} MB",
            "refused when it is above 1 MiB; memory bounded; others not held up",
            f"{[(answer.status, answer.error.get('code')) for answer in answers]}, {received} bytes passed on; "
            f"peak + {grown_mb:.1f} MB; others' p99 {took_ms(alone, 99):.0f} → {took_ms(beside, 99):.0f} ms",
            # 502, or an error event where the gigabyte took longer to come than a stream's head is held back.
            all(answer.status in (200, 502) and answer.error.get("code") == "upstream_failed" for answer in answers)
            and grown_mb <= 24
            and len(beside) > 0
            and not bad,
            {"problems": bad, "grown_mb": grown_mb},
        ),
    )


async def test_35_a_million_tiny_events_and_single_bytes(tmp_path: Path, report: Report) -> None:
    events = 1_000_000 if LONG else 15_000
    pieces = 2000 if LONG else 40
    async with rig(tmp_path, replicas=3) as found:
        alone = await good(found, 40)
        streams = [({"chunks": events, "chunk_bytes": 1}, 1), ({"chunks": pieces, "split": 1}, 2)]
        rows = [await beside_one(found, fake, count, 300.0) for fake, count in streams]
        found.spared_mb = 100.0 + 300 * LONG  # nothing of it is the gateway's: `judge` looks at the end alone
        bad = await found.judge()
    before_ms = took_ms(alone, 99)
    during_ms = [took_ms(beside, 99) for _, beside, _ in rows]
    grown_mb = [grown for _, _, grown in rows]
    report(
        "35",
        Finding(
            "tiny events, single bytes",
            f"{events:,} events as fast as they come; two streams of {pieces} events, byte by byte",
            "complete, memory bounded, others not held up",
            f"{[completed(answers) for answers, _, _ in rows]} complete; peak + {max(grown_mb):.1f} MB; others' p99 "
            f"{before_ms:.0f} → {during_ms[0]:.0f} and {during_ms[1]:.0f} ms",
            [completed(answers) for answers, _, _ in rows] == [1, 2]
            and all(beside for _, beside, _ in rows)
            and max(grown_mb) <= 24
            and max(during_ms) <= before_ms + LATE_MS * (4 if LONG else 1)
            and not bad,
            {"problems": bad, "p99_ms": during_ms, "p99_before_ms": before_ms, "grown_mb": grown_mb},
        ),
    )
