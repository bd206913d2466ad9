#!/bin/sh
# Rewrites requirements/*.txt from pyproject.toml and requirements/*.in: every package pinned, every file hashed,
# one file for every platform and Python from 3.11 on. `make lock` calls it; it needs a venv that has uv in it.
#
# usage: scripts/lock.sh VENV [more options for uv, such as --upgrade-package NAME]
set -eu
cd "$(dirname "$0")/.."
uv=$1/bin/uv
shift

# The result must depend on the public index only: no mirror, no local folder of wheels, no constraint of this
# machine. Both uv's own variables and a pip-style find-links would leak in.
for name in $(env | sed -n 's/^\(UV_[A-Z_]*\|PIP_[A-Z_]*\)=.*/\1/p'); do
    unset "$name"
done

compile() {  # compile OUTPUT SOURCE...: reads the pins already in OUTPUT, so that nothing moves unasked
    output=$1
    shift
    "$uv" pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
        --no-header --no-emit-index-url --no-emit-find-links --excludes requirements/excludes.txt \
        --output-file "$output" "$@"
    # The file says how it is made, in words that are the same on every machine.
    { printf '# Made by `make lock`; do not edit. Installs with: pip install --no-deps --require-hashes -r %s\n' \
        "$output"; cat "$output"; } > "$output.new"
    mv "$output.new" "$output"
}

# dev is the widest set; the narrower ones follow its versions, so that one venv can hold them all.
compile requirements/dev.txt pyproject.toml --extra demo --extra dev requirements/demo.in requirements/build.in "$@"
compile requirements/demo.txt pyproject.toml --extra demo requirements/demo.in --constraints requirements/dev.txt
compile requirements/app.txt pyproject.toml --constraints requirements/dev.txt
compile requirements/build.txt requirements/build.in --constraints requirements/dev.txt

if grep -n 'https\?://\|file:' requirements/*.txt; then
    echo "A lock file names an address; it must not." >&2
    exit 1
fi
