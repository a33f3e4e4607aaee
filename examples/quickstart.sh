#!/usr/bin/env bash
# From preferences to a reward model that plain transformers loads, with one command:  bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'EOF'
Trains a reward model and exports it: set-up, model, data, training with tensor parallelism, held-out accuracy before
and after, Hugging Face folder, two scored replies. Without flags: SmolLM2-135M-Instruct on the demonstration set in
examples/data, five to twenty minutes on two cores, by the processor. On a CUDA machine it uses all GPUs.

    bash examples/quickstart.sh [flags] [any flag of examples/pretrain_reward.py]

  --model NAME        Hugging Face folder or hub name of a Llama or InternLM2 model (default: SmolLM2-135M-Instruct)
  --data DATA         preference data: a file (.jsonl .json .csv .parquet ..., also .gz), a folder or a hub name
  --valid-data DATA   held-out data (default with --data: a tenth of it, split by prompt)
  --output DIR        where everything goes (default: runs/quickstart, or with a number if that one is finished)
  --steps N           optimizer steps, in place of --epochs
  --epochs X          passes over the data (default: 1)
  --max-length N      longest conversation in tokens (default: 2048)
  --nproc N           processes (default: all GPUs; 2 without GPU)
  --tp N              tensor-parallel ranks (default: 2, or 1 if the number of processes is odd)
EOF
}

fail() {
    echo "error: $*" >&2
    exit 2
}

model="" data="" valid="" output="" rate=() steps="" epochs="" max_length=2048 nproc="" tp="" extra=()
given="$*"
while (($#)); do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --model | --data | --valid-data | --output | --steps | --train-steps | --epochs | --train-epochs | --max-length | --nproc | --tp)
            (($# >= 2)) || fail "$1 needs a value (bash examples/quickstart.sh --help)"
            case "$1" in
                --model) model="$2" ;; --data) data="$2" ;; --valid-data) valid="$2" ;; --output) output="$2" ;;
                --steps | --train-steps) steps="$2" ;; --epochs | --train-epochs) epochs="$2" ;; --max-length) max_length="$2" ;;
                --nproc) nproc="$2" ;; --tp) tp="$2" ;;
            esac
            shift 2 ;;
        *) extra+=("$1"); shift ;;
    esac
done
[[ -z "$steps" || -z "$epochs" ]] || fail "give one of --steps and --epochs"
[[ -z "$valid" || -n "$data" ]] || fail "--valid-data needs --data"
for pair in "--steps=$steps" "--max-length=$max_length" "--nproc=$nproc" "--tp=$tp"; do
    [[ "${pair#*=}" =~ ^([1-9][0-9]*)?$ ]] || fail "${pair%%=*} ${pair#*=}: a number from 1 was expected"
done
[[ "${extra[0]:---}" == --* ]] || fail "${extra[0]}: not a flag (bash examples/quickstart.sh --help)"

# A finished output is never written over; an unfinished one of the same command is gone on with.
if [[ -z "$output" ]]; then
    output=runs/quickstart
    for ((i = 2; ; i++)); do
        [[ -e "$output/finished" || (-e "$output" && "$(cat "$output/command" 2>/dev/null)" != "$given") ]] || break
        output="runs/quickstart-$i"
    done
elif [[ -e "$output/finished" ]]; then
    fail "--output $output: holds a finished run; choose another folder (its table: $output/table.txt)"
elif [[ -e "$output" && "$(cat "$output/command" 2>/dev/null)" != "$given" ]] && [[ ! -d "$output" || -n "$(ls -A "$output")" ]]; then
    fail "--output $output: exists already and is no unfinished run of this command; choose another folder"
fi

source examples/setup_env.sh
rmega_setup plots,serve || exit 2  # the README's next steps draw pages and serve
length=(--train-epochs "${epochs:-1}")
[[ -z "$steps" ]] || length=(--train-steps "$steps")
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" examples/quickstart_check.py "$model" "$data" "$valid" "$nproc" "$tp" \
    "${length[@]}" ${extra[@]+"${extra[@]}"} || exit 2
