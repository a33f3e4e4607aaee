#!/usr/bin/env bash
# Builds, tests and measures everything on a CUDA machine, in one call of under 9 minutes, without a network.
#
#   bash benchmarks/run_gpu.sh [OUT_DIR]
#
# Needs Python with a CUDA build of torch >= 2.10, megatron-core 0.16, transformers, tyro, pytest and nvcc; the extension
# is built in place. RMEGA_WHEELS=DIR installs the wheels that lie there first (all that DIR must hold where torch and
# transformers are: megatron-core, tyro, docstring-parser, typeguard, pytest, pluggy, iniconfig). Figures go to
# benchmarks/results/*.json (and OUT_DIR), logs to OUT_DIR.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-benchmarks/results/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
failed=0
step() {  # step SECONDS NAME COMMAND...: each part has its own limit, so that one that hangs does not cost the others
    local limit=$1 name=$2 begun=$SECONDS
    shift 2
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    local rc=$?
    [ $rc -eq 0 ] || failed=1
    echo "== $name: exit $rc, $((SECONDS - begun)) s"
    tail -n "${lines:-12}" "$out/$name.log"
}

if [ -n "${RMEGA_WHEELS:-}" ]; then
    python3 -m pip install -q --no-index --no-deps "$RMEGA_WHEELS"/*.whl || exit 1
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
# Only the architecture of this machine: a release build makes more (setup.py).
capability=$(python3 -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
TORCH_CUDA_ARCH_LIST=$capability lines=3 step 240 build python3 setup.py build_ext --inplace
lines=15 step 150 tests python3 -m pytest tests/ops/test_ops.py tests/ops/test_ops_cuda.py tests/models/test_attention.py \
    tests/training/test_cuda_training.py -p no:cacheprovider
lines=30 step 60 ops python3 benchmarks/ops.py --device cuda --no-compile --output benchmarks/results/gpu_ops.json
lines=20 step 90 attention python3 benchmarks/attention.py --device cuda --name gpu_attention
lines=12 step 170 train_ultrafeedback python3 benchmarks/train.py --shape internlm2-1.8b --lengths ultrafeedback \
    --precision bf16 --batch-size 64 --steps 3 --repeats 3 --max-tokens 12288 --name gpu_train_ultrafeedback
lines=12 step 110 train_hh python3 benchmarks/train.py --shape internlm2-1.8b --lengths hh --precision bf16 \
    --batch-size 64 --steps 2 --repeats 3 --max-tokens 12288 --modes packed +fusion --name gpu_train_hh
lines=50 step 90 profile python3 benchmarks/train.py --shape internlm2-1.8b --lengths ultrafeedback --precision bf16 \
    --batch-size 16 --steps 1 --repeats 1 --max-tokens 12288 --modes +fusion --profile --name gpu_profile
cp benchmarks/results/gpu_*.json "$out"/ 2> /dev/null
exit $failed
