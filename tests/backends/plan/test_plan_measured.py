"""The sums against what engines logged on real GPUs, in threads that anyone can read."""

from __future__ import annotations

import pytest

from backends.plan.cache import request_bytes
from backends.plan.catalogue import find
from backends.plan.fit import Question, place
from backends.plan.gpus import gpu_named
from backends.plan.parameters import parts_of
from backends.plan.units import GIB, MIB
from backends.plan.weights import Split, bytes_per_gpu, matrix_bytes, share


def test_deepseek_r1_on_8_gaudi_2() -> None:
    # https://github.com/HabanaAI/vllm-fork/issues/809: "Pre-loading model weights on hpu:0 took 79.41 GiB".
    model = find("deepseek-r1").model
    held = bytes_per_gpu(model, parts_of(model), "fp8", Split(8)) / GIB
    assert held == pytest.approx(79.41, rel=0.003)


def test_deepseek_v3_on_32_rtx_4090() -> None:
    # https://github.com/deepseek-ai/DeepSeek-V3/issues/205: TP 8 x PP 4, "Loading model weights took 16.9583 GB" (GiB)
    # on the stage of 15 layers that has the 3 dense ones and the embedding, and no room for a context of 128 tokens.
    model, split = find("deepseek-v3").model, Split(8, 4)
    layers = {"feed-forward": 3, "experts": 12, "router": 12, "shared": 12}
    first = 0.0
    for part in parts_of(model):
        if part.prediction or part.name in ("head", "last norm"):
            continue
        count = next((found for word, found in layers.items() if part.name.startswith(word)), 15)
        first += matrix_bytes(model, part, "fp8") * part.copies * share(model, part, split) * min(count, part.layers)
    assert first / GIB == pytest.approx(16.9583, rel=0.02)
    refused = place(Question(model=model, precision="fp8", engine="vllm"), gpu_named("rtx4090"), split).refused
    assert refused is not None


def test_llama_70b_in_int8() -> None:
    # https://github.com/vllm-project/vllm/pull/12569: w8a8, "Loading model weights took 67.7229 GB" (GiB) on one GPU.
    model = find("llama-3.1-70b").model
    assert bytes_per_gpu(model, parts_of(model), "int8", Split()) / GIB == pytest.approx(67.7229, rel=0.002)


def test_cache_of_qwen3_235b_on_4_h100() -> None:
    # https://github.com/vllm-project/vllm/issues/21348: SGLang with --tp 4 --mem-fraction-static 0.93 on 4 x H100,
    # "KV Cache is allocated. #tokens: 367404, K size: 8.23 GB, V size: 8.23 GB" (GiB).
    model, _, _, _ = find("qwen3-235b-a22b").in_precision("fp8")
    asked = Question(model=model, precision="fp8", memory_fraction=0.93)
    found = place(asked, gpu_named("h100"), Split(4))
    each = found.request_bytes / asked.context_tokens
    assert 367_404 * each / GIB == pytest.approx(2 * 8.23, abs=0.01)
    assert found.tokens == pytest.approx(367_404, rel=0.05)


def test_latent_cache_of_deepseek_r1_in_llama_cpp() -> None:
    # https://github.com/ikawrakow/ik_llama.cpp/pull/259: 32,768 tokens in q8_0, which has 34 bytes for 32 numbers,
    # "KV self size = 1166.62 MiB".
    numbers = request_bytes(find("deepseek-r1").model, "fp8", 32_768)
    assert numbers * 34 / 32 / MIB == pytest.approx(1166.62, abs=0.01)
