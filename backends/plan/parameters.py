"""Every matrix and vector of a model: how large it is, how often it is there, and how it is split over GPUs.

The sum over them is the number of parameters. For DeepSeek-V3, to check by hand (https://arxiv.org/abs/2412.19437,
section 4.2, gives the dimensions):

    attention    7168x1536 + 1536x24576 + 7168x576 + 512x32768 + 16384x7168 = 187,105,280 in each of 61 layers
    dense        3 x 7168x18432                                              = 396,361,728 in each of 3 layers
    experts      (256 + 1) x 3 x 7168x2048 + 7168x256 (router)               = 11,320,164,352 in each of 58 layers
    vocabulary   2 x 129280x7168                                             = 1,853,358,080
    together     11,413,422,080 + 1,189,085,184 + 656,569,532,416 + 1,853,358,080, and norms: 671.03 B
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from backends.plan.architecture import Attention, Experts, LatentAttention, Model

LINEAR = "linear"
EXPERT = "expert"
EMBEDDING = "embedding"
HEAD = "head"
PLAIN = "plain"
"""Kinds. `linear` and `expert` are what quantisation makes small; `plain` (norms, routers, biases, and the projection
of DeepSeek's prediction module) is kept in 16 bits by every scheme here, as embeddings and heads are."""

SPLIT = "split"
COPIED = "copied"
KEYS = "keys"
"""How it is spread with tensor parallelism: divided by it; the same on each GPU; divided among the key-value heads,
of which each GPU has at least one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`copies` matrices of `rows` x `columns` in each of `layers` layers; a token reads `read` of the copies."""

    name: str
    kind: str
    rows: int  # numbers in
    columns: int  # numbers out
    copies: int = 1
    read: int = 1
    layers: int = 1
    spread: str = SPLIT
    attention: bool = False  # with data-parallel attention, on each GPU whole
    row_parallel: bool = False  # divided along `rows`, else along `columns`
    prediction: bool = False  # of the multi-token prediction module, which engines load for speculative decoding only
    per_layer: bool = True  # False: at the ends of the model, so not divided by the stages of a pipeline
    lighter: bool = False  # of layers without experts in a model whose other layers have them

    @property
    def size(self) -> int:
        """Numbers in one of the matrices."""
        return self.rows * self.columns

    @property
    def count(self) -> int:
        """Parameters, all layers and copies together."""
        return self.size * self.copies * self.layers

    @property
    def read_count(self) -> int:
        """Parameters that one token reads. The embedding is a look-up of one row."""
        return self.columns if self.kind == EMBEDDING else self.size * self.read * self.layers


@lru_cache(maxsize=64)
def parts_of(model: Model) -> tuple[Part, ...]:
    """All there are, those of the prediction module included and marked."""
    dense = model.layers if model.experts is None else model.experts.dense_layers
    found: list[Part] = [_table("embedding", EMBEDDING, model)]
    if not model.tied:
        found.append(_table("head", HEAD, model))
    else:
        found[0] = replace(found[0], name="embedding and head", kind=HEAD)
    found.append(Part(name="last norm", kind=PLAIN, rows=1, columns=model.hidden, spread=COPIED, per_layer=False))
    found += _attention(model, model.layers)
    if dense:
        found += _feed_forward(model, dense, lighter=model.experts is not None)
    if model.experts is not None:
        found += _experts(model, model.experts, model.layers - dense)
    if model.prediction_layers:
        found += _prediction(model)
    return tuple(found)


def total(parts: tuple[Part, ...], *, prediction: bool = False) -> int:
    """Parameters of the model, with or without its prediction module."""
    return sum(part.count for part in parts if prediction or not part.prediction)


def active(parts: tuple[Part, ...], *, embedding: bool = True) -> int:
    """Parameters that one token passes through.

    Authors count differently: DeepSeek and OpenAI leave the embedding table out (it is a look-up), Mistral and Qwen
    count it in. `embedding` says which; a table that is the head too is always counted.
    """
    counted = (part for part in parts if not part.prediction)
    return sum(part.count if part.kind == EMBEDDING and embedding else part.read_count for part in counted)


def _table(name: str, kind: str, model: Model) -> Part:
    rows, columns = model.vocabulary, model.hidden
    return Part(name=name, kind=kind, rows=rows, columns=columns, per_layer=False)


def _plain(name: str, size: int, layers: int, *, attention: bool = False, spread: str = COPIED) -> Part:
    return Part(name=name, kind=PLAIN, rows=1, columns=size, layers=layers, attention=attention, spread=spread)


def _attention(model: Model, layers: int) -> Iterator[Part]:
    yield _plain("norms of the layer", 2 * model.hidden, layers)
    if isinstance(model.attention, LatentAttention):
        yield from _latent(model.attention, model.hidden, layers)
    else:
        yield from _grouped(model.attention, model.hidden, layers)


def _grouped(of: Attention, hidden: int, layers: int) -> Iterator[Part]:
    wide, narrow = of.heads * of.head_dim, of.kv_heads * of.head_dim

    def part(name: str, rows: int, columns: int, *, copies: int = 1, spread: str = SPLIT, inner: bool = False) -> Part:
        return Part(
            name=name, kind=LINEAR, rows=rows, columns=columns, copies=copies, read=copies, layers=layers,
            spread=spread, attention=True, row_parallel=inner,
        )  # fmt: skip

    yield part("query", hidden, wide)
    yield part("key and value", hidden, narrow, copies=2, spread=KEYS)
    yield part("output", wide, hidden, inner=True)
    if of.qkv_bias:
        yield _plain("query bias", wide, layers, attention=True, spread=SPLIT)
        yield _plain("key and value biases", 2 * narrow, layers, attention=True, spread=KEYS)
    if of.output_bias:
        yield _plain("output bias", hidden, layers, attention=True)
    if of.head_norms:
        yield _plain("norms of query and key", 2 * of.head_dim, layers, attention=True)
    if of.sinks:
        yield _plain("sinks", of.heads, layers, attention=True, spread=SPLIT)


def _latent(of: LatentAttention, hidden: int, layers: int) -> Iterator[Part]:
    def part(name: str, rows: int, columns: int, *, spread: str = SPLIT, inner: bool = False) -> Part:
        return Part(
            name=name, kind=LINEAR, rows=rows, columns=columns, layers=layers, spread=spread, attention=True,
            row_parallel=inner,
        )  # fmt: skip

    queries = of.heads * (of.nope_dim + of.rope_dim)
    if of.q_rank is None:
        yield part("query", hidden, queries)
    else:
        yield part("query down", hidden, of.q_rank, spread=COPIED)
        yield _plain("query norm", of.q_rank, layers, attention=True)
        yield part("query up", of.q_rank, queries)
    yield part("key-value down", hidden, of.kv_rank + of.rope_dim, spread=COPIED)
    yield _plain("key-value norm", of.kv_rank, layers, attention=True)
    yield part("key-value up", of.kv_rank, of.heads * (of.nope_dim + of.v_dim))
    yield part("output", of.heads * of.v_dim, hidden, inner=True)


def _feed_forward(model: Model, layers: int, *, lighter: bool = False) -> Iterator[Part]:
    for part in _three(model.hidden, model.intermediate, layers, name="feed-forward"):
        yield replace(part, lighter=lighter)
    if model.mlp_bias:
        yield _plain("feed-forward biases", 2 * model.intermediate, layers, spread=SPLIT)
        yield _plain("feed-forward output bias", model.hidden, layers)


def _experts(model: Model, of: Experts, layers: int) -> Iterator[Part]:
    yield Part(name="router", kind=PLAIN, rows=model.hidden, columns=of.count, layers=layers, spread=COPIED)
    if of.router_bias:
        yield _plain("router bias", of.count, layers)
    yield from _three(model.hidden, of.width, layers, name="experts", count=of.count, chosen=of.chosen)
    if of.expert_bias:
        width = 2 * of.width + model.hidden
        yield Part(
            name="expert biases", kind=PLAIN, rows=1, columns=width, copies=of.count, read=of.chosen, layers=layers
        )
    if of.shared:
        yield from _three(model.hidden, of.width * of.shared, layers, name="shared expert")


def _three(hidden: int, width: int, layers: int, *, name: str, count: int = 1, chosen: int = 1) -> Iterator[Part]:
    """Gate and up, then down: the feed-forward part with a gate that all known families have."""
    kind = EXPERT if count > 1 else LINEAR
    yield Part(
        name=f"{name}, gate and up", kind=kind, rows=hidden, columns=width, copies=2 * count, read=2 * chosen,
        layers=layers,
    )  # fmt: skip
    yield Part(
        name=f"{name}, down", kind=kind, rows=width, columns=hidden, copies=count, read=chosen, layers=layers,
        row_parallel=True,
    )  # fmt: skip


def _prediction(model: Model) -> Iterator[Part]:
    """DeepSeek's multi-token prediction: a layer like the last, and what joins it to the model.

    The hub has the embedding and the head a second time in it; engines share them with the model. Source:
    https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md
    """
    count = model.prediction_layers
    inner: list[Part] = [*_attention(model, count)]
    if model.experts is not None:
        inner += _experts(model, model.experts, count)
    else:
        inner += _feed_forward(model, count)
    inner.append(_plain("norms", 3 * model.hidden, count))
    joined = Part(name="joining projection", kind=PLAIN, rows=2 * model.hidden, columns=model.hidden, layers=count)
    inner.append(replace(joined, spread=COPIED))
    for part in inner:
        yield replace(part, name=f"prediction: {part.name}", prediction=True)
    for name, kind in (("embedding", EMBEDDING), ("head", HEAD)):
        table = _table(f"prediction: {name}, a second time", kind, model)
        yield replace(table, layers=count, prediction=True)
