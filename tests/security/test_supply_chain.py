"""What comes in and what goes out: locks, their age and audit; wheel and sdist, and that each can be built again."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(path.stem for path in REQUIREMENTS.glob("*.txt") if path.stem != "excludes")
SDIST = {
    "gateway", "backends", "routing", "configs", "loadtests", "tests", "docs", "requirements", "scripts",
    "pyproject.toml", "Makefile", "Dockerfile", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md",
    "LICENSE", "PKG-INFO", ".gitignore",
}  # fmt: skip
SOURCE_DATE = "1767225600"


# -- what comes in


def pins(lock: str) -> dict[str, str]:
    text = (REQUIREMENTS / f"{lock}.txt").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)(?:\[[^]]*\])?==([^ ;\\]+)", text, re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS)
def test_everything_that_is_installed_is_pinned_and_hashed(lock: str) -> None:
    text = (REQUIREMENTS / f"{lock}.txt").read_text()
    entries = [entry for entry in re.split(r"\n(?=\S)", text) if not entry.startswith("#")]
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9.-]+(\[[^]]*\])?==", entry), entry
        assert "--hash=sha256:" in entry, entry
    assert not re.search(r"https?://|file:|git\+|--(extra-)?index-url|--find-links|--trusted-host", text)


def test_the_audit_asks_about_everything_that_is_locked() -> None:
    """It reads two of the locks; all others must be parts of these."""
    asked = {**pins("audit"), **pins("dev")}
    for lock in LOCKS:
        if lock != "audit":
            assert pins(lock).items() <= asked.items(), lock


def lock_with(folder: Path, *options: str) -> list[list[str]]:
    """What `scripts/lock.sh` asks of uv, which is a stand-in that says so."""
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, folder / name)
    told = folder / "told"
    uv = folder / "venv" / "bin" / "uv"
    uv.parent.mkdir(parents=True)
    uv.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {told}\necho END >> {told}\n')
    uv.chmod(0o755)
    subprocess.run(
        ["/bin/sh", str(folder / "scripts" / "lock.sh"), str(folder / "venv"), *options], check=True, timeout=60
    )
    return [call.split("\n") for call in told.read_text().split("\nEND\n") if call]


def exempt(call: list[str]) -> set[str]:
    """The packages for which the cool-down is lifted."""
    return {value.partition("=")[0] for word, value in itertools.pairwise(call) if word == "--exclude-newer-package"}


def test_new_versions_wait_for_a_week_and_what_is_locked_stays(tmp_path: Path) -> None:
    calls = lock_with(tmp_path)
    assert len(calls) == len(LOCKS)
    for call in calls:
        assert call[call.index("--exclude-newer") + 1] == "7 days"
        assert "--generate-hashes" in call
        assert exempt(call) >= set(pins("app"))


def test_an_upgrade_takes_nothing_that_is_younger_than_a_week(tmp_path: Path) -> None:
    for call in lock_with(tmp_path, "--upgrade"):
        if "--upgrade" in call:  # only the widest lock is asked to move, the others follow it
            assert exempt(call) == set()


def test_upgrading_one_package_keeps_the_others_where_they_are(tmp_path: Path) -> None:
    first = lock_with(tmp_path, "--upgrade-package", "orjson")[0]
    assert "orjson" not in exempt(first)
    assert "msgspec" in exempt(first)


STAND_IN = """
import json, os, sys, time
told = os.environ["STAND_IN"]
if told == "silent":
    time.sleep(60)
lock = sys.argv[sys.argv.index("--requirement") + 1]
if told == "away":
    sys.exit("Traceback\\nConnectionError: no way to the service")
vulns = [{"id": "PYSEC-1", "fix_versions": ["9.9"]}] if told == "known" else []
skip = {"skip_reason": "not found"} if told == "unknown" else {"vulns": vulns}
with open(sys.argv[sys.argv.index("--output") + 1], "w") as file:
    json.dump({"dependencies": [{"name": "a", "version": "1", **skip}]}, file)
