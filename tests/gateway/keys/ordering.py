"""Gives the commands of keys and tenants, in this process, to a database of the test's own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import main

Said = pytest.CaptureFixture[str]


def ordered(capsys: Said, *arguments: str) -> dict[str, Any]:
    """What a command that is done reports as JSON."""
    code = main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


def refused(capsys: Said, *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command that is not done."""
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = int(str(end.code))
    out, err = capsys.readouterr()
    assert out == ""
    return code, err


def environment_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Names a database in this folder in the environment, and nothing else."""
    for name in list(os.environ):
        if name.startswith("TIDEGATE_"):
            monkeypatch.delenv(name)
    url = f"sqlite:///{folder / 'keys.db'}"
    monkeypatch.setenv("TIDEGATE_DATABASE", url)
    return url
