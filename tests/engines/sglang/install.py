"""Sets up a real SGLang for the tests, once: an environment of its own, and a tiny model made on the spot.

    python -m tests.engines.sglang.install

Everything goes into `.engines/sglang` of the project: `venv/` (1.8 GB) and `model/` (10 MB). It runs on this machine's
CPU, and asks no model hub for anything. What is there already and still right is kept, so running it again is quick
and safe; a run that was cut short is begun again.

Linux on x86-64 only: for other systems the CPU build of torch has another name, and nobody has tried.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[2] / ".engines" / "sglang"
VENV = FOLDER / "venv"
PYTHON = VENV / "bin" / "python"
MODEL = FOLDER / "model"
STUBS = HERE / "stubs"
REQUIREMENTS = HERE / "requirements.txt"
MODEL_MAKER = HERE / "model.py"

# Where PyTorch publishes its CPU builds. Tried second: a pip that is set up to find them elsewhere is left to it.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = 4_000_000_000
"""1.8 GB in the end; pip unpacks beside its downloads, and keeps a cache."""


class SetupError(Exception):
    """The engine cannot be set up; the message says what failed and what to do."""


def install() -> None:
    """Bring the environment and the model up to date. Raises `SetupError`."""
    environment = _Stamp(VENV, _digest(REQUIREMENTS, extra=f"{sys.version} {VENV}"))
    model = _Stamp(MODEL, _digest(MODEL_MAKER, REQUIREMENTS))
    if environment.matches() and model.matches():
        return
    began_at = time.monotonic()
    if not environment.matches():
        _check_machine()
        _say(f"Setting up SGLang on the CPU in {VENV}: 1.8 GB, some minutes, this happens once")
        shutil.rmtree(VENV, ignore_errors=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(VENV)], "The virtual environment could not be made.")
        _install_packages()
        _say("  trying whether it starts ...")
        _run([str(PYTHON), "-W", "ignore", "-c", "import sglang.launch_server"], "SGLang cannot be imported.")
        environment.write()
    _say("Making a tiny model with random weights ...")
    shutil.rmtree(MODEL, ignore_errors=True)
    _run([str(PYTHON), "-W", "ignore", str(MODEL_MAKER), str(MODEL)], "The model could not be made.")
    model.write()
    _say(f"SGLang is ready ({time.monotonic() - began_at:.0f} s).")


def engine_environment() -> dict[str, str]:
    """The environment variables that SGLang runs with: the CPU, the stubs, and no model hub."""
    return {
        **os.environ,
        "PYTHONPATH": str(STUBS),
        "SGLANG_USE_CPU_ENGINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


class _Stamp:
    """A file in a folder that says, written last, what the folder was made from."""

    def __init__(self, folder: Path, content: str) -> None:
        self._path = folder / ".ready"
        self._content = content

    def matches(self) -> bool:
        return self._path.is_file() and self._path.read_text() == self._content

    def write(self) -> None:
        self._path.write_text(self._content)


def _check_machine() -> None:
    system = f"{platform.system()} {platform.machine()}"
    if system != "Linux x86_64":
        raise SetupError(f"This set-up knows Linux on x86-64 only; here it is {system}.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(FOLDER).free
    if free < NEEDED_BYTES:
        raise SetupError(f"Only {free / 1e9:.1f} GB are free at {FOLDER}; {NEEDED_BYTES / 1e9:.0f} GB are needed.")


def _install_packages() -> None:
    torch = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["--no-input", "--quiet", "--progress-bar", "off", "--no-deps"]
    _say(f"  installing {torch} ...")
    try:
        _run([*pip, torch], "")
    except SetupError as first:
        _say(f"  pip's own sources have no CPU build; asking {TORCH_INDEX} ...")
        remedy = (
            f"{torch}, a CPU build of PyTorch, could not be installed, neither from pip's own sources nor from\n"
            f"{TORCH_INDEX}. Where that address cannot be reached, have a mirror of it among pip's sources\n"
            f"(PIP_EXTRA_INDEX_URL) or the wheel in a folder (PIP_FIND_LINKS). pip's own sources said:\n{first}"
        )
        _run([*pip, "--index-url", TORCH_INDEX, torch], remedy)
    _say("  installing SGLang and what it imports ...")
    _run(
        [*pip, "-r", str(REQUIREMENTS)],
        f"The packages of {REQUIREMENTS.name} could not be installed. Usual causes: no way to the package index\n"
        "(network, HTTPS_PROXY, pip's index-url), or no wheels for this Python "
        f"({platform.python_version()}; 3.11 is known to work).",
    )


def _run(command: Sequence[str], failure: str) -> None:
    """Run one step; its output is shown only when it fails."""
    done = subprocess.run(
        ["nice", *command],
        env=engine_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        last = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-15:])
        raise SetupError("\n".join(part for part in (failure, last) if part))


def _digest(*files: Path, extra: str = "") -> str:
    digest = hashlib.sha256(extra.encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    try:
        install()
    except SetupError as error:
        print(f"\n{error}\nRunning the same command again is safe.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; running the same command again takes it up", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
