#!/usr/bin/env bash
# The core tests on other releases: an environment and a copy of the checkout per combination, a row of a table each.
#   bash tests/matrix.sh ["PYTHON TORCH MEGATRON_CORE" ...]       * is what pip finds
#   TESTS="tests/training/test_golden.py" bash tests/matrix.sh ...      others than the core tests
# Not part of the default run: a CUDA build of torch takes 5 GB, and a combination half an hour. Logs: .cache/matrix.
set -uo pipefail
unset PYTHONPATH VIRTUAL_ENV
cd "$(dirname "${BASH_SOURCE[0]}")/.."
read -ra CORE <<<"${TESTS:-tests/megatron tests/models tests/checkpointing tests/ops/test_ops.py \
tests/export/test_convert.py tests/training/test_golden.py tests/training/test_layouts.py}"
(($#)) || set -- "3.11 2.13.0 0.16.1" "3.12 2.14.1 0.19.2" "3.12 2.14.1 0.17.1" "3.13 * *"

python_of() {  # python_of 3.12: an interpreter on the PATH that starts, or one of pyenv's
    local found  # pyenv puts a python3.12 on the PATH that only says it is not chosen
    found="$(command -v "python$1")" && "$found" -c '' 2>/dev/null && echo "$found" && return
    ls -d "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python 2>/dev/null | tail -n 1
}

make() {  # make FOLDER PYTHON TORCH CORE: the environment and the copy, with rmega._C built for it
    "$2" -m venv --clear "$1/env" && mkdir -p "$1/checkout" && git ls-files -z | tar c --null -T - | tar x -C "$1/checkout" &&
        "$1/env/bin/pip" install "torch${3:+==$3}" "megatron-core${4:+==$4}" "setuptools>=77" wheel "pybind11>=2.13,<4" ninja &&
        RMEGA_BUILD_CUDA=0 "$1/env/bin/pip" install --no-build-isolation -e "$1/checkout[test,plots,serve]"
}

status=0
echo "| Python | torch | megatron-core | result |"
echo "|---|---|---|---|"
for combination in "$@"; do
    read -r python torch core <<<"${combination//\*/-}"
    folder="$PWD/.cache/matrix/$python-$torch-$core"
    mkdir -p "$folder"
    interpreter="$(python_of "$python")"
    if [[ -z "$interpreter" ]]; then
        result="no Python $python here"
    elif ! make "$folder" "$interpreter" "${torch#-}" "${core#-}" >"$folder/setup.log" 2>&1; then
        result="not installed: $folder/setup.log"
    else
        versions="$("$folder/env/bin/python" -c 'import platform; from importlib.metadata import version
print(platform.python_version(), version("torch"), version("megatron-core"))')"
        read -r python torch core <<<"$versions"
        (cd "$folder/checkout" && OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PATH="$folder/env/bin:$PATH" \
            "$folder/env/bin/python" -m pytest "${CORE[@]}") >"$folder/tests.log" 2>&1 && failed="" || failed=" ($folder/tests.log)"
        result="$(grep -E '^[0-9]+ (passed|failed|error)|(passed|failed|error).* in ' "$folder/tests.log" | tail -n 1)$failed"
    fi
    [[ "$result" == *passed* && "$result" != *failed* && "$result" != *error* ]] || status=1
    echo "| $python | $torch | $core | ${result:-no result$failed} |"
done
exit $status
