#!/usr/bin/env bash
# What one GPU can show, without a network, in two runs of a few minutes each.
#
#   bash benchmarks/run_gpu.sh check     is it right?  at most 330 s
#   bash benchmarks/run_gpu.sh measure   how fast?     at most 400 s
#     --out DIR          summary.txt and one tar of all logs and results; default
#                        benchmarks/results/gpu_check or gpu_measure
#     --model DIR        measure, last part: a backbone such as SmolLM2-135M,
#     --pairs FILE       preference rows to train on for one epoch
#     --valid FILE       and held-out rows
#
# Each part has its own limit, and one that fails or hangs does not stop the rest; summary and tar
# are rewritten after each. Without a CUDA device every part but the probe is skipped. Exit code 1
# where a part failed.
#
# Needs Python with a CUDA build of torch >= 2.10, megatron-core 0.16, transformers, tyro, pytest and
# nvcc. RMEGA_WHEELS=DIR: its wheels are unpacked into a folder of their own first (megatron-core,
# tyro, docstring-parser and typeguard are enough where torch and transformers are installed).
# RMEGA_COMMIT names the commit in results where there is no git.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
usage() { sed -n '2,12p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//' >&2; exit 2; }
mode=${1:-}
case $mode in check) total=330 ;; measure) total=400 ;; *) usage ;; esac
shift
out="" model="" pairs="" valid=""
while (($#)); do
    (($# > 1)) || usage
    case $1 in
        --out) out=$2 ;; --model) model=$2 ;; --pairs) pairs=$2 ;; --valid) valid=$2 ;; *) usage ;;
    esac
    shift 2
done
out=${out:-benchmarks/results/gpu_$mode}
mkdir -p "$out" || exit 2
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
mkdir "$work/logs"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
export MAX_JOBS=${MAX_JOBS:-$(nproc)} RMEGA_RESULTS=$work/logs
# nvcc on the PATH may be a wrapper whose folder is no toolkit.
for home in "${CUDA_HOME:-}" /usr/local/cuda /usr/local/cuda-*; do
    [ -f "$home/include/cuda_runtime.h" ] && { export CUDA_HOME=$home; break; }
done

failed=0
note() { # NAME STATE SECONDS [LINES]: into the summary; then everything is packed again
    {
        printf '%-8s %-24s %4s s\n' "$2" "$1" "$3"
        [ -s "$work/logs/$1.log" ] && tail -n "${4:-12}" "$work/logs/$1.log" | cut -c1-200 | sed 's/^/    /'
    } | tee -a "$work/logs/summary.txt"
    cp "$work/logs/summary.txt" "$out/summary.txt.new" && mv "$out/summary.txt.new" "$out/summary.txt"
    tar -czf "$out/logs.tar.gz.new" -C "$work" logs && mv "$out/logs.tar.gz.new" "$out/logs.tar.gz"
}
part() { # LIMIT NAME LINES COMMAND...
    local limit=$1 name=$2 lines=$3 begun=$SECONDS left=$((total - SECONDS - 10)) code
    shift 3
    ((limit > left)) && limit=$left
    if [ -n "${reason:-}" ] || ((left < 10)); then
        echo "${reason:-no time left of $total s}" >"$work/logs/$name.log"
        note "$name" SKIPPED 0
        return
    fi
    timeout -k 5 "$limit" "$@" >"$work/logs/$name.log" 2>&1 </dev/null
    code=$?
    case $code in
        0) note "$name" PASS $((SECONDS - begun)) "$lines" ;;
        77) note "$name" SKIPPED $((SECONDS - begun)) "$lines" ;;
        *)
            failed=1
            ((code == 124 || code == 137)) && echo "ended at its limit of $limit s" >>"$work/logs/$name.log"
            note "$name" FAIL $((SECONDS - begun)) 30
            ;;
    esac
}
tests() { # FILE...: a run in which every test is skipped shows nothing, and fails
    local text
    text=$("$python" -m pytest -q -m gpu -rs -p no:cacheprovider "$@" 2>&1)
    local code=$?
    echo "$text"
    ((code)) && return $code
    grep -q '[0-9] passed' <<<"$text" || { echo "no test ran"; return 1; }
}
train() { # NAME MORE...: a step of InternLM2-1.8B's shape in bf16
    local name=$1
    shift
    "$python" benchmarks/train.py --shape internlm2-1.8b --lengths ultrafeedback --precision bf16 \
        --batch-size 64 --max-tokens 12288 --name "gpu_$name" "$@"
}
build() {
    local arch
    if "$python" -c 'import sys; from rmega.ops.implementation import _C; sys.exit(_C is None or not _C.has_cuda)'; then
        echo "rmega._C has CUDA kernels already"
        return
    fi
    # This machine's architecture alone: a release builds more (setup.py).
    arch=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || return
    TORCH_CUDA_ARCH_LIST=$arch RMEGA_BUILD_CUDA=1 "$python" setup.py build_ext --inplace
}
real_run() { # one epoch on real pairs, from tokenizing to held-out accuracy
    local split
    for split in pairs valid; do
        "$python" tools/preprocess_pref.py --input "${!split}" --tokenizer "$model" \
            --output-prefix "$work/$split" --max-length 1024 --workers "$MAX_JOBS" || return
    done
    "$python" examples/pretrain_reward.py --hf-model "$model" --data-path "$work/pairs" \
        --valid-data-path "held_out=$work/valid" --train-epochs 1 --global-batch-size 64 --lr 2e-5 \
        --precision bf16 --max-tokens-per-microbatch 16384 --save "$work/run" || return
    cp "$work/run/metrics.jsonl" "$work/logs/real_run_metrics.jsonl"
}
export -f tests train build real_run
export python model pairs valid work

