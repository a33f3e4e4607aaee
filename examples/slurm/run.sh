#!/usr/bin/env bash
# Inside a Slurm job: one launcher per node, a rank per GPU. Arguments go to
# examples/pretrain_reward.py.
#
# The .sbatch files call this script from the folder in which sbatch was called (the checkout).
# SIGTERM (a preemption, scontrol requeue) and SIGUSR1 (--signal, before the time limit) reach the
# ranks, which save and exit with code 75; then the job is requeued and resumes from its newest
# checkpoint.
set -uo pipefail
[ -n "${SLURM_JOB_ID:-}" ] ||
  { echo "error: not inside a Slurm job: start the .sbatch file with sbatch" >&2; exit 2; }
: "${RUN:?RUN=folder of the run, on storage that all nodes see}"

source examples/length_flags.sh
length_flags "$@"
set -- ${flags[@]+"${flags[@]}"}

export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_GPU:-8}}"
RANKS_PER_NODE="${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

trap 'echo "batch script: SIGTERM; the ranks save"' TERM
trap 'echo "batch script: SIGUSR1; the ranks save"' USR1

srun --ntasks-per-node=1 --wait=60 "$PYTHON" tools/launch.py \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$RANKS_PER_NODE" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
  examples/pretrain_reward.py --save "$RUN" --load "$RUN" "$@" &
ranks=$!
# A trapped signal ends a wait; the ranks are still saving then.
wait "$ranks"; code=$?
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; code=$?; done

if [ "$code" -eq 75 ]; then
  echo "batch script: stopped early, everything saved; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || true # a requeue may be what stopped it
fi
exit "$code"
