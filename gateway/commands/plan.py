"""`tidegate plan`: what a model needs on which GPUs. Arithmetic alone: no gateway, network or GPU is asked."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.plan.catalogue import Known, find, known_models
from backends.plan.errors import PlanError
from backends.plan.gpus import GPUS, Gpu, gpu_named
from backends.plan.parameters import parts_of, total
from backends.plan.report import Asked, gpu_lines, gpu_report, model_lines, model_report, table_rows
from backends.plan.units import billions, gib
from backends.plan.written import configuration
from gateway.operate import DONE, plain, print_table

_FAILED = 1
_USAGE_ERROR = 2


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Print the plan; returns the exit code: 1 where it fits nowhere that was asked about, 2 for a bad question."""
    if options.list:
        return _list(options.json)
    try:
        return _plan(options)
    except PlanError as error:
        print(f"tidegate plan: {error}", file=sys.stderr)
        return _USAGE_ERROR


def _plan(options: argparse.Namespace) -> int:
    if options.model is None:
        raise PlanError("which model? tidegate plan --list shows those that are known by name")
    kinds = [gpu_named(options.gpu)] if options.gpu else list(GPUS)
    if options.write is not None and len(kinds) > 1:
        raise PlanError("--write needs --gpu: a file is for one kind of GPU")
    known = find(options.model)
    model, found, written = None, [], None
    for gpu in kinds:
        asked = asked_of(options, gpu, known=known)
        advice, checkpoint = asked.advice(gpu)
        model = model or model_report(asked, advice.question, checkpoint)
        found.append(gpu_report(advice, checkpoint, options.usd_per_gpu_hour))
        if options.write is not None and advice.chosen is not None:
            written = configuration(asked, advice, checkpoint, command=command_of(options))
    assert model is not None
    if options.json:
        print(json.dumps({"model": model, "gpus": found, "question": _question(options)}))
    else:
        _show(options, model, found)
    if written is not None:
        _write(options.write, written)
    return DONE if any(each["fits"] for each in found) else _FAILED


def asked_of(options: argparse.Namespace, gpu: Gpu, *, known: Known | None = None) -> Asked:
    """The options as a question about one kind of GPU."""
    return Asked(
        known=known or find(options.model),
        precision=options.precision,
        kv=options.kv,
        engine=options.engine,
        context_tokens=options.context,
        concurrency=options.concurrency,
        prediction=options.mtp,
        dp_attention=options.dp_attention,
        memory_fraction=options.memory_fraction,
        gpus=options.gpus if options.nodes is None else options.nodes * gpu.per_node,
        replica_gpus=options.replica_gpus,
        usd_per_gpu_hour=options.usd_per_gpu_hour,
    )


def command_of(options: argparse.Namespace) -> str:
    """The command that was given, without what only says where the answer goes."""
    words = ["tidegate", "plan", options.model]
    for name in ("gpu", "gpus", "nodes", "replica_gpus", "precision", "engine", "memory_fraction"):
        if getattr(options, name) is not None:
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name, usual in (("context", 32_768), ("concurrency", 64), ("kv", "bf16")):
        if getattr(options, name) != usual:
            words += [f"--{name}", str(getattr(options, name))]
    words += ["--mtp"] if options.mtp else []
    words += ["--dp-attention"] if options.dp_attention else []
    return shlex.join(words)


def _question(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("gpu", "gpus", "nodes", "context", "concurrency", "kv", "engine")}


def _show(options: argparse.Namespace, model: dict[str, Any], found: list[dict[str, Any]]) -> None:
    for line in model_lines(model):
        print(plain(line))
    print()
    if len(found) > 1:
        print_table(table_rows(found))
        print("\nLEAST: GPUs of the smallest replica that fits. REPLICA: of the one that serves the concurrency with")
        print(f"fewest GPUs. AT ONCE: requests of {options.context} tokens on it. TOKENS/S: a bound, for one request.")
        for each in found:
            if not each["fits"] and each["refused"]:
                print(f"{each['refused'][-1]}")
        return
    for line in gpu_lines(found[0], context_tokens=options.context, concurrency=options.concurrency):
        print(plain(line))
    for engine, lines in found[0].get("commands", {}).items():
        other = "" if engine == found[0]["engine"] else f" (the figures are {found[0]['engine']}'s; --engine {engine})"
        print(f"\n{engine}:{other}")
        for line in lines:
            print(f"  {plain(line)}")
    print("\nsources:", model["configuration"], *found[0]["sources"], sep="\n  ")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"cannot write {file}: {error.strerror}") from error
    print(f"wrote {file}", file=sys.stderr)


def _list(as_json: bool) -> int:
    models = known_models()
    if as_json:
        listed = [{"name": each.name, "hub": each.hub, "aliases": list(each.aliases)} for each in models]
        gpus = [{"name": gpu.name, "title": gpu.title, "memory_bytes": gpu.memory_bytes} for gpu in GPUS]
        print(json.dumps({"models": listed, "gpus": gpus}))
        return DONE
    rows = [(each.name, billions(total(parts_of(each.model))), each.hub) for each in models]
    print_table([("MODEL", "PARAMETERS", "HUB"), *rows])
    print()
    print_table([("GPU", "", "MEMORY"), *((gpu.name, gpu.title, gib(gpu.memory_bytes)) for gpu in GPUS)])
    return DONE
