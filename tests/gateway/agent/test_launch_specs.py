"""Settings of a pool as what `backends.launch` is asked for."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from backends.launch.spec import LaunchError, LaunchSpec, SpeculativeSpec
from gateway.agent.specs import gpus_of_server, served_name_of, spec_of
from gateway.config.launch import Launch, Speculative
from gateway.config.schema import Settings
from gateway.config.upstreams import Backend


def backend(launch: dict[str, Any] | None, **settings: Any) -> Backend:
    return Backend.model_validate({"engine": "sglang", "launch": launch, **settings})


def test_a_server_is_what_the_settings_say() -> None:
    launch = {
        "model": "org/model",
        "revision": "abc",
        "count": 3,
        "host": "10.0.0.7",
        "port": 31000,
        "port_step": 10,
        "tp": 4,
        "pp": 2,
        "dp": 1,
        "ep": 4,
        "nodes": 2,
        "node_rank": 1,
        "node_address": "10.0.0.7:20000",
        "dtype": "bfloat16",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8_e5m2",
        "context_tokens": 4096,
        "max_running": 8,
        "memory_fraction": 0.8,
        "speculative": {"algorithm": "EAGLE", "draft_model": "d", "steps": 3, "topk": 1, "draft_tokens": 4},
        "lora": True,
        "max_loras": 3,
        "max_lora_rank": 16,
        "python": "/opt/bin/python",
        "flags": ["--x"],
        "env": {"A": "1"},
        "secret_env": {"B": "2"},
    }
    found = spec_of(
        "pool",
        backend(launch, adapters=[{"name": "a", "path": "/a"}]),
        2,
        served_name="chat",
        name="gpu1-pool-2",
        gpus=(0, 1, 2, 3),
    )
    assert found == LaunchSpec(
        engine="sglang",
        model="org/model",
        served_name="chat",
        host="10.0.0.7",
        port=31020,
        name="gpu1-pool-2",
        index=2,
        revision="abc",
        tp=4,
        pp=2,
        ep=4,
        nodes=2,
        node_rank=1,
        node_address="10.0.0.7:20000",
        dtype="bfloat16",
        quantization="fp8",
        kv_cache_dtype="fp8_e5m2",
        context_tokens=4096,
        max_running=8,
        memory_fraction=0.8,
        speculative=SpeculativeSpec(algorithm="EAGLE", draft_model="d", steps=3, topk=1, draft_tokens=4),
        adapters=(("a", "/a"),),
        lora=True,
        max_loras=3,
        max_lora_rank=16,
        gpus=(0, 1, 2, 3),
        python="/opt/bin/python",
        flags=("--x",),
        env={"A": "1", "B": "2"},
    )


def test_no_setting_is_forgotten() -> None:
    """A setting that is added has to be said, or be one that is for the agent."""
    agents = {"count", "port_step", "gpus_per_server", "secret_env", "start_timeout_s", "stop_timeout_s"}
    assert Launch.model_fields.keys() - {field.name for field in fields(LaunchSpec)} == agents
    assert Speculative.model_fields.keys() == {field.name for field in fields(SpeculativeSpec)}


def test_whoever_starts_it_may_say_where() -> None:
    found = spec_of("p", backend({"model": "m"}), 1, served_name="m", host="::1", port=9, node_rank=0)
    assert (found.host, found.port, found.name, found.gpus) == ("::1", 9, "p-1", None)


ADAPTERS = [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}]


@pytest.mark.parametrize(
    ("settings", "first", "lora"),
    [
        ({}, ["a", "b"], False),
        ({"adapters_load": "on_demand"}, [], True),
        ({"adapter_slots": 2}, ["a", "b"], False),
        ({"adapter_slots": 1}, [], True),
    ],
)
def test_adapters_that_have_room_are_there_from_the_start(
    settings: dict[str, Any], first: list[str], lora: bool
) -> None:
    found = spec_of("p", backend({"model": "m"}, adapters=ADAPTERS, **settings), 0, served_name="m")
    assert ([name for name, _ in found.adapters], found.lora) == (first, lora)


@pytest.mark.parametrize(
    ("models", "more", "name"),
    [
        ({}, {}, "p"),
        ({"chat": {"backend": "other"}}, {}, "p"),
        ({"chat": {"backend": "p"}}, {}, "chat"),
        ({"chat": {"backend": "p", "upstream_model": "org/model"}}, {}, "org/model"),
        ({"chat": {"backend": "p"}}, {"discovery": {"defaults": {"upstream_model": "found"}}}, "found"),
    ],
)
def test_servers_are_named_as_they_are_asked(models: dict[str, Any], more: dict[str, Any], name: str) -> None:
    pools = {"p": {"engine": "sglang", "launch": {"model": "m"}, **more}, "other": {"engine": "sglang"}}
    settings = Settings.model_validate({"models": models, "backends": pools})
    assert served_name_of(settings, "p") == name


def test_gpus_are_those_of_this_machine() -> None:
    assert gpus_of_server(Launch(model="m")) == 1
    assert gpus_of_server(Launch(model="m", tp=8, pp=2, nodes=2)) == 8
    assert gpus_of_server(Launch(model="m", tp=2, dp=4)) == 8


def test_a_pool_without_launch_has_no_servers() -> None:
    with pytest.raises(LaunchError, match=r"backends\.p has no `launch`"):
        spec_of("p", backend(None), 0, served_name="m")
