#!/usr/bin/env bash
# All tests, from a fresh clone: does the set-up, then runs pytest. Arguments go to pytest:
#   bash tests/run.sh -k hf -x
# Without arguments two files run side by side: a test with several ranks, or one that waits, leaves
# a core idle. The longest files first (tests/conftest.py), not those with the most tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/setup_env.sh
rmega_setup
# Tests start several processes each: more threads than cores would only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
side_by_side=()
(($#)) || side_by_side=(-n 2 --dist loadfile --no-loadscope-reorder)
exec "$PYTHON" -m pytest ${side_by_side[@]+"${side_by_side[@]}"} "$@"  # -q, tests/: pyproject.toml
