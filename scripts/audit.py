"""Asks an index of vulnerabilities about everything in the lock files: ``make audit``.

Exit codes: 0 nothing is known of any of them, 1 something is, 2 nobody could be asked (0 with
--unreachable-is-no-error, for machines without a way out; it is said loudly all the same). Needs pip-audit, which is in
requirements/audit.txt.

An advisory that does not concern Tidegate is listed in IGNORED with the reason, and is looked at again at each release.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IGNORED: dict[str, str] = {}
"""Id of an advisory: why it does not concern us."""
WIDEST = ("dev", "audit")
"""The other locks are parts of `dev`, version for version; a test holds them to it."""
WITHIN_S = 600


def ask(lock: Path, service: list[str]) -> tuple[list[dict[str, Any]] | None, str]:
    """The packages of one lock file that something is known of, or None and what went wrong."""
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        found = Path(folder, "found.json")
        command = [
            *(sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--disable-pip", "--no-deps"),
            *("--format", "json", "--output", str(found), "--progress-spinner", "off", *service),
            *(word for id in IGNORED for word in ("--ignore-vuln", id)),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN_S, check=False)
        except subprocess.TimeoutExpired:  # which would end with the exit code of a finding
            return None, f"no answer within {WITHIN_S} s"
        # Found and failed have the same exit code; only who was answered writes the file.
        if not found.exists():
            return None, done.stderr.strip().rpartition("\n")[2][:600] or f"pip-audit ended with {done.returncode}"
        packages = json.loads(found.read_text())["dependencies"]
    skipped = [package for package in packages if "skip_reason" in package]
    if skipped:
        reason = f"{skipped[0]['name']}: {skipped[0]['skip_reason']}"
        return None, f"no answer for {len(skipped)} of {len(packages)} packages ({reason})"
    return [package for package in packages if package["vulns"]], f"{len(packages)} packages"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/audit.py", description=__doc__)
    parser.add_argument("locks", nargs="*", type=Path, help="lock files (default: those that hold all others)")
    parser.add_argument("--osv-url", help="ask this OSV service instead of the Python package index")
    parser.add_argument("--unreachable-is-no-error", action="store_true")
    options = parser.parse_args(argv)
    service = ["--vulnerability-service", "osv", "--osv-url", options.osv_url] if options.osv_url else []
    known, unasked = 0, 0
    for lock in options.locks or [ROOT / "requirements" / f"{name}.txt" for name in WIDEST]:
        packages, said = ask(lock, service)
        if packages is None:
            unasked += 1
            print(f"{lock.name}: NOT AUDITED: {said}", file=sys.stderr)
            continue
        print(f"{lock.name}: {said}, {len(packages)} with known vulnerabilities")
        known += len(packages)
        for package in packages:
            for each in package["vulns"]:
                fixed = ", ".join(each["fix_versions"]) or "no version yet"
                print(f"  {package['name']} {package['version']}: {each['id']}, mended in {fixed}")
    if known:
        return 1
    if unasked:
        print("WARNING: the index of vulnerabilities could not be asked; nothing above says that all is well.")
        return 0 if options.unreachable_is_no_error else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
