#!/usr/bin/env bash
# Llama-3.1-8B-Instruct as AllenAI trained its RewardBench 2 checkpoints: 128 comparisons per
# update, lr 3e-6 linear to 0 without warm-up, one epoch of at most 4,096 tokens, plain ranking
# loss, a normal head. One node of 8 GPUs.
#   bash examples/recipes/llama3.1_8b.sh [more flags of pretrain_reward.py]
MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
DATA=${DATA:-Skywork/Skywork-Reward-Preference-80K-v0.2}
OUT=${OUT:-runs/llama3.1_8b} NPROC=${NPROC:-8} TP=${TP:-4}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare 4096
layout=(--tp "$(tp_of "$TP" "$@")")
((layout[1] == 1)) || layout+=(--sp)
train "${layout[@]}" --train-epochs 1 --global-batch-size 128 --lr 3e-6 \
    --lr-decay-style linear --lr-warmup-fraction 0 --loss ranking --penalty none --head-init normal \
    --max-tokens-per-microbatch 16384 \
    --eval-interval 100 --save-interval 100 --keep-last 2 "$@"
export_model
