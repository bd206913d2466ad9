"""Bytes of the KV cache, by hand."""

from __future__ import annotations

import pytest

from backends.plan.architecture import read_model
from backends.plan.cache import bytes_per_token, check_kv, request_bytes
from backends.plan.catalogue import find, known_models
from backends.plan.errors import PlanError
from backends.plan.weights import Split


def test_latent_cache_of_deepseek_v3_is_70_kb_a_token() -> None:
    # https://arxiv.org/abs/2412.19437, section 4.2: latent 512, rotary key 64, 61 layers; BF16 has 2 bytes.
    assert bytes_per_token(find("deepseek-v3").model, "bf16") == (512 + 64) * 61 * 2 == 70_272
    assert bytes_per_token(find("deepseek-v3").model, "fp8") == 35_136


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("llama-3.1-8b", 2 * 8 * 128 * 32 * 2),  # 131,072
        ("llama-3.3-70b", 2 * 8 * 128 * 80 * 2),  # 327,680
        ("llama-3.1-405b", 2 * 8 * 128 * 126 * 2),  # 516,096: seven times DeepSeek-V3's, of a smaller model
        ("qwen2.5-72b", 2 * 8 * 128 * 80 * 2),
        ("qwen3-235b-a22b", 2 * 4 * 128 * 94 * 2),
        ("qwen2.5-0.5b", 2 * 2 * 64 * 24 * 2),
    ],
)
def test_grouped_cache_is_keys_and_values_of_its_heads(name: str, by_hand: int) -> None:
    assert bytes_per_token(find(name).model, "bf16") == by_hand


def test_windowed_layers_keep_their_window_only() -> None:
    # GPT-OSS-120B: 36 layers of 2 x 8 x 64 x 2 = 2,048 bytes a token, every other one with a window of 128.
    model = find("gpt-oss-120b").model
    assert request_bytes(model, "bf16", 100) == 36 * 2048 * 100
    assert request_bytes(model, "bf16", 10_000) == 18 * 2048 * 10_000 + 18 * 2048 * 128


def test_a_window_that_is_switched_off_is_none() -> None:
    config = {**find("qwen2.5-7b").config, "sliding_window": 4096, "max_window_layers": 7}
    assert read_model(config).windowed_layers == 0
    assert read_model({**config, "use_sliding_window": True}).windowed_layers == 21
    mistral = {**find("llama-3.1-8b").config, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    assert read_model(mistral).windowed_layers == 32


def test_heads_are_divided_until_each_gpu_has_one() -> None:
    model = find("llama-3.3-70b").model  # 8 heads
    assert [request_bytes(model, "bf16", 1, Split(tp)) for tp in (1, 4, 8, 16)] == [327_680, 81_920, 40_960, 40_960]


def test_a_latent_vector_cannot_be_divided() -> None:
    model = find("deepseek-v3").model
    assert {request_bytes(model, "bf16", 1, Split(tp)) for tp in (1, 8, 16)} == {70_272}
    # 61 layers in 2 stages: 31 on one.
    assert request_bytes(model, "bf16", 1, Split(8, 2)) == 576 * 31 * 2


def test_more_tokens_never_take_less() -> None:
    for known in known_models():
        sizes = [request_bytes(known.model, "bf16", tokens) for tokens in (1, 100, 128, 129, 5000, 100_000)]
        assert sizes == sorted(sizes)
        assert bytes_per_token(known.model, "bf16") == sizes[0] == 2 * bytes_per_token(known.model, "fp8")


def test_unknown_precision_of_the_cache_is_named() -> None:
    with pytest.raises(PlanError, match="'int2'"):
        check_kv("int2")
