#!/usr/bin/env bash
# Which loss? The same comparisons in the same number of steps with each of LOSSES, over SEEDS; a
# table per loss of held-out accuracy and length-controlled accuracy with mean and spread. A
# difference inside the spread of the seeds is none. LOSSES may name scaled where DATA have ratings.
#   bash examples/studies/losses.sh [more flags of pretrain_reward.py]
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct} DATA=${DATA:-Anthropic/hh-rlhf}
OUT=${OUT:-runs/losses} NPROC=${NPROC:-1} MAX_LENGTH=${MAX_LENGTH:-1024}
SEEDS=${SEEDS:-1 2 3} LOSSES=${LOSSES:-ranking focal smoothed length}
source "$(dirname "${BASH_SOURCE[0]}")/../recipes/common.sh"
flags_of() {
    local plain="--loss ranking --penalty none"
    case "$1" in
        ranking) echo "$plain" ;;
        focal) echo "--loss focal --penalty log_barrier" ;;
        scaled) echo "$plain --scale-by-rating" ;;
        smoothed) echo "$plain --label-smoothing 0.1" ;;
        length) echo "$plain --length-penalty 0.002" ;;
        *) echo "LOSSES: $1 is none of ranking, focal, scaled, smoothed, length" >&2; return 1 ;;
    esac
}
for loss in $LOSSES; do flags_of "$loss" > /dev/null; done
prepare "$MAX_LENGTH"
for loss in $LOSSES; do
    for seed in $SEEDS; do
        mkdir -p "$OUT/$loss/seed$seed"
        ln -sfn ../../data "$OUT/$loss/seed$seed/data"
        # shellcheck disable=SC2046  # words of flags
        OUT="$OUT/$loss/seed$seed" train $(flags_of "$loss") --train-steps 500 \
            --global-batch-size 16 --lr 2e-5 --save-interval 0 --seed "$seed" "$@"
    done
done
for loss in $LOSSES; do
    results=()
    for seed in $SEEDS; do  # the last evaluation of the run
        results+=("$(find "$OUT/$loss/seed$seed/run/evaluations" -name 'step_*.json' | sort | tail -1)")
    done
    echo "$loss"
    "$PYTHON" tools/evaluate.py --join "${results[@]}"
done
