"""The command lines against the flags that the engines' own parsers have, and what is refused."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.launch.commands import SETTINGS, command_of, environment_of, launchable
from backends.launch.engines import WORDS
from backends.launch.llamacpp import parse
from backends.launch.spec import LaunchError, LaunchSpec, SpeculativeSpec

RECORDED = Path(__file__).with_name("recorded")
DOCS = Path(__file__).resolve().parents[3] / "docs" / "launching.md"
FLAGS = {
    "sglang": "sglang-0.5.23-flags.json",
    "vllm": "vllm-0.32.0-flags.json",
    "trtllm": "trtllm-flags.json",
    "lmdeploy": "lmdeploy-0.18.0-flags.json",
}
PROGRAM = {"sglang": 3, "vllm": 5, "trtllm": 5, "lmdeploy": 6}
"""Words before the flags."""

EVERYTHING: dict[str, dict[str, Any]] = {
    "sglang": {
        "revision": "main",
        "tp": 16,
        "pp": 2,
        "ep": 16,
        "nodes": 4,
        "node_rank": 1,
        "node_address": "10.0.0.1:20000",
        "dtype": "bfloat16",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e4m3",
        "context_tokens": 32768,
        "max_running": 64,
        "memory_fraction": 0.85,
        "speculative": SpeculativeSpec(algorithm="EAGLE", draft_model="d", steps=3, topk=1, draft_tokens=4),
        "adapters": (("a", "/a"), ("b", "/b")),
        "lora": True,
        "max_loras": 4,
        "max_lora_rank": 16,
    },
    "vllm": {
        "revision": "main",
        "tp": 8,
        "pp": 1,
        "dp": 2,
        "ep": 16,
        "nodes": 2,
        "node_rank": 1,
        "node_address": "[fd00::1]:20000",
        "dtype": "bfloat16",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "context_tokens": 32768,
        "max_running": 64,
        "memory_fraction": 0.85,
        "speculative": SpeculativeSpec(algorithm="EAGLE3", draft_model="d", steps=3),
        "adapters": (("a", "/a"), ("b", "/b")),
        "lora": True,
        "max_loras": 4,
        "max_lora_rank": 16,
    },
    "trtllm": {"revision": "main", "tp": 8, "pp": 2, "ep": 4, "context_tokens": 8192, "max_running": 64}
    | {"memory_fraction": 0.8},
    "lmdeploy": {
        "revision": "main",
        "tp": 8,
        "dp": 8,
        "ep": 8,
        "nodes": 2,
        "node_rank": 0,
        "node_address": "10.0.0.1:20000",
        "dtype": "bfloat16",
        "quantization": "awq",
        "kv_cache_dtype": "int8",
        "context_tokens": 8192,
        "max_running": 64,
        "memory_fraction": 0.8,
        "speculative": SpeculativeSpec(algorithm="eagle3", draft_model="d", steps=3),
        "adapters": (("a", "/a"),),
    },
}


def spec(engine: str, **settings: Any) -> LaunchSpec:
    return LaunchSpec(engine=engine, model="org/model", served_name="chat", **settings)


def parsed(engine: str, words: list[str]) -> dict[str, Any]:
    """The flags as the engine's parser would take them; raises `SystemExit` where it would not."""
    known = json.loads((RECORDED / FLAGS[engine]).read_text())["flags"]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag, taken in known.items():
        if flag == "--help":
            continue
        if taken["values"] == "none":
            parser.add_argument(flag, action="store_true")
        else:
            nargs = "+" if taken["values"] == "many" else None
            parser.add_argument(flag, nargs=nargs, choices=taken.get("choices"))
    found = vars(parser.parse_args(words))
    return {name: value for name, value in found.items() if value not in (None, False)}


@pytest.mark.parametrize("engine", FLAGS)
def test_every_flag_is_one_that_the_engine_has(engine: str) -> None:
    asked = EVERYTHING[engine]
    plain, full = command_of(spec(engine)), command_of(spec(engine, **asked))
    assert plain[0] == sys.executable
    assert full[: len(plain)] == plain
    assert parsed(engine, full[PROGRAM[engine] :]).items() >= parsed(engine, plain[PROGRAM[engine] :]).items()


def test_what_an_engine_is_asked_for_covers_all_it_has_words_for() -> None:
    for engine, asked in EVERYTHING.items():
        spoken = {*WORDS[engine].flags, *WORDS[engine].phrases}
        assert spoken - {"dp", "pp"} <= asked.keys()


