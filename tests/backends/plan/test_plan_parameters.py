"""The sums of parameters against what the authors published: this is what proves that the dimensions are right."""

from __future__ import annotations

import pytest

from backends.plan.architecture import Model, read_model
from backends.plan.catalogue import Known, find, known_models
from backends.plan.errors import PlanError
from backends.plan.parameters import active, parts_of, total

EVERY = known_models()


def sum_of(name: str) -> int:
    return total(parts_of(find(name).model))


@pytest.mark.parametrize("known", EVERY, ids=lambda known: known.name)
def test_total_is_the_published_one(known: Known) -> None:
    assert known.published is not None
    assert total(parts_of(known.model)) / 1e9 == pytest.approx(known.published.total_b, rel=0.005)


@pytest.mark.parametrize("known", [k for k in EVERY if k.published and k.published.active_b], ids=lambda k: k.name)
def test_active_parameters_are_the_published_ones(known: Known) -> None:
    assert known.published is not None
    wanted = known.published.active_b
    assert wanted is not None
    found = active(parts_of(known.model), embedding=known.published.active_counts_embedding) / 1e9
    # Published with so many digits: 37, 2.4, 3.61.
    digits = len(f"{wanted:g}".partition(".")[2])
    assert found == pytest.approx(wanted, abs=0.6 * 10**-digits)


def test_deepseek_v3_by_hand() -> None:
    # https://arxiv.org/abs/2412.19437, section 4.2, and config.json: hidden 7168, 61 layers, the first 3 dense (18432),
    # 256 experts of 2048 and a shared one, 128 heads, query rank 1536, latent 512, rotary 64, 128 of each head else.
    query = 7168 * 1536 + 1536 * 128 * (128 + 64)
    latent = 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    output = 128 * 128 * 7168
    norms = 1536 + 512 + 2 * 7168
    attention = query + latent + output + norms
    assert query + latent + output == 187_105_280
    dense = 3 * 7168 * 18432
    experts = (256 + 1) * 3 * 7168 * 2048 + 7168 * 256 + 256  # and the router, with a correction for each expert
    model = 61 * attention + 3 * dense + 58 * experts + 2 * 129_280 * 7168 + 7168
    assert model == sum_of("deepseek-v3") == 671_026_419_200
    # The prediction module, https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md: one more layer,
    # three norms, a projection of two hidden vectors to one, and embedding and head once more.
    module = attention + experts + 3 * 7168 + 2 * 7168 * 7168 + 2 * 129_280 * 7168
    whole = total(parts_of(find("deepseek-v3").model), prediction=True)
    assert whole == model + module == 684_489_845_504
    # The hub counts the scales of FP8's blocks too, one for each 128 x 128: 685 B.
    assert whole + 680_571_043_840 // 16_384 == pytest.approx(684.53e9, rel=1e-5)


def test_deepseek_v3_reads_37_billion_a_token_by_hand() -> None:
    attention = 187_105_280 + 1536 + 512 + 2 * 7168
    dense, expert = 3 * 7168 * 18432, 3 * 7168 * 2048
    router = 7168 * 256 + 256
    head, row = 129_280 * 7168, 7168  # of the embedding one row is read
    read = 61 * attention + 3 * dense + 58 * (9 * expert + router) + head + row + 7168
    assert active(parts_of(find("deepseek-v3").model), embedding=False) == read
    assert round(read / 1e9) == 37


def test_llama_3_1_8b_by_hand() -> None:
    # https://arxiv.org/abs/2407.21783, table 3: 32 layers of 4096, 32 heads, 8 of them for keys, 14336, 128256 words.
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336 + 2 * 4096
    assert sum_of("llama-3.1-8b") == 32 * layer + 2 * 128_256 * 4096 + 4096 == 8_030_261_248


def test_qwen_2_5_0_5b_by_hand() -> None:
    # 24 layers of 896, 14 heads of 64, 2 for keys, 4864; biases of query, key and value; one table for both ends.
    layer = 2 * 896 * 896 + 2 * 896 * 128 + (896 + 2 * 128) + 3 * 896 * 4864 + 2 * 896
    assert sum_of("qwen2.5-0.5b") == 24 * layer + 151_936 * 896 + 896 == 494_032_768


def test_qwen3_30b_a3b_by_hand() -> None:
    # https://arxiv.org/abs/2505.09388, table 2: 48 layers of 2048, 32 heads of 128, 4 for keys, norms of queries and
    # keys, 128 experts of 768.
    layer = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128 + 128 * 3 * 2048 * 768 + 2048 * 128 + 2 * 2048
    assert sum_of("qwen3-30b-a3b") == 48 * layer + 2 * 151_936 * 2048 + 2048 == 30_532_122_624


def test_gpt_oss_agrees_with_its_card_part_by_part() -> None:
    # https://arxiv.org/abs/2508.10925, table 1: experts 114.71 B, attention 0.96 B, embedding and head 1.16 B.
    parts = parts_of(find("gpt-oss-120b").model)
    attention = sum(part.count for part in parts if part.attention) / 1e9
    experts = sum(part.count for part in parts if "expert" in part.name or "router" in part.name) / 1e9
    ends = sum(part.count for part in parts if part.name in ("embedding", "head")) / 1e9
    assert (round(attention, 2), round(experts, 2), round(ends, 2)) == (0.96, 114.71, 1.16)


def test_one_table_at_both_ends_is_counted_once() -> None:
    tied = find("llama-3.2-1b")
    untied = read_model({**tied.config, "tie_word_embeddings": False})
    assert total(parts_of(untied)) - total(parts_of(tied.model)) == 128_256 * 2048


LLAMA = dict(find("llama-3.1-8b").config)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures: MambaForCausalLM"),
        ({"architectures": []}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "4096"}, "hidden_size: '4096'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers: 1000"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5"),
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "num_attention_heads: 7"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"torch_dtype": "float8"}, "torch_dtype"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config.quant_method"),
        ({"quantization_config": {"quant_method": "awq", "bits": 3, "group_size": 128}}, "quantization_config"),
        ({"quantization_config": []}, "quantization_config"),
        ({"sliding_window": 128, "layer_types": ["full_attention"]}, "layer_types"),
        ({"sliding_window": 128, "layer_types": ["linear_attention"] * 32}, "layer_types: linear_attention"),
    ],
)
def test_what_is_not_understood_is_named(changed: dict[str, object], field: str) -> None:
    with pytest.raises(PlanError, match=r"config\.json: ") as caught:
        read_model({**LLAMA, **changed})
    assert field in str(caught.value)


def test_experts_cannot_be_chosen_more_often_than_there_are() -> None:
    config = {**find("mixtral-8x7b").config, "num_experts_per_tok": 9}
    with pytest.raises(PlanError, match="num_experts_per_tok: 9"):
        read_model(config)


def test_layers_of_deepseek_without_experts_are_dense() -> None:
    config = {key: value for key, value in find("deepseek-v2-lite").config.items() if key != "n_routed_experts"}
    model: Model = read_model(config)
    assert model.experts is None
    attention = 2048 * 16 * 192 + 2048 * (512 + 64) + 512 * 16 * 256 + 16 * 128 * 2048
    layer = attention + 512 + 2 * 2048 + 3 * 2048 * 10944
    assert total(parts_of(model)) == 27 * layer + 2 * 102_400 * 2048 + 2048
