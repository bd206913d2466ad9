"""Bytes of weights against published checkpoints, and how they lie on GPUs."""

from __future__ import annotations

import pytest

from backends.plan.catalogue import find, known_models
from backends.plan.errors import PlanError
from backends.plan.parameters import parts_of
from backends.plan.units import GB, GIB, gb, gib
from backends.plan.weights import (
    PRECISIONS,
    Split,
    bytes_per_gpu,
    check_precision,
    layers_on_stage,
    loaded_bytes,
    published_bytes,
    read_per_step,
)


def published(name: str, precision: str) -> float:
    model, found, _, _ = find(name).in_precision(precision)
    return published_bytes(model, parts_of(model), found)


def test_deepseek_v3_in_fp8_is_what_the_hub_has() -> None:
    # 688,586,727,753 bytes are the safetensors files of https://huggingface.co/deepseek-ai/DeepSeek-V3, headers of
    # some MB included. Of its numbers 3.92 B are in BF16: both tables twice, routers, norms, one projection.
    found = published("deepseek-v3", "fp8")
    assert found == pytest.approx(688_586_727_753, rel=1e-4)
    assert found < 688_586_727_753
    assert (gb(found), gib(found)) == ("688.6 GB", "641.3 GiB")


def test_deepseek_v3_loads_673_gb_without_its_prediction_module() -> None:
    # 671.03 B numbers: 669.06 B in 1 byte, 1.96 B (tables, routers, norms) in 2, and 669.06 B / 16384 scales of 4.
    model = find("deepseek-v3").model
    loaded = loaded_bytes(model, parts_of(model), "fp8")
    assert loaded == pytest.approx(671.03e9 + 1.96e9 + 669.06e9 / 16384 * 4, rel=1e-4)
    # With it, one layer and the projection more; its tables are the model's.
    more = loaded_bytes(model, parts_of(model), "fp8", prediction=True) - loaded
    assert more == pytest.approx(11.5e9 + 2 * 0.103e9, rel=0.01)


def test_deepseek_v3_in_16_bits_is_1342_gb_and_not_134() -> None:
    model = find("deepseek-v3").model
    assert loaded_bytes(model, parts_of(model), "fp16") == 2 * 671_026_419_200
    assert gb(loaded_bytes(model, parts_of(model), "bf16")) == "1,342.1 GB"


def test_gpt_oss_in_mxfp4_is_what_its_card_says() -> None:
    # https://arxiv.org/abs/2508.10925, table 1: checkpoints of 60.8 GiB and 12.8 GiB.
    assert round(published("gpt-oss-120b", "mxfp4") / GIB, 1) == 60.8
    assert round(published("gpt-oss-20b", "mxfp4") / GIB, 1) == 12.8


def test_awq_by_hand() -> None:
    # Qwen2.5-7B: 28 layers; linear layers in 0.5 + 2.5 / 128 bytes, the rest in 2. The hub's checkpoint
    # (https://huggingface.co/Qwen/Qwen2.5-7B-Instruct-AWQ) is 5.57 GB.
    linear = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    rest = 7_615_616_512 - linear
    by_hand = linear * (0.5 + 2.5 / 128) + 2 * rest
    assert published("qwen2.5-7b", "int4") == pytest.approx(by_hand, rel=1e-12)
    assert by_hand / GB == pytest.approx(5.57, abs=0.005)


def test_each_precision_by_hand_for_one_matrix_of_llama() -> None:
    # The head stays in 16 bits, so the difference between two precisions is that of the linear layers alone.
    name, linear = "llama-3.1-8b", 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    rest = 2 * (8_030_261_248 - linear)
    columns = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert published(name, "fp8") - rest == linear * (1 + 4 / 16384)
    assert published(name, "int8") - rest == linear + 4 * columns
    assert published(name, "mxfp4") - rest == linear * 0.53125
    assert published(name, "nvfp4") - rest == linear * 0.5625 + 32 * 7 * 8
    assert published(name, "fp16") == published(name, "bf16") == 2 * 8_030_261_248


