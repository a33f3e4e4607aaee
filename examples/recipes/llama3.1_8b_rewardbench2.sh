#!/usr/bin/env bash
# Llama-3.1-8B-Instruct as AllenAI trained its RewardBench 2 checkpoints: 128 comparisons per
# update, lr 3e-6 linear to 0 without warm-up, one epoch of at most 4,096 tokens, plain ranking loss
# without penalty, head from N(0, 1/sqrt(h+1)), bf16. One node of 8 GPUs. Published scores of
# Llama-3.1-8B-Instruct on RewardBench 2, by training data (one figure per seed):
#   Skywork-Reward-Preference-80K-v0.2                               70.5
#   Tulu 3 preference mixture                                        65.7  69.4  67.5
#   both                                                             72.9  71.9  71.7
# Each seed of SEEDS is trained, exported and evaluated; the last table has their mean and spread.
#   bash examples/recipes/llama3.1_8b_rewardbench2.sh [more flags of pretrain_reward.py]
#   bash examples/recipes/llama3.1_8b_rewardbench2.sh --dry-run     # memory per GPU, FLOP, hours
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
DATA=${DATA:-Skywork/Skywork-Reward-Preference-80K-v0.2}
OUT=${OUT:-runs/llama3.1_8b_rewardbench2} NPROC=${NPROC:-8} TP=${TP:-4}
SEEDS=${SEEDS:-1 2 3} EVAL_DATA=${EVAL_DATA:-allenai/reward-bench-2}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare 4096
layout=(--tp "$(tp_of "$TP" "$@")")
((layout[1] == 1)) || layout+=(--sp)
seeds=($(last_of "$SEEDS" --seed "$@"))  # a --seed that is given is the only one
one_seed() {  # one_seed SEED FLAGS...
    train "${layout[@]}" --train-epochs 1 --global-batch-size 128 --lr 3e-6 \
        --lr-decay-style linear --lr-warmup-fraction 0 --loss ranking --penalty none \
        --head-init normal --max-tokens-per-microbatch 16384 \
        --eval-interval 100 --save-interval 100 --keep-last 2 --seed "$@"
    export_model
    "$PYTHON" tools/evaluate.py --model "$OUT/export" --data "$EVAL_DATA" \
        --json "$OUT/evaluation.json"
}
if ((${#seeds[@]} == 1)); then
    one_seed "${seeds[0]}" "$@"
else
    results=()
    for seed in "${seeds[@]}"; do
        mkdir -p "$OUT/seed$seed"
        ln -sfn ../data "$OUT/seed$seed/data"
        OUT="$OUT/seed$seed" one_seed "$seed" "$@"
        results+=("$OUT/seed$seed/evaluation.json")
    done
    "$PYTHON" tools/evaluate.py --join "${results[@]}"
fi
