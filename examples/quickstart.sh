#!/usr/bin/env bash
# From preferences to a reward model that plain transformers loads: bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'EOF'
Trains a reward model and exports it: set-up, model, data, training with tensor parallelism,
held-out accuracy before and after, Hugging Face folder, two scored replies. Without flags:
SmolLM2-135M-Instruct on the demonstration set in examples/data, five to twenty minutes on two
cores, depending on the processor. On a CUDA machine it uses all GPUs.

    bash examples/quickstart.sh [flags] [any flag of examples/pretrain_reward.py]

  --model NAME        Hugging Face folder or hub name (default: SmolLM2-135M-Instruct)
  --data DATA         preference data: a file (also compressed), a folder or a hub name
  --valid-data DATA   held-out data (default with --data: a tenth of it, split by prompt)
  --output DIR        where everything goes (default: runs/quickstart, or the next free number)
  --steps N           optimizer steps, in place of --epochs
  --epochs X          passes over the data (default: 1)
  --max-length N      longest conversation in tokens (default: 2048)
  --nproc N           processes (default: all GPUs; 2 without GPU)
  --tp N              tensor-parallel ranks (default: 2, or 1 for an odd number of processes)
EOF
}
fail() { echo "error: $*" >&2; exit 2; }

given="$*" more=() model="" data="" valid_data="" output=""
steps="" epochs="" max_length=2048 nproc="" tp=""
while (($#)); do
    flag="${1/#--train-/--}"
    case "$flag" in
        -h | --help) usage; exit 0 ;;
        --model | --data | --valid-data | --output | --steps | --epochs | --max-length | --nproc | \
            --tp)
            (($# >= 2)) || fail "$1 needs a value (bash examples/quickstart.sh --help)"
            name="${flag#--}"
            printf -v "${name//-/_}" %s "$2"
            shift ;;
        *) more+=("$1") ;;
    esac
    shift
done
[[ -z "$steps" || -z "$epochs" ]] || fail "give one of --steps and --epochs"
[[ -z "$valid_data" || -n "$data" ]] || fail "--valid-data needs --data"
for pair in "--steps=$steps" "--max-length=$max_length" "--nproc=$nproc" "--tp=$tp"; do
    [[ "${pair#*=}" =~ ^([1-9][0-9]*)?$ ]] || fail "${pair%%=*} ${pair#*=}: must be a number from 1"
done
[[ "${more[0]:---}" == --* ]] || fail "${more[0]}: not a flag (bash examples/quickstart.sh --help)"

# A finished output is never overwritten; an unfinished one of the same command is resumed.
other() { [[ -e "$1" && "$(cat "$1/command" 2>/dev/null)" != "$given" ]]; }
if [[ -n "$output" ]]; then
    [[ ! -e "$output/finished" ]] ||
        fail "--output $output: holds a finished run (table: $output/table.txt); choose another"
    ! other "$output" || [[ -d "$output" && -z "$(ls -A "$output")" ]] ||
        fail "--output $output: exists already and is no unfinished run of this command"
else
    output=runs/quickstart
    for ((i = 2; ; i++)); do
        [[ -e "$output/finished" ]] || other "$output" || break
        output="runs/quickstart-$i"
    done
fi

source examples/setup_env.sh
rmega_setup || exit 2  # plots and serve are for the next steps of the README
length=(--train-epochs "${epochs:-1}")
[[ -z "$steps" ]] || length=(--train-steps "$steps")
more=("${length[@]}" ${more[@]+"${more[@]}"})
"$PYTHON" examples/quickstart.py check \
    "$model" "$data" "$valid_data" "$nproc" "$tp" "${more[@]}" || exit 2
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
began=$SECONDS
step() {
    local time=$((SECONDS - began))
    printf '\n== %s/6 (%d:%02d) %s\n' "$1" $((time / 60)) $((time % 60)) "$2"
}
[[ ! -e "$output/command" ]] || echo "resuming $output, which was not finished"
mkdir -p "$output"
printf '%s\n' "$given" >"$output/command"

step 1 model
rate=() lora=""
# Adapters start at zero and need a higher learning rate than the weights of a model.
[[ ! " ${more[*]}" =~ " --lora-rank"[\ =]0*[1-9] ]] || lora=yes
if [[ -z "$model" ]]; then
    # A high learning rate for so small a model, a higher one for the small demonstration set.
    lr="$([[ -z "$data" ]] && echo 3e-4 || echo 1e-4)"
    [[ -z "$lora" ]] || lr="$([[ -z "$data" ]] && echo 2e-3 || echo 1e-3)"
    rate=(--lr "$lr" --lr-warmup-fraction 0.1)
    model=.cache/models/smollm2-135m
    "$PYTHON" examples/fetch_smollm2.py "$model"
else
    [[ -z "$lora" ]] || rate=(--lr 2e-4 --head-lr 1e-3)
    echo "$model"
fi
[[ -z "$lora" ]] || echo "LoRA: ${rate[*]}, higher than without (the same flags set others)"

step 2 data
[[ -n "$data" ]] || data=examples/data/demo.train.jsonl valid_data=examples/data/demo.valid.jsonl
preprocess() {  # preprocess NAME INPUT FLAGS...
    [[ ! -e "$output/data/$1.json" ]] || { echo "$output/data/$1: exists already"; return; }
    "$PYTHON" tools/preprocess_pref.py --input "$2" --output-prefix "$output/data/$1" --force \
        --tokenizer "$model" --max-length "$max_length" "${@:3}"
}
if [[ -n "$valid_data" ]]; then
    preprocess valid "$valid_data"
    preprocess train "$data" --holdout "$valid_data"
    valid_prefix="$output/data/valid"
else
    preprocess train "$data" --valid-fraction 0.1
    valid_prefix="valid=$output/data/train.valid"
fi

# All GPUs, or two processes that share the cores.
gpus="$("$PYTHON" -c \
    'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
nproc="${nproc:-$((gpus ? gpus : 2))}"
tp="${tp:-$((nproc % 2 ? 1 : 2))}"
pack="$((gpus ? 16384 : 1024))"
step 3 "training on $nproc $( ((gpus)) && echo GPUs || echo processes), tensor parallel $tp"
train=("$PYTHON" tools/launch.py --standalone --nproc-per-node "$nproc" examples/pretrain_reward.py
    --tp "$tp" --pp 1 --pad-attention-heads --hf-model "$model" --data-path "$output/data/train"
    --valid-data-path "$valid_prefix" --save "$output/run" --load "$output/run" --log-interval 5
    --global-batch-size 16 --max-tokens-per-microbatch "$pack" ${rate[@]+"${rate[@]}"} "${more[@]}")
printf '%s\n' "${train[*]}"
code=0
"${train[@]}" || code=$?  # a complete run ends at once
((code != 75)) || echo "stopped early with everything saved: the same command resumes"
((code == 0)) || exit "$code"

step 4 "export to a Hugging Face folder, verified against the training's rewards"
"$PYTHON" tools/convert_to_hf.py --load "$output/run" --output "$output/export" --force \
    >"$output/convert.log" || { cat "$output/convert.log"; fail "the export failed"; }
grep -E '^(wrote|verif)' "$output/convert.log"
echo "how to serve it with transformers, vLLM and SGLang: $output/export/README.md"

step 5 "two replies to one prompt, scored by plain transformers"
"$PYTHON" examples/score_with_transformers.py "$output/export"

step 6 result
"$PYTHON" examples/quickstart.py table "$output" $((SECONDS - began)) | tee "$output/table.txt"
touch "$output/finished"
