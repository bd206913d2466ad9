"""Virtual environments that engines run in: made once in `.engines/` of the project, and kept while they are right.

Each engine has one of its own, since no two of them agree on their packages. What is there already and still right is
kept, so asking again is quick and safe; what was cut short is begun again.

Linux on x86-64 only: for other systems the CPU build of torch has another name, and nobody has tried.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".engines"

# Where PyTorch publishes its CPU builds. Tried second: a pip that is set up to find them elsewhere is left to it.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


class SetupError(Exception):
    """An engine cannot be set up; the message says what failed and what to do."""


@dataclass(frozen=True, slots=True)
class Environment:
    """One engine's virtual environment."""

    engine: str
    """As people call it: `SGLang`."""
    venv: Path
    requirements: Path
    """Every package pinned, torch on the first line that is none of comment."""
    module: str
    """What runs the server (`python -m`); an installation that cannot import it counts as failed."""
    size_bytes: int
    """Of the whole environment; twice that has to be free, since pip unpacks beside its downloads and caches."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that this engine runs with, beside those that hold for all."""

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    def process_environment(self) -> dict[str, str]:
        """The environment variables of the engine's processes: this machine's CPU, one thread, no model hub."""
        return {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **self.variables,
        }

    def install(self) -> bool:
        """Bring it up to date; says whether there was anything to do. Raises `SetupError`."""
        stamp = Stamp(self.venv, digest(self.requirements, extra=f"{sys.version} {self.venv}"))
        if stamp.matches():
            return False
        self._check_machine()
        say(f"Setting up {self.engine} on the CPU in {self.venv}: {self.size_bytes / 1e9:.1f} GB, some minutes, once")
        shutil.rmtree(self.venv, ignore_errors=True)
        self.venv.parent.mkdir(parents=True, exist_ok=True)
        self.run([sys.executable, "-m", "venv", str(self.venv)], "The virtual environment could not be made.")
        self._install_packages()
        say("  trying whether it starts ...")
        self.run(
            [str(self.python), "-W", "ignore", "-c", f"import {self.module}"], f"{self.engine} cannot be imported."
        )
        stamp.write()
        return True

    def run(self, command: Sequence[str], failure: str) -> None:
        """Run one step; its output is shown only when it fails, after `failure`. Raises `SetupError`."""
        done = subprocess.run(
            ["nice", *command],
            env=self.process_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode != 0:
            last = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-15:])
            raise SetupError("\n".join(part for part in (failure, last) if part))

    def _check_machine(self) -> None:
        system = f"{platform.system()} {platform.machine()}"
        if system != "Linux x86_64":
            raise SetupError(f"This set-up knows Linux on x86-64 only; here it is {system}.")
        FOLDER.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(FOLDER).free, 2 * self.size_bytes
        if free < needed:
            raise SetupError(f"Only {free / 1e9:.1f} GB are free at {FOLDER}; {needed / 1e9:.1f} GB are needed.")

    def _install_packages(self) -> None:
        torch = next(line for line in self.requirements.read_text().splitlines() if line.startswith("torch=="))
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install"]
        pip += ["--no-input", "--quiet", "--progress-bar", "off", "--no-deps"]
        say(f"  installing {torch} ...")
        try:
            self.run([*pip, torch], "")
        except SetupError as first:
            say(f"  pip's own sources have no CPU build; asking {TORCH_INDEX} ...")
            remedy = (
                f"{torch}, a CPU build of PyTorch, could not be installed, neither from pip's own sources nor from\n"
                f"{TORCH_INDEX}. Where that address cannot be reached, have a mirror of it among pip's sources\n"
                f"(PIP_EXTRA_INDEX_URL) or the wheel in a folder (PIP_FIND_LINKS). pip's own sources said:\n{first}"
            )
            self.run([*pip, "--index-url", TORCH_INDEX, torch], remedy)
        say(f"  installing {self.engine} and what it imports ...")
        self.run(
            [*pip, "-r", str(self.requirements)],
            f"The packages of {self.requirements} could not be installed. Usual causes: no way to the package\n"
            "index (network, HTTPS_PROXY, pip's index-url), or no wheels for this Python "
            f"({platform.python_version()}; 3.11 is known to work).",
        )


class Stamp:
    """A file in a folder that says, written last, what the folder was made from."""

    def __init__(self, folder: Path, content: str) -> None:
        self._path = folder / ".ready"
        self._content = content

    def matches(self) -> bool:
        return self._path.is_file() and self._path.read_text() == self._content

    def write(self) -> None:
        self._path.write_text(self._content)


def digest(*files: Path, extra: str = "") -> str:
    """One hash over the contents of the files."""
    sha256 = hashlib.sha256(extra.encode())
    for file in files:
        sha256.update(file.read_bytes())
    return sha256.hexdigest()


def say(text: str) -> None:
    """One line of progress, at once."""
    print(text, flush=True)
