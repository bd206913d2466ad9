#!/bin/sh
# Fills .venv for one purpose, from nothing but a Python and pip's own installer. The Makefile calls it; running it
# again is always safe.
#
# usage: scripts/setup.sh app|demo|dev|audit
#
#   app    what `tidegate serve` imports
#   demo   that, llama.cpp's server and the weights of a small model
#   dev    that, and everything `make test` and `make check` need
#   audit  the tools of `make audit` and `make sbom`, and nothing else
#
# Environment: PYTHON names the interpreter to use; VENV the folder to fill (default .venv).
# The stamp VENV/.ready-PROFILE is written last, so an interrupted or failed run is simply taken up again.
set -eu
cd "$(dirname "$0")/.."
profile=$1
venv=${VENV:-.venv}

say() { printf '%s\n' "$*"; }
fail() {
    printf '\n' >&2
    printf '%s\n' "$@" >&2
    exit 1
}

# A Python 3.11+ that can make a virtual environment; the newest that all locked packages have wheels for comes
# first, `python3` (whatever it is) last. Each is run, not only found: version managers leave names that fail.
find_python() {
    found='' lacking=''
    for candidate in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3 python}; do
        version=$("$candidate" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        found="$found $candidate=$version"
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$candidate
            python_version=$version
            return
        fi
        lacking="$lacking $candidate=$version"
    done
    if [ -n "$lacking" ]; then
        version=${lacking##*=}
        fail "Python $version is here, but without the modules that make a virtual environment (venv, ensurepip)." \
            "On Debian and Ubuntu they are a package of their own:" \
            "    sudo apt install python${version%.*}-venv" \
            "Then run the same command again. To use another Python: make PYTHON=/path/to/python3 ..."
    fi
    fail "Tidegate needs Python 3.11 or newer. Found:${found:- no working Python${PYTHON:+ at $PYTHON}}." \
        "Install one (Debian 12, Ubuntu 24.04: sudo apt install python3 python3-venv)," \
        "or name one that is not on the PATH: make PYTHON=/path/to/python3 ..."
}

# True where the venv's own interpreter and pip start. A venv cut short, or one whose Python was uninstalled, fails.
usable() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    find_python
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        fail "$venv exists and is not a virtual environment; move it away, or name another: make VENV=folder ..."
    fi
    say "Setting up $venv with Python $python_version ($(command -v "$python"))"
    # Until it is whole, whatever ends this script takes the folder away again.
    trap 'rm -rf "$venv"' EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    "$python" -m venv --clear "$venv" || fail "The virtual environment could not be made; the lines above say why."
    : > "$venv/.made-by-setup"
    trap - EXIT INT TERM HUP
}

if usable; then
    if [ -n "${PYTHON:-}" ]; then
        want=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
            fail "PYTHON=$PYTHON does not run."
        have=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        [ "$want" = "$have" ] || fail "$venv was made with Python $have, and PYTHON=$PYTHON is $want." \
            "Remove it first (make clean), or keep both: make VENV=.venv-$want PYTHON=$PYTHON ..."
    fi
else
    make_venv
fi

case $profile in
    app) what='the gateway (about 15 MB)' ;;
    demo) what="the gateway, llama.cpp's server and a small model (about 150 MB)" ;;
    dev) what='everything the tests and checks need (about 180 MB, the demo included)' ;;
    audit) what='the auditing tools (about 15 MB)' ;;
    *) fail "usage: scripts/setup.sh app|demo|dev|audit" ;;
esac
say "Installing $what; this happens once"

# Of pip's lines, the downloads with their sizes are progress, warnings and errors are news, the rest is noise. Its
# exit code has to survive the filter, and `pipefail` is not in every /bin/sh.
status_file=$venv/.pip-status
{
    "$venv/bin/python" -m pip --disable-pip-version-check install --no-input --progress-bar off \
        --no-deps --require-hashes -r requirements/build.txt -r "requirements/$profile.txt" 2>&1 && echo 0 || echo 1
} | {
    last=1
    while IFS= read -r line; do
        last=$line
        case ${line#  } in
            0 | 1 | Collecting* | Ignoring* | 'Using cached'* | Requirement* | Successfully* | Looking* | 'File was already'*) ;;
            Downloading*) line=${line#  } && say "  fetching ${line#Downloading }" ;;
            Installing*) say '  unpacking ...' ;;
            *) say "  $line" ;;
        esac
    done
    printf '%s\n' "$last" > "$status_file"
}
read -r status < "$status_file"
rm -f "$status_file"
if [ "$status" != 0 ]; then
    # An environment that never worked is not left lying about; one that did keeps what it had.
    if [ -e "$venv/.made-by-setup" ] && ! ls "$venv"/.ready-* >/dev/null 2>&1; then rm -rf "$venv"; fi
    fail "The installation did not finish; pip's own words are above. Usual causes:" \
        "  - no way to the package index: check the network, a proxy (HTTPS_PROXY), or pip's index-url" \
        "  - no space left: about 1 GB is needed (df -h .)" \
        "  - a hash that does not match: a proxy or mirror changed the file; do not install it" \
        "Running the same command again is safe: what was fetched is kept in pip's cache."
fi

if [ "$profile" = audit ]; then
    : > "$venv/.ready-audit"
    say "Ready."
    exit 0
fi

# The `tidegate` command itself. No isolated build: its tools were installed, hash-checked, a moment ago.
"$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-input --no-deps --no-build-isolation \
    --editable . || fail "Tidegate itself could not be installed into $venv; the lines above say why."
: > "$venv/.ready-$profile"
say "Ready."
