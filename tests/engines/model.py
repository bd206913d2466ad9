"""Makes one tiny chat model for all engines, from nothing but what is installed: no hub, no download.

    .engines/sglang/venv/bin/python tests/engines/model.py FOLDER

A Qwen2 of 2.6 million random weights, in float32, in both layouts with the same values: `hf/` for SGLang and vLLM,
`model.gguf` for llama.cpp. It talks nonsense, the same in every engine for the same prompt at temperature 0. It never
ends an answer by itself, so answers are as long as a test asks for; and each of its tokens is readable text, so a
stream has an event for each.

Beside it lie LoRA adapters, `NAME/` for SGLang and vLLM and `NAME.gguf` for llama.cpp, strong enough that each
says something else than the model alone. Runs in SGLang's environment, not in the gateway's.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import torch  # type: ignore[import-not-found]
from safetensors.torch import save_file  # type: ignore[import-not-found]
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (  # type: ignore[import-not-found]
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 2048
CONTEXT = 8192
LAYERS = 4
ROPE_THETA = 10_000.0
ADAPTERS = ("ebb", "flow", "spring")
RANK = 8
ALPHA = 16
STRENGTH = 0.2
ADAPTED = ("q_proj", "v_proj")
END_OF_TEXT, TURN_BEGINS, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen2's way to cut text into words. transformers applies it to any model of this kind, whatever the tokenizer's
# own file says, and llama.cpp knows it by the name "qwen2"; with another one the engines would count other tokens.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained_tokenizer() -> Any:
    """Byte-level BPE, learned from the standard library's source: text that is always at hand."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_BEGINS, TURN_ENDS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    tokenizer.train([str(path) for path in sources], trainer)
    return tokenizer


def unwanted(tokenizer: Any) -> list[int]:
    """The special tokens, parts of a character, and blanks."""
    texts = [tokenizer.decode([token]) for token in range(VOCABULARY)]
    return [token for token, text in enumerate(texts) if "\ufffd" in text or not text.strip()]


def random_model(never: list[int]) -> Any:
    """float32, so that rounding does not depend on the batch. The tokens in `never` are never the likeliest."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=LAYERS,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        model.lm_head.weight[never] = 0
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def save_for_transformers(model: Any, trained: Any, folder: Path) -> None:
    """The layout of Hugging Face, which SGLang and vLLM read."""
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        bos_token=END_OF_TEXT,
        eos_token=TURN_ENDS,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "chat_template": CHAT_TEMPLATE}
    path.write_text(json.dumps(settings, indent=1))


def save_for_llamacpp(model: Any, trained: Any, path: Path) -> None:
    """One GGUF file with the same weights, unrounded, and the same tokenizer and chat template."""
    shape = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    _add_tokenizer(writer, json.loads(trained.to_str()))
    for name, tensor in model.state_dict().items():
        writer.add_tensor(_gguf_name(name), tensor.numpy())
    _write(writer)


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any]) -> None:
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")  # what GGUF calls byte-level BPE
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words],
    )
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_name(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.bias` is `blk.0.attn_q.bias`, as gguf's own table says."""
    stem, _, kind = name.rpartition(".")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, LAYERS)
    return f"{table.get_name(stem)}.{kind}"


def save_adapter(name: str, seed: int, shape: Any, folder: Path) -> None:
    """Random changes to the query and value projections of every layer, in PEFT's layout and as GGUF."""
    generator = torch.Generator().manual_seed(seed)
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", "qwen2")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ALPHA))
    tensors = {}
    for layer in range(shape.num_hidden_layers):
        for projection in ADAPTED:
            module = f"model.layers.{layer}.self_attn.{projection}"
            down = torch.randn(RANK, shape.hidden_size, generator=generator) * STRENGTH
            up = torch.randn(shape.hidden_size, RANK, generator=generator) * STRENGTH
            tensors[f"base_model.model.{module}.lora_A.weight"] = down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up
            target = _gguf_name(f"{module}.weight")
            writer.add_tensor(f"{target}.lora_a", down.numpy())
            writer.add_tensor(f"{target}.lora_b", up.numpy())
    _write(writer)
    (folder / name).mkdir()
    save_file(tensors, folder / name / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(ADAPTED),
        "base_model_name_or_path": "tiny",
        "inference_mode": True,
    }
    (folder / name / "adapter_config.json").write_text(json.dumps(settings, indent=1))


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trained = trained_tokenizer()
    model = random_model(unwanted(trained))
    save_for_transformers(model, trained, folder / "hf")
    save_for_llamacpp(model, trained, folder / "model.gguf")
    for seed, name in enumerate(ADAPTERS, start=1):
        save_adapter(name, seed, model.config, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