def test_sglang_is_told_everything() -> None:
    said = parsed("sglang", command_of(spec("sglang", **EVERYTHING["sglang"], port=31000))[3:])
    assert said == {
        "model_path": "org/model",
        "served_model_name": "chat",
        "host": "127.0.0.1",
        "port": "31000",
        "enable_cache_report": True,
        "enable_metrics": True,
        "revision": "main",
        "tp_size": "16",
        "pp_size": "2",
        "ep_size": "16",
        "nnodes": "4",
        "node_rank": "1",
        "dist_init_addr": "10.0.0.1:20000",
        "dtype": "bfloat16",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e4m3",
        "context_length": "32768",
        "max_running_requests": "64",
        "mem_fraction_static": "0.85",
        "speculative_algorithm": "EAGLE",
        "speculative_draft_model_path": "d",
        "speculative_num_steps": "3",
        "speculative_eagle_topk": "1",
        "speculative_num_draft_tokens": "4",
        "enable_lora": True,
        "lora_paths": ["a=/a", "b=/b"],
        "lora_target_modules": ["all"],
        "max_loras_per_batch": "4",
        "max_lora_rank": "16",
    }


def test_vllm_is_told_everything() -> None:
    command = command_of(spec("vllm", **EVERYTHING["vllm"]))
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "org/model"]
    said = parsed("vllm", command[5:])
    assert json.loads(said.pop("speculative_config")) == {
        "method": "eagle3",
        "model": "d",
        "num_speculative_tokens": 3,
    }
    assert said == {
        "served_model_name": ["chat"],
        "host": "127.0.0.1",
        "port": "30000",
        "enable_prompt_tokens_details": True,
        "shutdown_timeout": "20",
        "revision": "main",
        "tensor_parallel_size": "8",
        "data_parallel_size": "2",
        "enable_expert_parallel": True,
        "nnodes": "2",
        "node_rank": "1",
        "master_addr": "fd00::1",
        "master_port": "20000",
        "headless": True,
        "dtype": "bfloat16",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "max_model_len": "32768",
        "max_num_seqs": "64",
        "gpu_memory_utilization": "0.85",
        "enable_lora": True,
        "lora_modules": ["a=/a", "b=/b"],
        "max_loras": "4",
        "max_lora_rank": "16",
    }


def test_only_the_first_node_of_vllm_answers() -> None:
    several = {"nodes": 2, "tp": 16, "node_address": "10.0.0.1:20000"}
    assert "--headless" not in command_of(spec("vllm", **several, node_rank=0))
    assert "--headless" in command_of(spec("vllm", **several, node_rank=1))


def test_vllm_takes_the_next_larger_rank_that_it_knows() -> None:
    command = command_of(spec("vllm", lora=True, max_lora_rank=17))
    assert command[command.index("--max-lora-rank") + 1] == "32"


def test_llamacpp_is_started_by_the_module_that_we_have() -> None:
    command = command_of(spec("llamacpp", context_tokens=4096, max_running=4, port=31000, flags=("--threads", "2")))
    assert command[:3] == [sys.executable, "-m", "backends.launch.llamacpp"]
    launch = parse(command[3:])
    assert (str(launch.model), launch.alias, launch.port) == ("org/model", "chat", 31000)
    assert (launch.slots, launch.ctx, launch.threads) == (4, 16384, 2)


def test_adapters_that_come_later_need_to_be_announced_to_sglang() -> None:
    with pytest.raises(LaunchError, match=r"launch\.max_lora_rank: SGLang has to be told") as caught:
        command_of(spec("sglang", lora=True))
    assert caught.value.setting == "max_lora_rank"
    said = parsed("sglang", command_of(spec("sglang", lora=True, max_lora_rank=8))[3:])
    assert said["lora_target_modules"] == ["all"]
    own = command_of(spec("sglang", lora=True, max_lora_rank=8, flags=("--lora-target-modules", "q_proj")))
    assert own.count("--lora-target-modules") == 1


NO_WORD = {
    "trtllm": ["nodes", "dp", "dtype", "quantization", "kv_cache_dtype", "speculative", "adapters", "lora"],
    "lmdeploy": ["pp", "lora", "max_loras", "max_lora_rank"],
    "llamacpp": [name for name in SETTINGS if name not in ("context_tokens", "max_running")],
}


