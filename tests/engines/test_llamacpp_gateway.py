"""What is llama.cpp's own, through the gateway."""

from __future__ import annotations

import pytest

from tests.engines.conftest import Served
from tests.engines.gateway_process import MODEL

pytestmark = pytest.mark.engine


def test_embeddings(served_llamacpp: Served) -> None:
    with served_llamacpp.gateway.sdk() as client:
        one = client.embeddings.create(model=MODEL, input="tide")
        two = client.embeddings.create(model=MODEL, input=["tide", "rocket"], encoding_format="float")
    assert len(one.data[0].embedding) == 576  # SmolLM2-135M's hidden size
    assert one.data[0].embedding == pytest.approx(two.data[0].embedding, abs=1e-3)
    assert two.usage.prompt_tokens > 1
