"""Policies, regions and spills in the configuration: what is taken, and what is refused where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import ConfigError, Settings, load

ROOT = Path(__file__).parents[3]


def written(**spill: Any) -> dict[str, Any]:
    return {
        "models": {
            "chat": {
                "backend": "pool",
                "spill": {
                    "backend": "rented",
                    "price": {"input": 0.3, "output": 1.2},
                    "usd_per_hour": 5,
                    "usd_per_day": 40,
                    **spill,
                },
            }
        },
        "backends": {
            "pool": {"engine": "sglang", "replicas": [{"url": "http://a"}]},
            "rented": {"engine": "openrouter", "replicas": [{"url": "https://b"}]},
            "own": {"engine": "openai", "replicas": [{"url": "http://c"}]},
            "compatible": {"engine": "openai", "hosted": True, "replicas": [{"url": "http://d"}]},
        },
    }


def loaded(folder: Path, data: dict[str, Any]) -> Settings:
    path = folder / "tidegate.yaml"
    path.write_text(yaml.safe_dump(data))
    return load(path, {})


def problems(folder: Path, data: dict[str, Any]) -> list[tuple[str, str]]:
    with pytest.raises(ConfigError) as refused:
        loaded(folder, data)
    return [(problem.path, str(problem)) for problem in refused.value.problems]


def test_the_example_of_a_spill_says_what_it_means() -> None:
    settings = load(ROOT / "configs" / "spill.yaml", {"OPENROUTER_API_KEY": "k"})
    spill = settings.models["chat"].spill
    assert spill is not None
    assert (spill.ttft_target_ms.standard, spill.ttft_target_ms.batch) == (2500.0, None)
    assert (spill.enter * 2500.0, spill.leave * 2500.0) == (3000.0, 2000.0)
    assert (settings.region, settings.latency_ms["eu-west"]["us-east"]) == ("eu-west", 80.0)


@pytest.mark.parametrize("backend", ["rented", "compatible"])
def test_a_hosted_backend_is_taken_however_it_is_known_to_be_one(tmp_path: Path, backend: str) -> None:
    assert loaded(tmp_path, written(backend=backend)).models["chat"].spill is not None


@pytest.mark.parametrize(
    ("spill", "setting", "words"),
    [
        ({"backend": "rent"}, "backend", '"rent" is not the name of a backend; did you mean rented?'),
        ({"backend": "pool"}, "backend", "is the model's own backend"),
        ({"backend": "own"}, "backend", "are not hosted ones; write hosted: true there, in backends.own"),
        ({"price": {}}, "price", "the ceilings would never be reached"),
        ({"price": {"input": 0, "output": 0.0}}, "price", "the ceilings would never be reached"),
        ({"usd_per_hour": 41}, "usd_per_hour", "41 is more than usd_per_day (40); write at most 40"),
        ({"usd_per_hour": 0}, "usd_per_hour", "0 is too small"),
        ({"usd_per_day": None}, "usd_per_day", "is not a number"),
        ({"enter": 0.9}, "enter", "0.9 is too small; write at least 1"),
        ({"leave": 1.1}, "leave", "1.1 is too large; write at most 1"),
        ({"ttft_target_ms": {"standard": 0}}, "ttft_target_ms.standard", "0 is too small"),
        ({"ttft_target_ms": {"urgent": 1}}, "ttft_target_ms.urgent", "is not a known setting"),
        ({"allow": {"classes": ["urgent"]}}, "allow.classes[0]", '"urgent" is not one of'),
    ],
)
def test_a_bad_spill_is_reported(tmp_path: Path, spill: dict[str, Any], setting: str, words: str) -> None:
    ((path, text),) = problems(tmp_path, written(**spill))
    assert path == f"models.chat.spill.{setting}"
    assert words in text


def test_the_money_has_no_default(tmp_path: Path) -> None:
    data = written()
    for name in ("usd_per_hour", "usd_per_day", "price"):
        del data["models"]["chat"]["spill"][name]
    found = problems(tmp_path, data)
    assert {path.rpartition(".")[2] for path, _ in found} == {"usd_per_hour", "usd_per_day", "price"}
    assert all("is missing" in text for _, text in found)


def test_a_model_with_an_adapter_has_no_spill(tmp_path: Path) -> None:
    data = written()
    data["models"]["chat"]["adapter"] = "a"
    ((path, text),) = problems(tmp_path, data)
    assert path == "models.chat.spill"
    assert "never spills" in text


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("coost", "did you mean cost?"),
        ("no.such.module:thing", "no.such.module"),
        ("json:dumps_all", "dumps_all"),
        ("", "policy"),
    ],
)
def test_a_wrong_policy_is_reported_where_it_stands(tmp_path: Path, policy: str, words: str) -> None:
    data = written()
    data["models"]["chat"]["policy"] = policy
    ((path, text),) = problems(tmp_path, data)
    assert path == "models.chat.policy"
    assert words in text


@pytest.mark.parametrize("policy", ["cost", "lmetric", "routing.policies.balanced:LeastOutstanding"])
def test_policies_are_taken_by_name_and_by_path(tmp_path: Path, policy: str) -> None:
    data = written()
    data["models"]["chat"]["policy"] = policy
    assert loaded(tmp_path, data).models["chat"].policy == policy


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ({"region": "EU West"}, "region"),
        ({"latency_ms": {"eu-west": {"us-east": -1}}}, "latency_ms.eu-west.us-east"),
        ({"latency_ms": {"eu-west": 80}}, "latency_ms.eu-west"),
        ({"latency_ms": {"EU": {"us-east": 80}}}, "latency_ms.EU"),
    ],
)
def test_a_bad_region_or_latency_is_reported(tmp_path: Path, section: dict[str, Any], path: str) -> None:
    ((found, _),) = problems(tmp_path, {**written(), **section})
    assert found == path


def test_a_chat_template_that_is_not_there_is_reported(tmp_path: Path) -> None:
    data = written()
    data["models"]["chat"]["chat_template"] = "/no/such.jinja"
    ((path, message),) = problems(tmp_path, data)
    assert path == "models.chat.chat_template"
    assert '"/no/such.jinja" cannot be read: No such file or directory' in message
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    data["models"]["chat"]["chat_template"] = str(tmp_path / "chat.jinja")
    assert loaded(tmp_path, data).models["chat"].chat_template == tmp_path / "chat.jinja"
