"""Options of `tidegate plan`, without what carries it out."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_plan(parser: argparse.ArgumentParser) -> None:
    """What `tidegate plan` takes."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a known name, a hub's name, or the path of a config.json or its folder",
    )
    parser.add_argument("--list", action="store_true", help="list the models and GPUs that are known by name")
    parser.add_argument("--gpu", metavar="NAME", help="on this kind of GPU (default: a table of all)")
    there = parser.add_mutually_exclusive_group()
    there.add_argument("--gpus", type=_count, metavar="N", help="so many GPUs are there (default: as many as it takes)")
    there.add_argument("--nodes", type=_count, metavar="N", help="so many whole machines are there")
    parser.add_argument(
        "--replica-gpus", type=_count, metavar="N", help="GPUs of one replica (default: what fits best)"
    )
    parser.add_argument(
        "--context", type=_count, default=32_768, metavar="TOKENS", help="prompt and answer together (default 32768)"
    )
    parser.add_argument("--concurrency", type=_count, default=64, metavar="N", help="requests at once (default 64)")
    parser.add_argument(
        "--precision", metavar="NAME", help="bf16, fp16, fp8, int8, int4, mxfp4 or nvfp4 (default: own)"
    )
    parser.add_argument("--kv", choices=("bf16", "fp16", "fp8"), default="bf16", help="of the KV cache (default bf16)")
    parser.add_argument("--engine", metavar="NAME", help="sglang, vllm, trtllm or lmdeploy (default: first that runs)")
    parser.add_argument("--mtp", action="store_true", help="with the prediction module, for speculative decoding")
    parser.add_argument(
        "--dp-attention", action="store_true", help="attention data-parallel (SGLang, latent attention)"
    )
    parser.add_argument("--memory-fraction", type=float, metavar="F", help="instead of the engine's own")
    parser.add_argument("--usd-per-gpu-hour", type=_price, metavar="USD", help="to say what it costs an hour")
    parser.add_argument("--json", action="store_true", help="report as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a configuration of the gateway; needs --gpu")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 100_000_000):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 100000000")
    return int(text)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0 <= price <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price in dollars")
    return price
