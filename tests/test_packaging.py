"""What is shipped: the wheel, the locks, the container file."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("gateway", "backends", "routing", "loadtests/simulator")
LOCKS = ("app", "demo", "dev", "build", "cluster")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = folder.glob("tidegate-*.whl")
    return path


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    shipped = {name for name in names if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert sources <= shipped
    static = ROOT / "gateway" / "dashboard" / "static"
    files = {str(path.relative_to(ROOT)) for path in static.rglob("*") if path.is_file()}
    assert any(name.endswith("index.html") for name in files)
    assert files <= shipped
    assert {name for name in shipped if not name.startswith(tuple(f"{package}/" for package in PACKAGES))} == {
        "loadtests/__init__.py",
        "loadtests/fits/engines.json",
    }
    assert not [name for name in shipped if "__pycache__" in name]
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_wheel_runs_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*pip, "--no-index", "--target", str(target), str(wheel)], check=True, capture_output=True, timeout=120
    )
    code = f"import sys; sys.path.insert(0, {str(target)!r}); from gateway.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "version", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == PROJECT["version"]
    # matplotlib is no part of it, and not asked for.
    simulate = ["simulate", "--workload", "distinct", "--policies", "round_robin", "--seeds", "1", "--size", "50"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *simulate, "--replicas", "1", "--store", str(tmp_path / "store.json")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert done.returncode == 0, done.stderr
    assert "round_robin" in done.stdout


def imported_modules() -> set[str]:
    """The top-level name of every module that the packages import, wherever in a file that is."""
    modules = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    modules.add(node.module.partition(".")[0])
    return modules - set(sys.stdlib_module_names) - {package.partition("/")[0] for package in PACKAGES}


NAMESPACES = {"opentelemetry": {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"}}
"""Names that several distributions share, and which of those are ours to declare: the others are theirs."""
OPTIONAL = ("demo", "kubernetes", "plots", "postgres", "tokenizer")
"""Extras that bring what is imported only where it is asked for."""


def test_declared_dependencies_are_the_ones_imported() -> None:
    distributions = packages_distributions()
    imported = {
        canonicalize_name(distributions[module][0]) for module in imported_modules() if module not in NAMESPACES
    } | NAMESPACES["opentelemetry"]
    optional = PROJECT["optional-dependencies"]
    extras = {canonicalize_name(Requirement(text).name) for name in OPTIONAL for text in optional[name]}
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    # pydantic pins its core exactly and re-exports from it; it is not ours to pin.
    assert imported - extras - {"pydantic-core"} == declared


def pins(lock: str) -> dict[str, str]:
    """The versions in a lock file."""
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    found = re.findall(r"^([a-z0-9-]+)(?:\[[^]]*\])?==([^ ;\\]+)", text, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_pins_and_hashes_everything_and_names_no_address(lock: str) -> None:
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    for entry in re.split(r"\n(?=\S)", text):
        if not entry.startswith("#"):
            assert re.match(r"[a-z0-9-]+(\[[^]]*\])?==", entry), entry
            assert "--hash=sha256:" in entry, entry
    assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links", text)


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("app", []),
        ("demo", ["demo"]),
        ("dev", ["demo", "dev"]),
        ("build", None),
        ("cluster", ["kubernetes", "postgres"]),
    ],
)
def test_lock_satisfies_what_the_project_declares(lock: str, extras: list[str] | None) -> None:
    if extras is None:
        lines = (ROOT / "requirements" / "build.in").read_text().splitlines()
        declared = [line for line in lines if not line.startswith("#")]
    else:
        optional = PROJECT["optional-dependencies"]
        declared = PROJECT["dependencies"] + [text for extra in extras for text in optional[extra]]
    locked = pins(lock)
    for text in declared:
        requirement = Requirement(text)
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), text


def test_locks_agree_with_each_other() -> None:
    widest = pins("dev")
    for lock in LOCKS:
        for name, version in pins(lock).items():
            assert widest[name] == version, f"{lock}.txt: {name}"


def test_changelog_speaks_of_this_version_or_of_one_to_come() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{PROJECT['version']}]" in text


def instructions(stage: int) -> list[tuple[str, str]]:
    """One stage of the Dockerfile as (instruction, rest); continued lines joined, comments dropped."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    found: list[list[tuple[str, str]]] = []
    for line in lines:
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest.strip()))
    return found[stage]


def test_container_runs_as_a_numbered_user_without_root() -> None:
    (user,) = [rest for word, rest in instructions(-1) if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_container_needs_no_shell() -> None:
    last = instructions(-1)
    assert not [rest for word, rest in last if word == "RUN"]
    for word, rest in last:
        if word in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(rest), list)
        if word == "HEALTHCHECK":
            assert isinstance(json.loads(rest.partition("CMD ")[2]), list)
    assert {"ENTRYPOINT", "CMD", "HEALTHCHECK"} <= {word for word, _ in last}


def test_container_images_are_pinned_to_a_supported_python() -> None:
    for stage in (0, 1):
        word, rest = instructions(stage)[0]
        assert word == "FROM"
        match = re.match(r"python:3\.(\d+)-slim\b", rest)
        assert match
        assert int(match[1]) >= 11


def test_what_the_container_copies_exists_and_is_let_in() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for stage in (0, 1):
        for word, rest in instructions(stage):
            if word == "COPY" and not rest.startswith("--from"):
                # What --build-arg can put there is one of the lock files.
                locks = [rest.replace("${LOCK}", lock) for lock in ("app", "cluster")]
                for source in dict.fromkeys(source for each in locks for source in each.split()[:-1]):
                    assert (ROOT / source).exists(), source
                    assert f"!{source}" in ignore, source


def test_container_installs_only_what_is_locked() -> None:
    for word, rest in instructions(0):
        if word == "RUN":
            for command in re.findall(r"pip install ([^&]*)", rest):
                assert "--require-hashes" in command or "--no-index" in command, command
