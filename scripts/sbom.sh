#!/bin/sh
# Writes dist/tidegate.cdx.json: what `pip install tidegate` with the locked dependencies consists of, as CycloneDX
# 1.6. Made from the lock file alone, so that it needs no network and says the same each time: no serial number, no
# time. `make sbom` calls it.
#
# usage: scripts/sbom.sh PYTHON
set -eu
cd "$(dirname "$0")/.."
mkdir -p dist
# (It warns that a lock file does not say what depends on what.)
"$1" -W ignore -m cyclonedx_py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
    --spec-version 1.6 --output-format JSON --output-file dist/tidegate.cdx.json requirements/app.txt
echo "dist/tidegate.cdx.json: $(grep -c '"purl": "pkg:pypi' dist/tidegate.cdx.json) packages"