sys.exit(1 if vulns else 0)
"""


@pytest.mark.parametrize(
    ("told", "options", "code", "says"),
    [
        ("nothing", [], 0, "0 with known vulnerabilities"),
        ("known", [], 1, "a 1: PYSEC-1, mended in 9.9"),
        ("known", ["--unreachable-is-no-error"], 1, "PYSEC-1"),
        ("away", [], 2, "NOT AUDITED: ConnectionError"),
        ("away", ["--unreachable-is-no-error"], 0, "WARNING"),
        ("unknown", [], 2, "no answer for 1 of 1 packages"),
    ],
)
def test_an_audit_that_could_not_be_made_is_no_clean_one(
    tmp_path: Path, told: str, options: list[str], code: int, says: str
) -> None:
    (tmp_path / "pip_audit.py").write_text(STAND_IN)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit.py"), *options],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "STAND_IN": told},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr


def test_an_index_that_does_not_answer_is_not_a_finding(tmp_path: Path) -> None:
    (tmp_path / "pip_audit.py").write_text(STAND_IN)
    code = "import sys; sys.path.insert(0, 'scripts'); import audit; audit.WITHIN_S = 0.5; sys.exit(audit.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "STAND_IN": "silent"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "no answer within" in done.stderr) == (2, True), done.stderr


# -- what goes out


def built(source: Path, folder: Path, mask: int) -> dict[str, Path]:
    """The wheel and the sdist of a copy of this tree, made with this umask."""
    unwanted = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", ".engines", ".fuzz", "dist", "build")
    tree = folder / "tree"
    shutil.copytree(source, tree, ignore=unwanted, copy_function=shutil.copyfile)
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)],
        cwd=tree,
        env={**os.environ, "SOURCE_DATE_EPOCH": SOURCE_DATE},
        umask=mask,
        check=True,
        capture_output=True,
        timeout=180,
    )
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist, "tree": tree}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(ROOT, tmp_path_factory.mktemp("release"), 0o022)


def test_a_second_build_elsewhere_and_later_gives_the_same_bytes(release: dict[str, Path], tmp_path: Path) -> None:
    again = built(release["tree"], tmp_path, 0o077)
    for kind in ("wheel", "sdist"):
        first, second = (hashlib.sha256(each[kind].read_bytes()).hexdigest() for each in (release, again))
        assert first == second, kind


KINDS = {"py", "json", "jsonl", "lua", "mako", "md", "html", "css", "js", "mjs", "svg", "LICENSE"}
"""Of files in a wheel: sources, the tables and scripts they read, and the pages of the dashboard."""


def test_the_wheel_runs_nothing_when_python_starts_and_holds_no_binary(release: dict[str, Path]) -> None:
    """A `.pth` file runs at every start of every interpreter: that was LiteLLM's poisoned wheel of March 2026."""
    with zipfile.ZipFile(release["wheel"]) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        assert not re.search(r"^Requires-Dist:.*@", archive.read(metadata).decode(), re.MULTILINE)
    modules = [name for name in names if ".dist-info/" not in name]
    assert {name.rpartition(".")[2] for name in modules} <= KINDS
    assert not [name for name in names if name.endswith(".pth") or "sitecustomize" in name or "usercustomize" in name]
    assert not [name for name in names if ".data/" in name]
    assert {name.rpartition("/")[2] for name in names if ".dist-info/" in name} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "LICENSE",
    }


def test_the_sdist_holds_what_is_listed_and_nothing_that_lay_about(release: dict[str, Path]) -> None:
    with tarfile.open(release["sdist"]) as archive:
        members = archive.getmembers()
    paths = [Path(*Path(member.name).parts[1:]) for member in members]
    assert {path.parts[0] for path in paths} <= SDIST
    assert all(member.isfile() for member in members)
    odd = {".pth", ".so", ".pyc", ".whl", ".env", ".pem", ".key", ".db", ".exe"}
    assert not [path for path in paths if path.suffix in odd and "tests" not in path.parts]
    assert not [path for path in paths if path.suffix in {".pth", ".pyc", ".so", ".whl"}]
