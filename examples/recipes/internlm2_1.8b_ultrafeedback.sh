#!/usr/bin/env bash
# InternLM2-1.8B on UltraFeedback: focal loss with log barrier, 64 comparisons per update, lr 2e-5,
# 3 % warm-up, cosine decay.
#   bash examples/recipes/internlm2_1.8b_ultrafeedback.sh [more flags of pretrain_reward.py]
MODEL=${MODEL:-internlm/internlm2-chat-1_8b-sft}
DATA=${DATA:-argilla/ultrafeedback-binarized-preferences-cleaned}
OUT=${OUT:-runs/internlm2_1.8b} NPROC=${NPROC:-1}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare 2048
train --train-epochs 1 --global-batch-size 64 --lr 2e-5 --lr-warmup-fraction 0.03 \
    --weight-decay 0 --clip-grad 1 --loss focal --penalty log_barrier \
    --penalty-weight 0.01 --max-tokens-per-microbatch 16384 \
    --eval-interval 200 --save-interval 200 --keep-last 2 "$@"
export_model
