"""One llama.cpp replica with LoRA adapters, which stops the way llama.cpp's own server program does.

    python -m tests.engines.llamacpp.serve --model F.gguf --alias tiny --port 18081 [--lora A.gguf ...]

Differs from `backends.launch.llamacpp`, the demo's replica, in three ways: adapters, none of them in effect unless a
request asks; float32 throughout, so that a greedy answer is the one the other engines give; and SIGTERM, which there
ends the process at once and here lets llama.cpp close its server by itself.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import xllamacpp

from backends.launch.llamacpp import Launch, parameters, parse, stay


def serve(launch: Launch, adapters: Sequence[str]) -> NoReturn:
    """Serve until a signal comes."""
    params = parameters(launch, xllamacpp)
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.endpoint_props = True
    loras = []
    for path in adapters:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = path, 0.0
        loras.append(lora)
    params.lora_adapters = loras
    server = xllamacpp.Server(params)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    stay(f"listening {server.listening_address}")


def main(argv: Sequence[str]) -> NoReturn:
    adapters = [argv[place + 1] for place, word in enumerate(argv) if word == "--lora"]
    serve(parse([word for word in argv if word != "--lora" and word not in adapters]), adapters)


if __name__ == "__main__":
    main(sys.argv[1:])
