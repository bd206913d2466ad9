#!/bin/sh
# Brings the dashboard's libraries from npm into gateway/dashboard/static/vendor/, at the versions below, with their
# licences, and rewrites the list of checksums that a test compares. Needs npm, tar and sha256sum; nothing of npm's is
# kept or run. A newer version: change the number, run it, look at the difference, run the dashboard's tests.
set -eu
cd "$(dirname "$0")/../gateway/dashboard/static/vendor"

PREACT=11.2.0
HTM=3.1.1
UPLOT=1.6.32

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

unpack() {  # unpack NAME VERSION: the package's files are in $work/NAME then
    (cd "$work" && npm pack --silent --ignore-scripts "$1@$2" >/dev/null && mkdir -p "$1" &&
        tar -xzf "$1-$2.tgz" -C "$1" --strip-components 1)
}
unmapped() {  # unmapped FILE: without the comment that names a source map, which is not here
    sed 's,^//# sourceMappingURL=.*$,,' "$1"
}

unpack preact "$PREACT"
unpack htm "$HTM"
unpack uplot "$UPLOT"

unmapped "$work/preact/dist/preact.mjs" > preact.mjs
# A browser resolves no bare names without an import map, which would have to be an inline script.
unmapped "$work/preact/hooks/dist/hooks.mjs" | sed 's,from *"preact",from"./preact.mjs",g' > preact-hooks.mjs
unmapped "$work/htm/dist/htm.mjs" > htm.mjs
unmapped "$work/uplot/dist/uPlot.esm.js" > uPlot.mjs
cp "$work/uplot/dist/uPlot.min.css" uPlot.css
cp "$work/preact/LICENSE" preact.LICENSE
cp "$work/htm/LICENSE" htm.LICENSE
cp "$work/uplot/LICENSE" uPlot.LICENSE
! grep -l 'from *"preact"' ./*.mjs

sums() { sha256sum preact.mjs preact-hooks.mjs htm.mjs uPlot.mjs uPlot.css ./*.LICENSE | sed 's,\./,,'; }
cat > README.md <<END
# What is not ours

\`scripts/vendor.sh\` brings these files from npm and writes this list; nobody edits them.

| File | From (npm) | Version | Licence |
|---|---|---|---|
| \`preact.mjs\`, \`preact-hooks.mjs\` | \`preact\` (\`dist/preact.mjs\`; \`hooks/dist/hooks.mjs\`, whose import of "preact" names the file beside it) | $PREACT | MIT |
| \`htm.mjs\` | \`htm\` (\`dist/htm.mjs\`) | $HTM | Apache-2.0 |
| \`uPlot.mjs\`, \`uPlot.css\` | \`uplot\` (\`dist/uPlot.esm.js\`, \`dist/uPlot.min.css\`) | $UPLOT | MIT |

Each one's licence is beside it. SHA-256:

\`\`\`text
$(sums)
\`\`\`
END
