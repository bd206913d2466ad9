"""Makes a tiny chat model with random weights, from nothing but what is installed: no hub, no download.

    .engines/sglang/bin/python tests/engines/sglang/model.py FOLDER

A Qwen2 of 2.6 million parameters, in Hugging Face's layout. It talks nonsense, always the same for the same prompt
at temperature 0. It never ends an answer by itself, so answers are as long as a test asks for; and each of its tokens
is readable text, so a stream has an event for each. Runs in the engine's environment, not in the gateway's.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch  # type: ignore[import-not-found]
from tokenizers import (  # type: ignore[import-not-found]
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
END_OF_TEXT, TURN_BEGINS, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# Qwen2's way to cut text into words. transformers applies it to any model of this kind, whatever the tokenizer's
# own file says; with another one the training below and the engine would disagree.
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
            num_hidden_layers=4,
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


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trained = trained_tokenizer()
    random_model(unwanted(trained)).save_pretrained(folder)
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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