def test_fewer_bits_are_never_larger() -> None:
    for known in known_models():
        model, parts = known.model, parts_of(known.model)
        sizes = {precision: published_bytes(model, parts, precision) for precision in PRECISIONS}
        assert sizes["bf16"] > sizes["int8"] > sizes["int4"], known.name
        assert sizes["bf16"] > sizes["fp8"] > sizes["nvfp4"] > sizes["mxfp4"] * 0.9, known.name


def test_unknown_precision_is_named() -> None:
    with pytest.raises(PlanError, match="'int3'"):
        check_precision("int3")


def test_gpus_together_hold_at_least_the_model() -> None:
    for known in known_models():
        model, parts = known.model, parts_of(known.model)
        whole = loaded_bytes(model, parts, model.native)
        assert bytes_per_gpu(model, parts, model.native, Split()) == pytest.approx(whole, rel=1e-12)
        for split in (Split(2), Split(8), Split(16), Split(8, 2), Split(1, 4), Split(8, 1, 8)):
            held = bytes_per_gpu(model, parts, model.native, split)
            assert held * split.gpus >= whole * (1 - 1e-12), (known.name, split)
            assert held < whole


def test_deepseek_on_8_gpus_by_hand() -> None:
    # Copied to each of 8: down-projections of attention (7168 x (1536 + 576)), routers, norms. Divided: the rest.
    model = find("deepseek-v3").model
    parts = parts_of(model)
    copied = 61 * 7168 * (1536 + 576) + 61 * 4 * (56 * 12 + 56 * 5)  # in FP8 with its blocks of scales
    copied += 2 * (58 * (7168 * 256 + 256) + 61 * (1536 + 512 + 2 * 7168) + 7168)
    by_hand = (loaded_bytes(model, parts, "fp8") - copied) / 8 + copied
    assert bytes_per_gpu(model, parts, "fp8", Split(8)) == pytest.approx(by_hand, rel=1e-12)


def test_keys_are_copied_once_each_gpu_has_one_head() -> None:
    model = find("qwen3-30b-a3b").model  # 4 key-value heads
    parts = parts_of(model)
    four, eight = (bytes_per_gpu(model, parts, "bf16", Split(tp)) for tp in (4, 8))
    keys = 2 * 48 * 2 * 2048 * 512 / 4
    copied = 2 * (48 * (2048 * 128 + 2 * 2048 + 2 * 128) + 2048)
    assert eight == pytest.approx((four - keys - copied) / 2 + keys + copied, rel=1e-12)


def test_pipeline_stages_have_whole_layers() -> None:
    model = find("deepseek-v3").model
    parts = {part.name: part for part in parts_of(model)}
    # 61 layers in 4 stages: 16 on the fullest, which has none of the 3 dense ones.
    assert layers_on_stage(model, parts["experts, down"], 4) == 16
    assert layers_on_stage(model, parts["feed-forward, down"], 4) == 0
    assert layers_on_stage(model, parts["feed-forward, down"], 1) == 3
    assert layers_on_stage(model, parts["experts, down"], 1) == 58


def test_data_parallel_attention_has_it_whole_on_each_gpu() -> None:
    model = find("deepseek-v3").model
    parts = parts_of(model)
    more = bytes_per_gpu(model, parts, "fp8", Split(8, 1, 1, True)) - bytes_per_gpu(model, parts, "fp8", Split(8))
    divided = 61 * (1536 * 24576 + 512 * 32768 + 16384 * 7168) * (1 + 4 / 16384) + 2 * 129_280 * 7168
    assert more == pytest.approx(divided * 7 / 8, rel=1e-9)


def test_one_token_reads_its_experts_and_many_read_nearly_all() -> None:
    model = find("qwen3-30b-a3b").model
    parts = parts_of(model)
    one = read_per_step(model, parts, "bf16", Split(), requests=1)
    assert one == 2 * (30_532_122_624 - 151_936 * 2048 - 48 * 120 * 3 * 2048 * 768)
    many = read_per_step(model, parts, "bf16", Split(), requests=1000)
    assert many == pytest.approx(2 * (30_532_122_624 - 151_936 * 2048), rel=1e-6)
