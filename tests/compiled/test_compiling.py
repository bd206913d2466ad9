"""scripts/compiled.py without a compiler: what it copies, and what it says when something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "compiled.py"


def compiled(*options: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *options]
    return subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60, check=False
    )


def test_without_a_compiler_it_says_so_and_touches_nothing(tmp_path: Path) -> None:
    done = compiled("--into", str(tmp_path / "out"), CC="no-such-compiler")
    assert done.returncode == 1
    assert "no C compiler: no-such-compiler is not on the PATH" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    done = compiled("--into", str(tmp_path), CC=sys.executable)  # any program that exists: it is not got to
    assert done.returncode == 1
    assert "holds something else" in done.stderr
    assert (tmp_path / "precious").read_text() == "kept"


def test_compiled_modules_are_installed_beside_their_own_sources_only(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import compiled; from pathlib import Path\n"
        "try: compiled.install(Path(sys.argv[2]), Path(sys.argv[3]))\n"
        "except compiled.Missing as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(SCRIPT.parent), str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "is not the file that was compiled" in done.stdout
    assert not list(tmp_path.iterdir())
