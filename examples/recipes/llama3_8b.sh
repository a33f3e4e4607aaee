#!/usr/bin/env bash
# Llama-3-8B-Instruct on one node of 8 GPUs: 4 tensor-parallel ranks with sequence parallelism,
# 2 replicas.
#   bash examples/recipes/llama3_8b.sh [more flags of pretrain_reward.py]
MODEL=${MODEL:-meta-llama/Meta-Llama-3-8B-Instruct}
DATA=${DATA:-argilla/ultrafeedback-binarized-preferences-cleaned}
OUT=${OUT:-runs/llama3_8b} NPROC=${NPROC:-8} TP=${TP:-4}
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
prepare 2048
layout=(--tp "$(tp_of "$TP" "$@")")
((layout[1] == 1)) || layout+=(--sp)
train "${layout[@]}" --train-epochs 1 --global-batch-size 128 --lr 9e-6 \
    --max-tokens-per-microbatch 16384 --eval-interval 100 --save-interval 100 --keep-last 2 "$@"
export_model
