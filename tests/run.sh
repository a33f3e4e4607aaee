#!/usr/bin/env bash
# All tests, from a fresh clone: does the set-up, then runs pytest. Arguments go to pytest: bash tests/run.sh -k hf -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_env.sh
rmega_setup test,plots,serve
# Tests start several processes each: more threads than cores would only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
exec "$PYTHON" -m pytest "$@"  # tests/, and -q: see pyproject.toml
