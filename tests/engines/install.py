"""Sets up what the tests on real engines need, once: each engine's environment, and one tiny model for all of them.

    python -m tests.engines.install                 everything
    python -m tests.engines.install sglang          SGLang, and the model

Everything goes into `.engines/` of the project (4.3 GB). What is there already and still right is kept, so running it
again is quick and safe. llama.cpp is not here: its server is a package of the development environment.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.engines.environment import FOLDER, SetupError, Stamp, digest, say
from tests.engines.sglang.environment import SGLANG
from tests.engines.vllm.environment import VLLM

ENGINES = {"sglang": SGLANG, "vllm": VLLM}
MODEL = FOLDER / "model"
"""`hf/` and `model.gguf` are the model; see model.py for what else is there."""
MODEL_MAKER = Path(__file__).resolve().with_name("model.py")


def install(engines: Sequence[str] = ()) -> None:
    """Bring these engines (default: all) and the model up to date. Raises `SetupError`."""
    began_at = time.monotonic()
    # The model is made in SGLang's environment, so that one comes with any.
    wanted = ["sglang", *engines] if engines else list(ENGINES)
    done = [name for name in dict.fromkeys(wanted) if ENGINES[name].install()]
    if make_model() or done:
        say(f"The engines are ready ({time.monotonic() - began_at:.0f} s).")


def make_model() -> bool:
    """Make the model where it is not up to date; says whether there was anything to do. Raises `SetupError`."""
    stamp = Stamp(MODEL, digest(MODEL_MAKER, SGLANG.requirements))
    if stamp.matches():
        return False
    say("Making a tiny model with random weights ...")
    shutil.rmtree(MODEL, ignore_errors=True)
    SGLANG.run([str(SGLANG.python), "-W", "ignore", str(MODEL_MAKER), str(MODEL)], "The model could not be made.")
    stamp.write()
    return True


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        print(f"no such engine: {', '.join(unknown)}; there are {', '.join(ENGINES)}", file=sys.stderr)
        return 2
    try:
        install(names)
    except SetupError as error:
        print(f"\n{error}\nRunning the same command again is safe.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; running the same command again takes it up", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