began=$SECONDS
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}"
count() { (($1 == 1)) && echo "1 $2" || echo "$1 $3"; }  # count N ONE MANY
step() { printf '\n== %s (%d:%02d) %s\n' "$1" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$2"; }

[[ ! -e "$output/command" ]] || echo "going on with $output, which was not finished"
mkdir -p "$output"
printf '%s\n' "$given" >"$output/command"

step 1/6 "model"
if [[ -z "$model" ]]; then
    # So small a model takes a high learning rate, and so small a set as the demonstration one a still higher one.
    rate=(--lr "$([[ -z "$data" ]] && echo 3e-4 || echo 1e-4)" --lr-warmup-fraction 0.1)
    model=.cache/models/smollm2-135m
    "$PYTHON" examples/fetch_smollm2.py --output "$model"
else
    echo "$model"
fi

step 2/6 "data"
own_split=()
if [[ -z "$data" ]]; then
    data=examples/data/demo.train.jsonl valid=examples/data/demo.valid.jsonl
elif [[ -z "$valid" ]]; then
    own_split=(--valid-fraction 0.1)
fi
preprocess() { # preprocess PREFIX INPUT FLAGS...
    local prefix="$1" input="$2"
    shift 2
    if [[ -e "$prefix.json" ]]; then
        echo "$prefix: already there"
    else
        "$PYTHON" tools/preprocess_pref.py --input "$input" --tokenizer "$model" --output-prefix "$prefix" \
            --max-length "$max_length" --force "$@"
    fi
}
if [[ -n "$valid" ]]; then
    preprocess "$output/data/valid" "$valid"
    preprocess "$output/data/train" "$data" --holdout "$valid"
    valid_prefix="$output/data/valid"
else
    preprocess "$output/data/train" "$data" "${own_split[@]}"
    valid_prefix="valid=$output/data/train.valid"
fi

# All GPUs, or two processes that share the cores.
gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
if ((gpus > 0)); then
    nproc="${nproc:-$gpus}" sizes=(--global-batch-size 16 --max-tokens-per-microbatch 16384)
else
    nproc="${nproc:-2}" sizes=(--global-batch-size 16 --max-tokens-per-microbatch 1024)
    cores="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}"
fi
tp="${tp:-$((nproc % 2 ? 1 : 2))}"

step 3/6 "training on $( ((gpus)) && count "$nproc" GPU GPUs || echo "$(count "$nproc" process processes) of $(count "$OMP_NUM_THREADS" thread threads)"), tensor parallel $tp"
[[ -n "$steps" ]] || length=(--train-epochs "${epochs:-1}")
train=("$PYTHON" tools/launch.py --standalone --nproc-per-node "$nproc" examples/pretrain_reward.py  # torchrun
    --tp "$tp" --pp 1 --pad-attention-heads --hf-model "$model" --data-path "$output/data/train"
    --valid-data-path "$valid_prefix" --save "$output/run" --load "$output/run" "${length[@]}" "${sizes[@]}"
    ${rate[@]+"${rate[@]}"} --log-interval 5 ${extra[@]+"${extra[@]}"})
printf '%s\n' "${train[*]}"
if [[ -e "$output/trained" ]]; then
    echo "$output/run: already trained"
else
    code=0
    "${train[@]}" || code=$?
    ((code != 75)) || { echo "stopped early with everything saved: the same command goes on with it"; exit 75; }
    ((code == 0)) || exit "$code"
    touch "$output/trained"
fi

step 4/6 "export to a Hugging Face folder, verified against the training's rewards"
if [[ -e "$output/export/config.json" && ! -e "$output/export/UNVERIFIED" ]]; then
    echo "$output/export: already there"
else
    "$PYTHON" tools/convert_to_hf.py --load "$output/run" --output "$output/export" --force >"$output/convert.log" ||
        { cat "$output/convert.log"; fail "the export failed"; }
    grep -E '^(wrote|verification|verified)' "$output/convert.log"
    echo "how to serve it with transformers, vLLM and SGLang: $output/export/README.md"
fi

step 5/6 "two replies to one prompt, scored by plain transformers"
"$PYTHON" examples/score_with_transformers.py "$output/export"

step 6/6 "result"
"$PYTHON" examples/quickstart_table.py --output "$output" --seconds $((SECONDS - began)) --python "$PYTHON" |
    tee "$output/table.txt"
touch "$output/finished"
