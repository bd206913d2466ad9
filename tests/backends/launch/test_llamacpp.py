from __future__ import annotations

import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from backends.launch.llamacpp import LISTENING, Launch, LaunchError, check, main, parse
from gateway.demo.preflight import weights


def gguf(folder: Path) -> Path:
    """A file that begins like a model and is none."""
    path = folder / "model.gguf"
    path.write_bytes(b"GGUF and nothing else")
    return path


def test_command_line_reads_back_as_the_same_launch(tmp_path: Path) -> None:
    launch = Launch(
        model=tmp_path / "a model.gguf",
        alias="chat",
        port=8081,
        ctx=8192,
        slots=4,
        threads=3,
        embeddings=True,
    )
    assert parse(launch.command()[3:]) == launch


def test_what_is_not_given_keeps_its_default(tmp_path: Path) -> None:
    assert parse(["--model", "m.gguf", "--alias", "chat"]) == Launch(model=Path("m.gguf"), alias="chat")


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"cannot read the model .*nowhere\.gguf: No such file"):
        check(Launch(model=tmp_path / "nowhere.gguf", alias="chat"))


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"{}")
    with pytest.raises(LaunchError, match="not a GGUF file"):
        check(Launch(model=path, alias="chat"))


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            check(Launch(model=gguf(tmp_path), alias="chat", port=port))


def test_missing_engine_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # what Python itself does for a module that is not there
    assert main(["--model", str(gguf(tmp_path)), "--alias", "chat"]) == 1
    assert "tidegate[demo]" in capsys.readouterr().err


@pytest.mark.engine
def test_broken_model_ends_with_one_sentence_after_the_engines_log(tmp_path: Path) -> None:
    command = Launch(model=gguf(tmp_path), alias="chat").command()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    # The engine logs from a thread of its own, whose last words may still come after ours on a busy machine.
    said = [line.startswith("llamacpp: llama.cpp refused to start") for line in done.stderr.splitlines()]
    assert sum(said) == 1
    assert any(said[-3:])


@pytest.mark.engine
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_replica_cleanly(number: signal.Signals) -> None:
    model = weights()
    assert model is not None
    command = replace(Launch(model=model, alias="chat"), ctx=512, slots=1).command()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(LISTENING)
            process.send_signal(number)
            assert process.wait(5) == 0
        finally:
            process.kill()  # or leaving the block would wait for it


def test_signal_that_comes_before_the_wait_is_not_missed() -> None:
    """The handler of a signal that came on another thread, or just before the system call, runs all the same."""
    script = """
import os, signal, threading, time
from backends.launch import llamacpp
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # the main thread: another has to take it
def other():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    time.sleep(60)
threading.Thread(target=other, daemon=True).start()
llamacpp.stay("here")
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "here\n"
            process.terminate()
            assert process.wait(5) == 0
        finally:
            process.kill()
