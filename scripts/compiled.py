"""Compiles the path of a request to C with mypyc: ``make test-compiled``, ``docker build --build-arg COMPILED=1``.

Copies this work tree to `.compiled/` and compiles `MODULES` there, in place; `python -m gateway serve` from there is
the same gateway on less CPU. Never beside the sources: Python prefers a compiled module to the file beside it, so an
old one would hide every later change of that file. Nothing of the gateway needs this; docs/adr/0014 says what it is.

Exit codes: 0 compiled (or nothing to do), 1 something is missing or did not compile; the message says what.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTO = ".compiled"
PACKAGES = ("gateway", "backends", "routing")
GROUP = "tidegate"
"""All compiled modules are one library, `tidegate__mypyc`, so that they call each other without Python in between."""
STAMP = ".stamp"
MARK = ".made-by-compiled"
"""A folder without this file is somebody else's, and is not emptied."""
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"

MODULES = (
    "routing/beliefs.py",
    "routing/blocks.py",
    "routing/calibration.py",
    "routing/filters.py",
    "routing/fit.py",
    "routing/health.py",
    "routing/index.py",
    "routing/keys.py",
    "routing/learned.py",
    "routing/policies/cost.py",
    "routing/prefix.py",
    "routing/retry_budget.py",
    "routing/router.py",
    "routing/shadow.py",
    "routing/types.py",
    "routing/work.py",
)
"""What is compiled. A module earns its place by a gain that was measured and by tests that pass; docs/adr/0014 says
which were tried and left out."""


class Missing(Exception):
    """Something that compiling needs is not here, or refused; the message says what, and what to do."""


def modules() -> list[str]:
    """The names under which `MODULES` are imported."""
    return [path.removesuffix(".py").replace("/", ".") for path in MODULES]


