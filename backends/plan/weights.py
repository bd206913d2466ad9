"""Bytes of a model's weights in each precision, in all and on one GPU.

What each precision stores for a matrix of `rows` (in) x `columns` (out):

    bf16, fp16   2 bytes a number
    fp8          1 byte, and one 4-byte scale for each block of 128 x 128, as DeepSeek-V3 and Qwen3-FP8 are published
    int8         1 byte, and one 4-byte scale for each column
    int4         half a byte, and for each 128 rows of a column a 2-byte scale and a half-byte zero (AWQ, GPTQ):
                 0.5 + 2.5 / 128 = 0.5195 bytes a number
    mxfp4        half a byte, and a 1-byte scale for each 32: 0.53125 bytes a number (OCP Microscaling Formats 1.0)
    nvfp4        half a byte, and a 1-byte scale for each 16: 0.5625 bytes a number

Only the linear layers and experts are made small. Embeddings, the head, norms, routers and biases stay in 16 bits in
every published checkpoint checked here. Two schemes go less far: MXFP4, as GPT-OSS is published, covers the experts
only where there are experts; NVFP4 of DeepSeek leaves the latent attention in 16 bits
(https://huggingface.co/nvidia/DeepSeek-R1-FP4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from backends.plan.architecture import LatentAttention, Model
from backends.plan.errors import PlanError
from backends.plan.parameters import COPIED, EMBEDDING, EXPERT, HEAD, KEYS, LINEAR, Part

PRECISIONS = ("bf16", "fp16", "fp8", "int8", "int4", "mxfp4", "nvfp4")
FP8_BLOCK = 128
INT4_GROUP = 128


@dataclass(frozen=True, slots=True)
class Split:
    """How one replica is spread: `tp` GPUs share each layer, `pp` stages share the layers, experts lie on `ep` GPUs
    whole (1: each is divided by `tp`). `dp_attention`: each GPU has the attention whole, for its own requests.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dp_attention: bool = False

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.pp

    def __str__(self) -> str:
        words = [f"TP {self.tp}"]
        words += [f"PP {self.pp}"] if self.pp > 1 else []
        words += [f"EP {self.ep}"] if self.ep > 1 else []
        return " x ".join(words) + (", attention data-parallel" if self.dp_attention else "")


def check_precision(name: str) -> str:
    """The name itself. Raises `PlanError` for one that is not known."""
    if name not in PRECISIONS:
        raise PlanError(f"precision: {name!r} is not known; known are {', '.join(PRECISIONS)}")
    return name


_STORED: dict[str, Callable[[int, int], float]] = {
    "bf16": lambda rows, columns: 2.0 * rows * columns,
    "fp16": lambda rows, columns: 2.0 * rows * columns,
    "fp8": lambda rows, columns: rows * columns + 4.0 * math.ceil(rows / FP8_BLOCK) * math.ceil(columns / FP8_BLOCK),
    "int8": lambda rows, columns: rows * columns + 4.0 * columns,
    "int4": lambda rows, columns: rows * columns / 2 + 2.5 * columns * math.ceil(rows / INT4_GROUP),
    "mxfp4": lambda rows, columns: columns * (rows / 2 + math.ceil(rows / 32)),
    "nvfp4": lambda rows, columns: columns * (rows / 2 + math.ceil(rows / 16)) + 8.0,
}


def matrix_bytes(model: Model, part: Part, precision: str) -> float:
    """Bytes of one of the part's matrices."""
    stored = _STORED[check_precision(precision)]
    small = part.kind in (LINEAR, EXPERT)
    if precision == "mxfp4" and model.experts is not None:
        small = part.kind == EXPERT
    if precision == "nvfp4" and part.attention and isinstance(model.attention, LatentAttention):
        small = False
    return stored(part.rows, part.columns) if small else 2.0 * part.size


def part_bytes(model: Model, part: Part, precision: str) -> float:
    """Bytes of all of the part's matrices in all layers."""
    return matrix_bytes(model, part, precision) * part.copies * part.layers


def published_bytes(model: Model, parts: tuple[Part, ...], precision: str) -> float:
    """Bytes of a checkpoint as a hub has it, the prediction module with its second tables included."""
    return sum(part_bytes(model, part, precision) for part in parts)


def is_loaded(part: Part, *, prediction: bool) -> bool:
    """Whether an engine keeps the part in memory: of the prediction module only with speculative decoding, and its
    second embedding and head never, since engines share the model's."""
    if not part.prediction:
        return True
    return prediction and part.kind not in (EMBEDDING, HEAD)


def loaded_bytes(model: Model, parts: tuple[Part, ...], precision: str, *, prediction: bool = False) -> float:
    """Bytes that an engine loads, all GPUs of a replica together, before anything is there twice."""
    return sum(part_bytes(model, part, precision) for part in parts if is_loaded(part, prediction=prediction))


def layers_on_stage(model: Model, part: Part, pp: int) -> int:
    """Layers of the part on the fullest stage of a pipeline: as many of those with experts as there are."""
    stage = math.ceil(model.layers / pp)
    if not part.per_layer or part.prediction:
        return part.layers
    if part.lighter and model.experts is not None:
        return max(0, min(part.layers, stage - (model.layers - model.experts.dense_layers)))
    return min(part.layers, stage)


def share(model: Model, part: Part, split: Split) -> float:
    """The part of each matrix that one GPU holds, 0 to 1."""
    if part.spread == COPIED or (split.dp_attention and (part.attention or part.kind == EMBEDDING)):
        return 1.0
    if part.spread == KEYS and not isinstance(model.attention, LatentAttention):
        return 1.0 / min(split.tp, model.attention.kv_heads)
    return 1.0 / split.tp


def bytes_per_gpu(
    model: Model, parts: tuple[Part, ...], precision: str, split: Split, *, prediction: bool = False
) -> float:
    """Bytes of weights on the GPU that has most of them."""
    held, ends = 0.0, [0.0]
    for part in parts:
        if not is_loaded(part, prediction=prediction):
            continue
        size = matrix_bytes(model, part, precision) * part.copies * share(model, part, split)
        if not part.per_layer and split.pp > 1:
            ends.append(size)  # the first stage has the embedding, the last one the head
        else:
            held += size * layers_on_stage(model, part, split.pp)
    return held + max(ends)


def read_per_step(model: Model, parts: tuple[Part, ...], precision: str, split: Split, *, requests: int) -> float:
    """Bytes of weights that the fullest GPU reads to give `requests` requests one token each.

    Of a layer's experts those are read that any of the requests chose. With choices spread evenly, the expected part
    of them is 1 - (1 - chosen / count) ^ requests.
    """
    found = 0.0
    for part in parts:
        if part.kind == EMBEDDING or not is_loaded(part, prediction=False):
            continue
        copies: float = part.copies
        if part.read < part.copies:
            copies *= 1 - (1 - part.read / part.copies) ** requests
        size = matrix_bytes(model, part, precision) * copies * share(model, part, split)
        found += size * layers_on_stage(model, part, split.pp)
    return found
