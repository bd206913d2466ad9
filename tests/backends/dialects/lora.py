"""Real LoRA adapters for real llama.cpp: random ones, written here, and a server that holds them.

The file format is GGUF 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), of which an adapter needs little.
"""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from backends.launch.tether import tethered
from gateway.demo.preflight import weights

WIDTH = 576
"""Embedding length of SmolLM2-135M, which is what its query projections take and give."""
RANK = 2
_ALIGNMENT = 32
_STRING, _FLOAT32 = 8, 6

_SERVE = """
import sys, time
from pathlib import Path
import xllamacpp
from backends.launch.llamacpp import Launch, parameters
model, *files = sys.argv[1:]
params = parameters(Launch(model=Path(model), alias="smollm2"), xllamacpp)
adapters = []
for file in files:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = file, 1.0
    adapters.append(adapter)
params.lora_adapters = adapters
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
while True:
    time.sleep(3600)
"""


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def write_adapter(path: Path, seed: int, blocks: Sequence[int] = range(30)) -> None:
    """An adapter that changes the queries of every block at random."""
    rng = random.Random(seed)
    header = struct.pack("<4sIQQ", b"GGUF", 3, 2 * len(blocks), 4)
    for key, said in (("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora")):
        header += _text(key) + struct.pack("<I", _STRING) + _text(said)
    header += _text("adapter.lora.alpha") + struct.pack("<If", _FLOAT32, 16.0)
    data = b""
    for block in blocks:
        for half, shape in (("lora_a", (WIDTH, RANK)), ("lora_b", (RANK, WIDTH))):
            header += _text(f"blk.{block}.attn_q.weight.{half}") + struct.pack("<IQQIQ", 2, *shape, 0, len(data))
            values = [rng.gauss(0, 0.2) for _ in range(WIDTH * RANK)]
            data += struct.pack(f"<{len(values)}f", *values)  # a multiple of the alignment
    path.write_bytes(header + b"\0" * (-len(header) % _ALIGNMENT) + data)


@contextmanager
def serving_adapters(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """A llama.cpp with SmolLM2 and these adapters, at the scale 1 that `llama-server --lora` gives them; its URL."""
    model = weights()
    assert model is not None, "the demo's weights are not installed; `make test` installs them"
    files = [folder / f"{name}.gguf" for name in names]
    for seed, file in enumerate(files):
        write_adapter(file, seed)
    command = tethered([sys.executable, "-c", _SERVE, str(model), *map(str, files)])
    log = folder / "lora.log"
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().decode().strip()
            assert url.startswith("http"), log.read_text()[-2000:]
            yield url
        finally:
            process.kill()
            process.wait(10)