def needs() -> None:
    """Raises `Missing` for the first thing that is not here."""
    for package in ("mypy", "setuptools"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise Missing(
                f"{package} is not installed for {sys.executable}: "
                "pip install --no-deps --require-hashes -r requirements/compile.txt"
            ) from None
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        short = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Missing(
            f"Python's own headers are missing ({header}). On Debian and Ubuntu: apt install python{short}-dev"
        )
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        raise Missing(f"no C compiler: {compiler} is not on the PATH. On Debian and Ubuntu: apt install gcc libc6-dev")


def files(source: Path) -> list[str]:
    """What is copied: what git tracks and what it would (new files); where there is no git, the packages alone."""
    listed: list[str] = []
    if (source / ".git").exists():
        command = ["git", "-C", str(source), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
    if not listed:
        found = (path for top in PACKAGES for path in (source / top).rglob("*") if "__pycache__" not in path.parts)
        listed = ["pyproject.toml", *(str(path.relative_to(source)) for path in found)]
    return sorted({name for name in listed if name and (source / name).is_file() and not name.endswith(".so")})


def artifacts() -> list[str]:
    """What compiling leaves in the copy, and what an installation needs of it."""
    return [f"{GROUP}__mypyc{SUFFIX}", *(str(Path(name).with_suffix(SUFFIX)) for name in MODULES)]


def copy(source: Path, into: Path, names: Iterable[str], kept: Iterable[str]) -> None:
    """Make `into` hold these files, those of its own that are kept, and nothing else."""
    into.mkdir(parents=True, exist_ok=True)
    (into / MARK).touch()
    wanted = {into / name for name in (MARK, *names, *kept)}
    for path in [path for path in into.rglob("*") if path.is_file() and path not in wanted]:
        path.unlink()
    for name in names:
        old, new = into / name, source / name
        if not old.exists() or old.read_bytes() != new.read_bytes():
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(new, old)


def fingerprint(source: Path, names: Iterable[str]) -> str:
    """Changes with everything that can change what is compiled: sources, settings, versions, this file."""
    tools = [importlib.metadata.version(name) for name in ("mypy", "setuptools")]
    seen = hashlib.sha256("\n".join([*tools, sys.version, str(sysconfig.get_config_var("CC"))]).encode())
    seen.update(Path(__file__).read_bytes())
    for name in names:
        if name == "pyproject.toml" or (name.endswith(".py") and name.split("/")[0] in PACKAGES):
            seen.update(f"\0{name}\0".encode())
            seen.update((source / name).read_bytes())
    return seen.hexdigest()


def build(folder: Path) -> None:
    """Compile `MODULES` in place, in a folder that holds the sources. Ends the process where mypy finds an error."""
    # Here, since the rest of this file must be able to say that these two are missing.
    from mypyc.build import mypycify  # imports setuptools or distutils by itself, in the order that it needs
    from setuptools import Distribution

    before = Path.cwd()
    os.chdir(folder)  # mypyc and setuptools name modules by paths from here
    try:
        options = [
            "--config-file=pyproject.toml",
            # `make check` is where types are checked. Here a package that only other modules import may be absent.
            *("--ignore-missing-imports", "--no-warn-unused-ignores", "--hide-error-context"),
        ]
        extensions = mypycify(
            [*options, *MODULES], opt_level="3", debug_level="0", group_name=GROUP, target_dir="build/mypyc"
        )
        # Not setup(): that would read pyproject.toml, whose build is hatchling's.
        command = Distribution({"name": "tidegate-compiled", "ext_modules": extensions}).get_command_obj("build_ext")
        command.inplace = 1
        command.ensure_finalized()
        command.run()
    finally:
        os.chdir(before)
    missing = [name for name in MODULES if not (folder / name).with_suffix(SUFFIX).exists()]
    if missing:
        raise Missing(f"the compiler left nothing for {', '.join(missing)}")


def current(source: Path, into: Path) -> bool:
    """Whether the compiled copy is of these sources, by these tools."""
    stamp = into / STAMP
    return stamp.exists() and stamp.read_text() == fingerprint(source, files(source))


def compile_tree(source: Path, into: Path) -> bool:
    """Bring the copy up to date; False where nothing had to be compiled. Raises `Missing`."""
    needs()
    if into.exists() and any(into.iterdir()) and not (into / MARK).exists():
        raise Missing(f"{into} holds something else, which would be deleted; move it away or name another folder")
    names = files(source)
    if current(source, into):
        copy(source, into, names, [STAMP, *artifacts()])
        return False
    now = fingerprint(source, names)
    copy(source, into, names, [])
    build(into)
    shutil.rmtree(into / "build", ignore_errors=True)
    shutil.rmtree(into / ".mypy_cache", ignore_errors=True)
    (into / STAMP).write_text(now)
    return True


def install(compiled: Path, site: Path) -> int:
    """Copy the compiled modules beside the installed sources of the same version; returns how many files."""
    for name in MODULES:
        if not (site / name).exists() or (site / name).read_bytes() != (compiled / name).read_bytes():
            raise Missing(f"{site / name} is not the file that was compiled: install this version's wheel there first")
    for name in artifacts():
        shutil.copy2(compiled / name, site / name)
    return len(artifacts())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/compiled.py", description=__doc__)
    parser.add_argument("--into", type=Path, default=ROOT / INTO, help=f"the compiled copy (default: {INTO})")
    parser.add_argument("--install", type=Path, metavar="SITE", help="then copy it beside an installed Tidegate")
    parser.add_argument("--check", action="store_true", help="only say whether the compiled copy is of these sources")
    options = parser.parse_args(argv)
    into = options.into.resolve()
    if options.check:
        return 0 if current(ROOT, into) else 1
    began = time.monotonic()
    try:
        fresh = compile_tree(ROOT, into)
        took = f"in {time.monotonic() - began:.0f} s" if fresh else "already; nothing has changed"
        print(f"{len(MODULES)} modules compiled {took}: {into}")
        if options.install:
            print(f"{install(into, options.install)} files copied to {options.install}")
    except Missing as error:
        print(f"cannot compile: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