{
    echo "run_gpu.sh $mode, $(date -u +%Y-%m-%dT%H:%M:%SZ), commit ${RMEGA_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "nvidia-smi: not available"
} | tee "$work/logs/summary.txt"
if [ -n "${RMEGA_WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site" "$RMEGA_WHEELS"/*.whl || exit 2
    export PYTHONPATH=$work/site:$PYTHONPATH
fi

part 30 probe 12 "$python" benchmarks/gpu_probe.py
reason=""
tail -n 1 "$work/logs/probe.log" | grep -q '^no CUDA device$' && reason="no CUDA device"

if [ "$mode" = check ]; then
    # The attention test needs no extension: it runs beside the compilers.
    if [ -z "$reason" ]; then
        timeout -k 5 100 bash -c 'tests tests/models/test_attention_cuda.py' >"$work/attention" 2>&1 </dev/null &
        beside=$!
    fi
    part 120 build 3 bash -c build
    if [ -z "$reason" ]; then
        begun=$SECONDS state=PASS
        wait "$beside" || { failed=1 state=FAIL; }
        mv "$work/attention" "$work/logs/attention.log"
        note attention $state $((SECONDS - begun)) 8
    else
        part 60 attention 8 true
    fi
    part 60 ops 8 bash -c 'tests tests/ops/test_ops_cuda.py'
    part 90 training 8 bash -c 'tests tests/training/test_cuda_training.py'
    part 70 end_to_end 8 bash -c 'tests tests/training/test_cuda_end_to_end.py'
    part 40 one_step_1.8b 12 bash -c 'train one_step --batch-size 16 --steps 1 --repeats 1 --modes +fusion'
else
    [ -n "$reason" ] || part 120 build 3 bash -c build
    part 45 all_savings 12 bash -c 'train ultrafeedback --steps 3 --repeats 3 --modes +fusion'
    part 40 profile 60 bash -c 'train profile --batch-size 16 --steps 1 --repeats 1 --modes +fusion --profile'
    part 45 packed 12 bash -c 'train packed --steps 2 --repeats 2 --modes packed'
    part 45 last_layer 12 bash -c 'train last_layer --steps 2 --repeats 2 --modes "+last layer"'
    part 45 hh_packed 12 bash -c 'train hh_packed --lengths hh --steps 2 --repeats 2 --modes packed'
    part 45 hh_all_savings 12 bash -c 'train hh_all --lengths hh --steps 2 --repeats 2 --modes +fusion'
    part 40 operators 40 "$python" benchmarks/ops.py --device cuda --no-compile --models 1.8B \
        --repeats 5 --output "$work/logs/gpu_ops.json"
    part 30 attention 12 "$python" benchmarks/attention.py --device cuda --shapes "hidden 2048" \
        --name gpu_attention
    part 60 padded 12 bash -c 'train padded --steps 1 --repeats 1 --modes padded'
    if [ -z "$reason" ]; then
        for file in "$model" "$pairs" "$valid"; do
            [ -e "$file" ] || reason="--model, --pairs and --valid name a backbone and files of rows; not there: '$file'"
        done
    fi
    part 60 real_run 15 bash -c real_run
fi
printf '%s in %d s\n' "$([ $failed = 0 ] && echo "no part failed" || echo "FAILED parts above")" "$SECONDS" |
    tee -a "$work/logs/summary.txt"
cp "$work/logs/summary.txt" "$out/summary.txt"
tar -czf "$out/logs.tar.gz" -C "$work" logs
exit $failed
