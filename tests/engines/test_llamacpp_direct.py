"""The engine itself, without the gateway: what the demo and every later engine test rely on."""

from __future__ import annotations

import json

import httpx2
import pytest

from gateway.demo.fleet import PROMPT
from tests.llamacpp import LlamaCpp

pytestmark = pytest.mark.engine


async def test_real_model_answers_the_demos_question_sensibly(llamacpp_replica: LlamaCpp) -> None:
    async with httpx2.AsyncClient(base_url=llamacpp_replica.url, trust_env=False, timeout=60) as client:
        response = await client.post(
            "/v1/chat/completions",
            json={
                "model": "smollm2",
                "temperature": 0,
                "max_tokens": 80,
                "messages": [{"role": "user", "content": PROMPT}],
            },
        )
    assert response.status_code == 200
    choice = response.json()["choices"][0]
    assert "force" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"


async def test_stream_ends_with_finish_reason_usage_and_done(llamacpp_replica: LlamaCpp) -> None:
    async with (
        httpx2.AsyncClient(base_url=llamacpp_replica.url, trust_env=False, timeout=60) as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            json={
                "model": "smollm2",
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": 4,
                "temperature": 0,
                "messages": [{"role": "user", "content": "Explain gravity in one sentence."}],
            },
        ) as response,
    ):
        events = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]][-1] == "length"
    assert chunks[-1]["usage"]["completion_tokens"] == 4


async def test_embeddings_and_metrics_are_served(llamacpp_replica: LlamaCpp) -> None:
    async with httpx2.AsyncClient(base_url=llamacpp_replica.url, trust_env=False, timeout=60) as client:
        embedding = await client.post("/v1/embeddings", json={"model": "smollm2", "input": "tide"})
        metrics = await client.get("/metrics")
    assert len(embedding.json()["data"][0]["embedding"]) == 576  # SmolLM2-135M's hidden size
    assert "llamacpp:requests_processing" in metrics.text
