#!/bin/sh
# Prints the Chromium that the dashboard's tests drive, and installs one where there is none. scripts/test.sh calls it;
# running it again is always safe. Nothing is printed where the tests are to be skipped, or to use Playwright's own.
#
#   PYTHON            the environment's interpreter (default .venv/bin/python)
#   CHROMIUM          a browser to use, wherever it is
#   TESTS_NO_BROWSER  1: do without; the dashboard's tests are skipped, and say so
set -u
python=${PYTHON:-.venv/bin/python}

say() { printf '%s\n' "$*" >&2; }
works() { "$1" --headless --no-sandbox --version >/dev/null 2>&1; }

found() {  # prints the first browser that starts
    for name in ${CHROMIUM:-chromium chromium-browser google-chrome google-chrome-stable}; do
        path=$(command -v "$name" 2>/dev/null) && works "$path" && printf '%s\n' "$path" && return 0
    done
    return 1
}
own() {  # whether Playwright has its own headless shell already
    "$python" - <<'CODE' 2>/dev/null
import sys
from pathlib import Path
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    path = Path(playwright.chromium.executable_path)
# The headless shell lies beside where the whole browser would be.
shells = path.parents[2].glob("chromium_headless_shell-*/*/*headless*shell")
sys.exit(not (path.exists() or any(shells)))
CODE
}

if [ "${TESTS_NO_BROWSER:-0}" = 1 ]; then
    say "TESTS_NO_BROWSER=1: the dashboard's tests are SKIPPED; nothing says whether its pages work."
    exit 0
fi
if [ -n "${CHROMIUM:-}" ]; then
    found && exit 0
    say "CHROMIUM=$CHROMIUM does not start; name a Chromium or Chrome that does, or leave it unset."
    exit 1
fi
found && exit 0
own && exit 0

say "No Chromium here: installing Playwright's headless shell, once..."
"$python" -m playwright install chromium-headless-shell >&2 && own && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "Not to be had: installing Debian's chromium..."
    apt-get install -y --no-install-recommends chromium fonts-dejavu-core >&2 ||
        { apt-get update >&2 && apt-get install -y --no-install-recommends chromium fonts-dejavu-core >&2; }
    found && exit 0
fi
say "The dashboard's tests need a browser: install chromium or google-chrome, or set CHROMIUM=/path/to/one" \
    "(or TESTS_NO_BROWSER=1 to go without these tests)."
exit 1
