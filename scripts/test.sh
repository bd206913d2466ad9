#!/bin/sh
# All tests: first those that measure time or break things that others would feel, one after the other; then those that
# must be on time but wait for most of it, three at once; then the rest in four processes: most tests wait for sockets and
# other processes, and two of them leave two cores idle half of the time. Arguments are handed to pytest, each
# time.
#
#   PYTHON  the environment's interpreter    JOBS  processes of the last part (default 4)
set -u
python=${PYTHON:-.venv/bin/python}

# Without a browser the dashboard's tests fail by themselves, with what to do; the others need none.
CHROMIUM=$(PYTHON="$python" "$(dirname "$0")/browser.sh")
export CHROMIUM

INTERRUPTED=2
NONE=5 # pytest's exit code when no test was selected
result=$NONE
failed=

# part NAME OPTION... -- the tests that these options select; what fails is remembered, and the next part runs
part() {
    name=$1
    shift
    "$python" -m pytest "$@"
    code=$?
    case $code in
    "$NONE") ;;
    "$INTERRUPTED") exit "$INTERRUPTED" ;;
    0) [ "$result" -eq "$NONE" ] && result=0 ;;
    *)
        failed="$failed $name"
        result=$code
        ;;
    esac
}

# A test that hangs ends its process (pyproject.toml), and that the run: with another process in its place, pytest-xdist
# has been seen to wait for ever at the end.
part alone -m 'not slow and alone' "$@"
part quiet -m 'not slow and quiet' -n 3 --dist loadfile --max-worker-restart 0 "$@"
part rest -m 'not slow and not alone and not quiet' -n "${JOBS:-4}" --dist loadfile --max-worker-restart 0 "$@"

[ -n "$failed" ] && echo "tests failed, above, in:$failed" >&2
exit "$result"
