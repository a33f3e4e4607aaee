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
tp_of() {  # tp_of DEFAULT FLAGS...: the --tp that counts, the last one
    local tp="$1"
    while shift && (($#)); do
        case "$1" in
            --tp | --tensor-model-parallel-size) tp="${2-}" ;;
            --tp=* | --tensor-model-parallel-size=*) tp="${1#*=}" ;;
        esac
    done
    echo "$tp"
}
train() {  # train FLAGS...: starts a run, or resumes one that was interrupted
    local flags
    length_flags "$@"
    set -- ${flags[@]+"${flags[@]}"}
    "$PYTHON" tools/launch.py --standalone --nproc-per-node "$NPROC" examples/pretrain_reward.py \
        --hf-model "$MODEL" --data-path "$OUT/data/train" \
        --valid-data-path "valid=$OUT/data/train.valid" --save "$OUT/run" --load "$OUT/run" "$@"
}
export_model() {
    "$PYTHON" tools/convert_to_hf.py --load "$OUT/run" --output "$OUT/export" --force "$@"
}
