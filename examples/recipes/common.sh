# Sourced by the recipes. Variables override their settings: MODEL, DATA, OUT, NPROC, PYTHON, and
# VALID_FRACTION (the fraction held out for validation; of a small set more, because an export is
# verified with 16 held-out comparisons).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python}
source examples/length_flags.sh
# prepare MAX_LENGTH: preference data to $OUT/data/train, and a validation set split off by prompt
prepare() {
    [[ -e "$OUT/data/train.json" ]] ||
        "$PYTHON" tools/preprocess_pref.py --input "$DATA" --tokenizer "$MODEL" \
            --output-prefix "$OUT/data/train" --max-length "$1" \
            --valid-fraction "${VALID_FRACTION:-0.02}"
}
# last_of DEFAULT "NAME OTHER_NAME" FLAGS...: the value of a flag that counts, the last one
last_of() {
    local value="$1" names=" $2 "
    shift
    while shift && (($#)); do
        if [[ "$names" == *" $1 "* ]]; then
            value="${2-}"
        elif [[ "$1" == *=* && "$names" == *" ${1%%=*} "* ]]; then
            value="${1#*=}"
        fi
    done
    echo "$value"
}
tp_of() {  # tp_of DEFAULT FLAGS...: the --tp that counts
    local default="$1"
    shift
    last_of "$default" "--tp --tensor-model-parallel-size" "$@"
}
# train FLAGS...: starts a run, or resumes one that was interrupted. With --dry-run: prints what the
# run needs, and ends the recipe.
train() {
    local flags dp
    if [[ " $* " == *" --dry-run "* ]]; then
        length_flags "$@"
        dp=$((NPROC / $(tp_of 1 "$@") / $(last_of 1 "--pp --pipeline-model-parallel-size" "$@")))
        "$PYTHON" examples/pretrain_reward.py --hf-model "$MODEL" \
            --data-path "$OUT/data/train" --dp "$dp" "${flags[@]}"
        exit
    fi
    length_flags "$@"
    set -- ${flags[@]+"${flags[@]}"}
    "$PYTHON" tools/launch.py --standalone --nproc-per-node "$NPROC" examples/pretrain_reward.py \
        --hf-model "$MODEL" --data-path "$OUT/data/train" \
        --valid-data-path "valid=$OUT/data/train.valid" --save "$OUT/run" --load "$OUT/run" "$@"
}
export_model() {
    "$PYTHON" tools/convert_to_hf.py --load "$OUT/run" --output "$OUT/export" --force "$@"
}
