"""The README's commands and code, run as they stand there: the real SDK, the real gateway, the real engine."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from backends.launch.tether import tethered
from gateway.config import load
from gateway.demo.fleet import MODEL, Ports, gateway_config, token_file
from gateway.demo.welcome import sdk_example
from loadtests.ports import free_port
from tests.llamacpp import LlamaCpp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@contextmanager
def serving(config: Path, *options: str) -> Iterator[None]:
    """`tidegate serve` with a file, until the block ends; it must then stop cleanly."""
    command = [sys.executable, "-m", "gateway", "serve", "--log-format=text", "--config", str(config), *options]
    log = config.with_suffix(".log")
    with log.open("wb") as file, subprocess.Popen(tethered(command), stdout=file, stderr=file) as process:
        try:
            yield
        finally:
            process.terminate()
            code = process.wait(20)
    assert code == 0, log.read_text()


def wait_until_ready(address: tuple[str, int] | str, log: Path) -> None:
    """Wait until the gateway takes connections: it does so only when it is ready to answer."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    deadline = time.monotonic() + 20
    while True:
        with socket.socket(family) as probe:
            if probe.connect_ex(address) == 0:
                return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory, llamacpp_replica: LlamaCpp) -> Iterator[Ports]:
    """The gateway in front of one real replica, with the demo's configuration."""
    folder = tmp_path_factory.mktemp("readme")
    ports = Ports(free_port(), free_port())
    token_file(folder).write_text("a-token-long-enough-to-be-taken\n")
    config = folder / "tidegate.yaml"
    config.write_text(yaml.safe_dump(gateway_config(ports, {"one": llamacpp_replica.url}, folder)))
    with serving(config):
        wait_until_ready(("127.0.0.1", ports.server), config.with_suffix(".log"))
        yield ports


def here(text: str, ports: Ports) -> str:
    """The README's text, with this test's port."""
    return text.replace("127.0.0.1:7400", f"127.0.0.1:{ports.server}")


def run_python(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environ},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.engine
def test_sdk_example_prints_the_real_models_answer(ports: Ports) -> None:
    assert "force" in run_python(here(blocks("python")[0], ports))


@pytest.mark.engine
def test_sdk_example_of_the_demos_welcome_runs(ports: Ports) -> None:
    assert "force" in run_python(sdk_example(ports))


@pytest.mark.engine
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_line_answers(ports: Ports) -> None:
    line = next(block for block in blocks("sh") if block.startswith("curl "))
    done = subprocess.run(
        ["sh", "-c", here(line, ports).replace("curl ", "curl --silent --show-error --fail ", 1)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"finish_reason"' in done.stdout


@pytest.mark.engine
def test_sidecar_example_answers_over_the_socket(tmp_path: Path, llamacpp_replica: LlamaCpp) -> None:
    path = tmp_path / "tidegate.sock"
    config = tmp_path / "sidecar.yaml"
    settings = yaml.safe_load((ROOT / "configs" / "sidecar.yaml").read_text())
    (backend,) = settings["backends"].values()
    backend["replicas"] = [{"url": llamacpp_replica.url}]
    config.write_text(yaml.safe_dump(settings))
    example = blocks("python")[1].replace("/tmp/tidegate.sock", str(path))
    (model,) = settings["models"]
    question = f"""
answer = client.completions.create(model={model!r}, prompt="One, two,", max_tokens=4)
print(answer.choices[0].text)
"""
    with serving(config, "--uds", str(path)):
        wait_until_ready(str(path), config.with_suffix(".log"))
        assert run_python(example + question).strip()


def test_configuration_examples_are_accepted(tmp_path: Path) -> None:
    example, with_keys, found = blocks("yaml")
    file = tmp_path / "tidegate.yaml"
    file.write_text(example)
    assert load(file, {}).models["chat"].aliases == ("gpt-4o-mini",)
    file.write_text(example + with_keys)
    settings = load(file, {})
    assert (settings.auth, settings.tenants["search"].weight) == ("keys", 4)
    file.write_text("models: {chat: {backend: pool}}\n" + found)
    assert load(file, {}).backends["pool"].replicas == ()


def test_every_make_target_and_file_that_is_mentioned_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        code = "".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        for target in re.findall(r"^make (?:[A-Z]+=\S+ )*([a-z-]+)", code, re.MULTILINE):
            assert f"\n{target}:" in makefile, f"{page}: make {target}"
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert urlsplit(link).scheme or (ROOT / link).exists(), f"{page}: {link}"


def test_model_of_the_examples_is_the_demos() -> None:
    assert all(f'"{MODEL}"' in example for example in [blocks("python")[0], blocks("sh")[1]])