@pytest.mark.parametrize(("engine", "setting"), [(engine, name) for engine, names in NO_WORD.items() for name in names])
def test_a_setting_without_a_word_is_refused_by_name(engine: str, setting: str) -> None:
    asked = {
        **EVERYTHING["sglang"],
        "dp": 2,
        "nodes": 2,
        "node_rank": 0,
        "speculative": SpeculativeSpec(algorithm="EAGLE"),
    }
    needed = {"node_rank": 0, "node_address": "10.0.0.1:1"} if setting == "nodes" else {}
    with pytest.raises(LaunchError) as caught:
        command_of(spec(engine, **{setting: asked[setting]}, **needed))
    assert caught.value.setting == setting
    assert WORDS[engine].name in str(caught.value)
    assert f"launch.{setting}" in str(caught.value)


@pytest.mark.parametrize(
    ("engine", "settings", "said"),
    [
        ("openai", {}, "openai is not an engine that can be started"),
        ("sglang", {"tp": 8, "ep": 3}, r"launch\.ep: SGLang spreads experts inside of tp \(8\)"),
        ("vllm", {"tp": 8, "ep": 4}, r"launch\.ep: vLLM spreads experts over all of tp x dp \(8\) or over none"),
        ("trtllm", {"tp": 8, "ep": 3}, r"launch\.ep: TensorRT-LLM"),
        ("trtllm", {"nodes": 2}, "mpirun or Slurm"),
        ("sglang", {"nodes": 2, "dp": 2, "node_address": "h:1"}, r"launch\.dp: SGLang .*--attn-dp-size"),
        ("sglang", {"nodes": 2}, r"launch\.node_address is needed"),
        ("vllm", {"nodes": 2}, r"launch\.node_address is needed"),
        ("vllm", {"nodes": 2, "node_rank": 2}, r"launch\.node_rank: 2 of 2 nodes"),
        ("vllm", {"lora": True, "max_lora_rank": 1024}, "no adapters of more than 512"),
        ("vllm", {"speculative": SpeculativeSpec(algorithm="EAGLE", topk=4)}, r"launch\.speculative\.topk: vLLM"),
        ("lmdeploy", {"speculative": SpeculativeSpec(algorithm="e", draft_tokens=4)}, r"speculative\.draft_tokens"),
    ],
)
def test_what_cannot_be_is_refused(engine: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        command_of(spec(engine, **settings))


def test_sglang_keeps_the_colon_for_adapters() -> None:
    with pytest.raises(LaunchError, match="has a colon"):
        command_of(LaunchSpec(engine="sglang", model="m", served_name="a:b"))


def test_a_command_of_ones_own_is_filled_in_and_nothing_else() -> None:
    words = ("/opt/run.sh", "--at={host}:{port}", "{index}", "{name}", '{"json": {}}')
    command = command_of(spec("openai", command=words, host="10.0.0.5", port=31001, index=1, name="pool-1", tp=8))
    assert command == ["/opt/run.sh", "--at=10.0.0.5:31001", "1", "pool-1", '{"json": {}}']


def test_flags_come_last_and_python_first() -> None:
    command = command_of(spec("sglang", python="/opt/sglang/bin/python", tp=2, flags=("--tp-size", "4")))
    assert command[0] == "/opt/sglang/bin/python"
    assert command[-2:] == ["--tp-size", "4"]


def test_the_environment_has_the_gpus_and_what_was_asked() -> None:
    assert environment_of(spec("sglang")) == {"PYTHONUNBUFFERED": "1"}
    found = environment_of(spec("vllm", gpus=(2, 3), lora=True, env={"HIP_VISIBLE_DEVICES": "0", "A": "b"}))
    assert found == {
        "PYTHONUNBUFFERED": "1",
        "CUDA_VISIBLE_DEVICES": "2,3",
        "HIP_VISIBLE_DEVICES": "0",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "A": "b",
    }
    assert environment_of(spec("sglang", gpus=()))["CUDA_VISIBLE_DEVICES"] == ""


def test_a_spec_does_not_show_its_environment() -> None:
    assert "secret" not in repr(spec("sglang", env={"HF_TOKEN": "secret"}))


def test_the_documented_table_is_the_engines_words() -> None:
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in DOCS.read_text().splitlines() if row[:3] == "| `"
    ]
    table = {row[0].strip("`"): row[1:] for row in rows if row[0].strip("`") in SETTINGS and len(row) == 6}
    assert list(table) == list(SETTINGS)
    for column, engine in enumerate(launchable()):
        for setting, cells in table.items():
            flag = WORDS[engine].flags.get(setting)
            if flag is not None:
                assert cells[column].startswith(f"`{flag}`"), (setting, engine)
            elif setting in WORDS[engine].phrases:
                assert not cells[column].startswith("no"), (setting, engine)
            elif setting == "lora" and engine in ("sglang", "vllm"):
                assert not cells[column].startswith("no")
            else:
                assert cells[column].startswith("no"), (setting, engine)
