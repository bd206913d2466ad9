#!/bin/sh
# All tests: first those that measure time or break things that others would feel, one after the other; then the rest in
# four processes: most tests wait for sockets and other processes, and two of them leave two cores idle half of the time.
# Arguments are handed to pytest, both times.
#
#   PYTHON  the environment's interpreter    JOBS  processes of the second part (default 4)
set -u
python=${PYTHON:-.venv/bin/python}

# Without a browser the dashboard's tests fail by themselves, with what to do; the others need none.
CHROMIUM=$(PYTHON="$python" "$(dirname "$0")/browser.sh")
export CHROMIUM

NONE=5 # pytest's exit code when no test was selected

"$python" -m pytest -m 'not slow and alone' "$@"
alone=$?
[ "$alone" -eq 2 ] && exit 2 # interrupted
# A test that hangs ends its process (pyproject.toml), and that the run: with another process in its place, pytest-xdist
# has been seen to wait for ever at the end.
"$python" -m pytest -m 'not slow and not alone' -n "${JOBS:-4}" --dist loadfile --max-worker-restart 0 "$@"
rest=$?

[ "$alone" -eq "$NONE" ] && exit "$rest"
[ "$rest" -eq "$NONE" ] && exit "$alone"
[ "$alone" -ne 0 ] && echo "tests that run alone failed, above; the others ended with $rest" >&2
[ "$rest" -ne 0 ] && exit "$rest"
exit "$alone"
