# Sourced by the other scripts: creates .venv if needed; then `run MODULE ...` runs a module of the project.
# The working directory remains the caller's, and so relative paths and results are the caller's too.
set -euo pipefail
export PATH  # bash has a default where the environment has none; its children need it too
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$ROOT/script/setup" ${SETUP_FLAGS:-}
# OpenMP threads go to sleep soon while they wait for each other: spinning threads block other processes on the
# same cores (with 100000, two processes on two cores take 20 times as long). The cog*.yaml files set the same.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-1000}"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

run() {
    # -P: a folder called lib in the caller's directory must not shadow ours.
    exec "$ROOT/.venv/bin/python" -P -m "$@"
}
