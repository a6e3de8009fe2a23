# Sourced by the scripts beside it: makes .venv if needed, then `run MODULE ...` runs a module of the project.
# The working directory stays the caller's, so relative paths and results are theirs.
set -euo pipefail
export PATH  # bash has a default where the environment has none; its children need it too
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$ROOT/script/setup" ${SETUP_FLAGS:-}
# OpenMP's threads soon sleep while they wait for one another: threads that spin hold up other processes on the
# same cores (with 100000 two processes on two cores take 20 times as long). The cog*.yaml files set the same.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

run() {
    # -P: a folder called lib where the caller stands must not be taken for ours.
    exec "$ROOT/.venv/bin/python" -P -m "$@"
}
