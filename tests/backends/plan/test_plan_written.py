"""The command, the launch commands, the files it writes, and the ready ones in configs/fleets."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from backends.launch.commands import command_of as words_of
from backends.launch.spec import LaunchSpec
from backends.plan.catalogue import INDEX, find
from backends.plan.errors import PlanError
from backends.plan.gpus import GPUS
from gateway.cli import main
from gateway.config import load

ROOT = Path(__file__).parents[3]
FLEETS = sorted((ROOT / "configs" / "fleets").glob("*.yaml"))


def planned(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == code
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_plan_of_deepseek_v3_on_h200(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "deepseek-ai/DeepSeek-V3", "--gpu", "h200", "--usd-per-gpu-hour", "2.5", "--gpus", "8")
    model, (gpu,) = said["model"], said["gpus"]
    assert (model["parameters"], model["kv_bytes_per_token"]) == (671_026_419_200, 70_272)
    assert (model["precision"], round(model["published_bytes"] / 1e9, 1)) == ("fp8", 688.6)
    assert gpu["fits"] is True
    assert (gpu["replica"]["gpus"], gpu["replica"]["split"]) == (8, {"tp": 8, "pp": 1, "ep": 1})
    assert gpu["usd_per_hour"] == 20.0
    assert set(gpu["commands"]) == {"sglang", "vllm", "trtllm", "lmdeploy"}
    words = shlex.split(gpu["commands"]["sglang"][0])
    assert words[words.index("--tp-size") + 1] == "8"


def test_two_machines_get_a_command_each(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "deepseek-v3", "--gpu", "h100", "--nodes", "2")
    commands = said["gpus"][0]["commands"]
    wanted = [
        LaunchSpec(
            engine="sglang",
            model="deepseek-ai/DeepSeek-V3",
            served_name="deepseek-v3",
            tp=16,
            nodes=2,
            node_rank=rank,
            node_address="10.0.0.1:20000",
            context_tokens=32_768,
            python="python3",
        )
        for rank in (0, 1)
    ]
    assert commands["sglang"] == [shlex.join(words_of(spec)) for spec in wanted]
    assert commands["trtllm"][0].startswith("# ")  # what an engine has no word for is said, not left out


def test_without_a_gpu_there_is_a_table_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "deepseek-r1"]) == 0
    text = capsys.readouterr().out
    assert all(gpu.title in text for gpu in GPUS)
    assert "does not fit" in text


def test_one_gpu_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt-oss-120b", "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    assert "116.83 B parameters, 5.13 B of them for each token" in text
    assert "18 layers keep 128 tokens only" in text
    assert "sglang.launch_server" in text
    assert main(["plan", "deepseek-v3", "--gpu", "rtx4090"]) == 1
    assert "It does not fit." in capsys.readouterr().out


def test_list_names_models_and_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--list"]) == 0
    text = capsys.readouterr().out
    assert "deepseek-r1-distill-qwen-32b" in text
    assert "mi300x" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["no-such-model"], "'no-such-model' is neither a known model nor a path"),
        (["deepseek-v3", "--gpu", "v100"], "'v100' is not known"),
        (["deepseek-v3", "--precision", "int3"], "'int3'"),
        (["deepseek-v3", "--engine", "ollama"], "'ollama'"),
        (["llama-3.1-8b", "--mtp"], "num_nextn_predict_layers"),
        (["llama-3.1-8b", "--gpu", "h100", "--gpus", "12"], "whole machines"),
        (["llama-3.1-8b", "--write", "x.yaml"], "--gpu"),
        (["llama-3.1-8b", "--memory-fraction", "2"], "memory_fraction"),
        ([], "which model?"),
    ],
)
def test_bad_questions_are_refused_in_a_sentence(
    words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *words]) == 2
    assert named in capsys.readouterr().err


def test_data_parallel_attention_is_planned_for_every_gpu_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, "deepseek-v3", "--dp-attention")
    found = {gpu["gpu"]: gpu for gpu in said["gpus"]}
    assert found["h200"]["replica"]["dp_attention"] is True
    assert {gpu["engine"] for gpu in found.values()} == {"sglang"}
    assert found["gaudi2"]["refused"][0].startswith("sglang does not run on Gaudi 2 96 GB; vllm does")


def test_many_small_gpus_that_sglangs_own_rule_leaves_nothing_of(capsys: pytest.CaptureFixture[str]) -> None:
    """1 GiB for each 8 GPUs of a replica: 16 of the 24 that each of 128 has."""
    (gpu,) = planned(capsys, "deepseek-v3", "--gpu", "rtx4090", code=1)["gpus"]
    assert "sglang leaves 0.0 GiB of its 24.0 GiB" in gpu["refused"][-1]
    assert gpu["refused"][-1].endswith("keeps 16 GiB of each back for 128 GPUs: --memory-fraction 0.85 leaves 18.7 GiB")
    assert not any("--memory-fraction" in each for each in gpu["refused"][:2])  # one machine or less: it would not help
    (gpu,) = planned(capsys, "deepseek-v3", "--gpu", "rtx4090", "--memory-fraction", "0.85")["gpus"]
    assert gpu["replica"]["gpus"] == 40


def folder_with(tmp_path: Path, config: object, index: object = None) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_a_folder_with_an_index_is_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dict(find("llama-3.1-8b").config)
    folder = folder_with(tmp_path, config, {"metadata": {"total_size": 17_000_000_000}})
    for path in (folder, folder / "config.json"):
        said = planned(capsys, str(path), "--gpu", "h100")
        assert said["model"]["weights_bytes"] == said["model"]["published_bytes"] == 17_000_000_000
        assert said["model"]["checkpoint"] == str(folder)


@pytest.mark.parametrize(
    ("config", "index", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, None, "GemmaForCausalLM"),
        ([], None, "not an object"),
        (dict(find("llama-3.1-8b").config), {"metadata": {"total_size": "big"}}, "total_size"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: object, index: object, named: str
) -> None:
    assert main(["plan", str(folder_with(tmp_path, config, index))]) == 2
    assert named in capsys.readouterr().err


def test_a_file_that_is_no_json_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert main(["plan", str(tmp_path)]) == 2
    assert "not JSON" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "config.json"), "--gpu", "h100"]) == 2


def test_checkpoints_of_other_precisions_are_found_by_their_names() -> None:
    assert find("qwen/qwen3-30b-a3b-fp8").model.native == "fp8"
    assert find("Qwen/Qwen2.5-72B-Instruct-AWQ").model.intermediate == 29_696
    with pytest.raises(PlanError, match="precision nvfp4"):
        find("nvidia/DeepSeek-R1-FP4")


def test_a_precision_without_a_checkpoint_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["llama-3.1-8b", "--gpu", "h100", "--precision"]
    said = planned(capsys, *words, "int4")
    assert said["gpus"][0]["commands"]["sglang"][0].startswith("# no checkpoint")
    assert main(["plan", *words, "int4", "--write", str(tmp_path / "x.yaml")]) == 2
    # FP8 an engine makes itself while it loads.
    said = planned(capsys, *words, "fp8")
    assert "--quantization fp8" in said["gpus"][0]["commands"]["sglang"][0]


@pytest.mark.parametrize(
    "words",
    [
        ["deepseek-v3", "--gpu", "h200", "--mtp", "--kv", "fp8"],
        ["deepseek-v3", "--gpu", "b200", "--dp-attention"],
        ["deepseek-r1", "--gpu", "h100", "--engine", "vllm"],
        ["llama-3.3-70b", "--gpu", "l40s", "--precision", "fp8"],
        ["llama-3.1-8b", "--gpu", "a100-40gb", "--precision", "fp16", "--memory-fraction", "0.8"],
        ["mixtral-8x22b", "--gpu", "mi300x"],
        ["gpt-oss-20b", "--gpu", "rtx4090", "--context", "8192"],
    ],
)
def test_what_is_written_is_accepted(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tidegate.yaml"
    assert main(["plan", *words, "--write", str(file)]) == 0
    assert main(["check", str(file)]) == 0, capsys.readouterr().err
    (name,) = load(file, {}).models
    assert name == find(words[0]).name


def test_a_folder_of_ones_own_is_written_too(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, dict(find("llama-3.2-1b").config))
    file = tmp_path / "tidegate.yaml"
    assert main(["plan", str(folder), "--gpu", "l40s", "--write", str(file)]) == 0
    launch = load(file, {}).backends["pool"].launch
    assert launch is not None
    assert launch.model == str(folder)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "no" / "x.yaml"
    assert main(["plan", "llama-3.1-8b", "--gpu", "h100", "--write", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_the_fleets_that_were_asked_for_are_there() -> None:
    names = {path.stem for path in FLEETS}
    assert {"deepseek-v3-8xh200", "deepseek-v3-2x8xh100", "deepseek-r1-8xb200", "qwen3-235b-8xh100"} <= names
    assert {gpu.name for gpu in GPUS} - {"a100-40gb"} <= {
        words[words.index("--gpu") + 1] for words in map(words_in, FLEETS)
    }


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "plan.md").read_text()
    blocks = [block.partition("```")[0] for block in page.split("```text\n$ tidegate ")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        command, _, shown = block.partition("\n")
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out.startswith(shown.rstrip("\n"))


def test_the_page_names_every_gpu_and_every_ready_configuration() -> None:
    page = (ROOT / "docs" / "plan.md").read_text()
    for gpu in GPUS:
        assert f"| `{gpu.name}` | {gpu.nominal_gb:g} GB | {gpu.driver_mib:,} MiB" in page
    for path in FLEETS:
        assert f"../configs/fleets/{path.name}" in page
        assert f"`tidegate {shlex.join(words_in(path))}`" in page


def words_in(path: Path) -> list[str]:
    """The command in the first line of a ready configuration, without `tidegate`."""
    first = path.read_text().splitlines()[0]
    return shlex.split(first.removeprefix("# Planned by: tidegate "))


@pytest.mark.parametrize("path", FLEETS, ids=lambda path: path.stem)
def test_ready_configurations_are_what_the_plan_writes(path: Path, tmp_path: Path) -> None:
    """Each says in its first line how it was made; `tidegate check` accepts it."""
    again = tmp_path / path.name
    assert main([*words_in(path), "--write", str(again)]) == 0
    assert again.read_text() == path.read_text()
    assert main(["check", str(path)]) == 0
    pool = load(path, {}).backends["pool"]
    assert pool.launch is not None
    assert not pool.replicas
