from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from backends.launch.tether import main, tethered

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="no other kernel ties a child to its parent")


def test_command_runs_unchanged_and_its_exit_code_comes_back() -> None:
    command = tethered([sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(7)", "two words", "-x"])
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (7, "['two words', '-x']\n")


def test_unknown_command_is_reported() -> None:
    done = subprocess.run(tethered(["no-such-command"]), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 127
    assert "cannot run no-such-command" in done.stderr


def test_usage_is_printed_for_a_wrong_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["not-a-pid", "true"]) == 2
    assert capsys.readouterr().err.startswith("usage:")


@only_linux
def test_command_is_not_started_for_a_parent_that_is_gone() -> None:
    command = tethered([sys.executable, "-c", "print('started')"])
    command[3] = "1"  # the parent's pid, after [python, -m, module]: not ours
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "not started" in done.stderr


@only_linux
def test_child_ends_when_its_parent_is_killed() -> None:
    # The parent starts a tethered child that would wait for minutes, and waits to be killed. Both hold the
    # same pipe as standard output: it reads as ended only when neither lives.
    parent = textwrap.dedent(
        """
        import subprocess, sys, time
        from backends.launch.tether import tethered
        waiting = "import time; print('ready', flush=True); time.sleep(600)"
        subprocess.Popen(tethered([sys.executable, "-c", waiting]))
        time.sleep(600)
        """
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.communicate(timeout=30)
