"""scripts/setup.sh where a machine lacks something: what it says, and that it leaves nothing half made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder of commands with no Python in it, to be the whole PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sh", "dirname", "rm", "ls", "sed", "env"):
        found = next(Path(place) / name for place in ("/usr/bin", "/bin") if (Path(place) / name).exists())
        (folder / name).symlink_to(found)
    return folder


def add_python(tools: Path, name: str, version: str, *, can_make_venv: bool = True) -> None:
    """An interpreter that answers the three questions that the script asks, as one of that version would."""
    minor = int(version.split(".")[1])
    script = f"""#!/bin/sh
case $2 in
    *'print('*) echo {version} ;;
    *version_info*) exit {0 if minor >= 11 else 1} ;;
    *ensurepip*) exit {0 if can_make_venv else 1} ;;
    *) exit 1 ;;
esac
"""
    (tools / name).write_text(script)
    (tools / name).chmod(0o755)


def setup(tools: Path, venv: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the script with nothing in the environment but what is given."""
    return subprocess.run(
        ["/bin/sh", str(ROOT / "scripts" / "setup.sh"), "app"],
        env={"PATH": str(tools), "HOME": str(tools.parent), "VENV": str(venv), **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_machine_without_python_is_told_what_to_install(tools: Path, tmp_path: Path) -> None:
    done = setup(tools, tmp_path / "venv")
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "no working Python" in done.stderr


def test_old_python_is_named_with_its_version(tools: Path, tmp_path: Path) -> None:
    add_python(tools, "python3", "3.9.18")
    done = setup(tools, tmp_path / "venv")
    assert done.returncode == 1
    assert "Found: python3=3.9.18" in done.stderr


def test_missing_venv_names_the_debian_package(tools: Path, tmp_path: Path) -> None:
    add_python(tools, "python3.12", "3.12.3", can_make_venv=False)
    done = setup(tools, tmp_path / "venv")
    assert done.returncode == 1
    assert "sudo apt install python3.12-venv" in done.stderr


def test_python_that_was_asked_for_is_the_only_one_tried(tools: Path, tmp_path: Path) -> None:
    add_python(tools, "python3.12", "3.12.3")
    done = setup(tools, tmp_path / "venv", PYTHON="/nowhere/python3")
    assert done.returncode == 1
    assert "/nowhere/python3" in done.stderr


def test_newest_python_that_can_make_a_venv_is_taken(tools: Path, tmp_path: Path) -> None:
    add_python(tools, "python3.14", "3.14.0", can_make_venv=False)
    add_python(tools, "python3.13", "3.13.2")
    add_python(tools, "python3.11", "3.11.9")
    done = setup(tools, tmp_path / "venv")
    assert "with Python 3.13.2" in done.stdout


def test_venv_that_cannot_be_made_is_not_left_behind(tools: Path, tmp_path: Path) -> None:
    add_python(tools, "python3", "3.11.9")  # says yes to everything, and then cannot make one
    done = setup(tools, tmp_path / "venv")
    assert done.returncode == 1
    assert "could not be made" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_folder_that_is_not_a_venv_is_left_alone(tools: Path, tmp_path: Path) -> None:
    add_python(tools, "python3", "3.11.9")
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").write_text("years of work")
    done = setup(tools, tmp_path / "venv")
    assert done.returncode == 1
    assert "is not a virtual environment" in done.stderr
    assert (tmp_path / "venv" / "thesis.tex").exists()


def test_failed_download_says_so_and_leaves_nothing_half_made(tools: Path, tmp_path: Path) -> None:
    (tools / "python3").symlink_to(sys.executable)
    done = setup(
        tools,
        tmp_path / "venv",
        PYTHON=os.path.realpath(sys.executable),
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",  # the discard port: nothing answers there
        PIP_RETRIES="0",
        PIP_NO_CACHE_DIR="1",
    )
    assert done.returncode == 1
    assert "The installation did not finish" in done.stderr
    assert "Running the same command again is safe" in done.stderr
    assert not (tmp_path / "venv").exists()
