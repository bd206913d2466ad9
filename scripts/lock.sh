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

# Versions younger than this are not taken: most poisoned releases are found and withdrawn within days (LiteLLM's of
# March 2026 within hours). What is locked already and not asked to move stays. An urgent fix may lift it for itself:
# make lock ARGS='--upgrade-package NAME --exclude-newer-package NAME=2026-11-22'.
COOL_DOWN='7 days'

kept() {  # kept OUTPUT [options for uv]: exempts from the cool-down what is locked already and is not to be upgraded
    names=$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/\1/p' requirements/dev.txt $(test -e "$1" && echo "$1") | sort -u)
    shift
    for word; do
        case $word in
            --upgrade | -U) return ;;
            --upgrade-package=*) moving="${moving:-} ${word#*=}" ;;
            *) [ "${last:-}" = --upgrade-package ] || [ "${last:-}" = -P ] && moving="${moving:-} $word" ;;
        esac
        last=$word
    done
    for name in $names; do
        case " ${moving:-} " in *" $name "*) ;; *) printf ' --exclude-newer-package %s=9999-01-01' "$name" ;; esac
    done
}
compile() {  # compile OUTPUT SOURCE...: reads the pins already in OUTPUT, so that nothing moves unasked
    output=$1
    shift
    # The list of exemptions is split into words on purpose.
    # shellcheck disable=SC2046
    "$uv" pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes \
        --exclude-newer "$COOL_DOWN" $(kept "$output" "$@") \
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
compile requirements/cluster.txt pyproject.toml --extra kubernetes --extra postgres --constraints requirements/dev.txt
compile requirements/build.txt requirements/build.in --constraints requirements/dev.txt
compile requirements/compile.txt requirements/compile.in --constraints requirements/dev.txt
compile requirements/audit.txt requirements/audit.in --constraints requirements/dev.txt

if grep -n 'https\?://\|file:' requirements/*.txt; then
    echo "A lock file names an address; it must not." >&2
    exit 1
fi
