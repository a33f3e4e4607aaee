#!/usr/bin/env bash
# Several answers with scores per prompt: all pairs of a prompt share its forward pass, rating
# differences are margins.
#   DATA=ranked.jsonl bash examples/recipes/ranked.sh [more flags of pretrain_reward.py]
MODEL=${MODEL:-internlm/internlm2-chat-1_8b-sft} DATA=${DATA:?a file or hub name of ranked data}
OUT=${OUT:-runs/ranked} NPROC=${NPROC:-1}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare 2048
train --train-epochs 1 --global-batch-size 32 --lr 1e-5 --loss ranking \
    --penalty center --penalty-weight 0.01 --use-margin --max-tokens-per-microbatch 16384 \
    --eval-interval 100 --save-interval 100 --keep-last 2 "$@"
export_model --iteration best
