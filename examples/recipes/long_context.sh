#!/usr/bin/env bash
# Long conversations: activations are sharded along the tokens (--sp) and recomputed; a pack may be
# one comparison.
#   bash examples/recipes/long_context.sh [more flags of pretrain_reward.py]
MODEL=${MODEL:-internlm/internlm2-chat-7b}
DATA=${DATA:?a file or hub name of preference data} OUT=${OUT:-runs/long_context}
NPROC=${NPROC:-8} TP=${TP:-8} MAX_LENGTH=${MAX_LENGTH:-32768}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare "$MAX_LENGTH"
layout=(--tp "$(tp_of "$TP" "$@")")
((layout[1] == 1)) || layout+=(--sp)
train "${layout[@]}" --recompute full --train-epochs 1 --global-batch-size 32 --lr 1e-5 \
    --max-tokens-per-microbatch "$MAX_LENGTH" --eval-interval 100 --save-interval 100 \
    --keep-last 2 "$@"
export_model
