#!/usr/bin/env bash
# A Slurm cluster on this machine, in one folder and on ports of its own:
# start DIR | stop DIR | install. Needs root and Debian's packages slurm-wlm and munge. Prints the
# reason and exits with 77 where it cannot.
set -euo pipefail
cannot() { echo "$1"; exit 77; }

case "${1:-}" in
install)
  [ "$(id -u)" = 0 ] || cannot "needs root"
  command -v apt-get >/dev/null || cannot "no apt-get here"
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge \
    >/dev/null 2>&1 || cannot "apt-get install slurm-wlm munge failed"
  ;;
start)
  dir=$2
  [ "$(id -u)" = 0 ] || cannot "needs root"
  for program in munged slurmctld slurmd sbatch; do
    PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null ||
      cannot "$program is not installed (apt-get install slurm-wlm munge)"
  done
  mkdir -p "$dir/state" "$dir/spool" "$dir/munge"
  chmod 755 "$dir" && chmod 711 "$dir/munge"
  dd if=/dev/urandom of="$dir/munge/key" bs=128 count=1 2>/dev/null
  chmod 400 "$dir/munge/key" && chown -R munge "$dir/munge"
  host=$(hostname -s)
  cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$((16000 + $$ % 1000))
SlurmdPort=$((17000 + $$ % 1000))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=60
MinJobAge=3600
GresTypes=gpu
SlurmdParameters=config_overrides
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
NodeName=$host NodeAddr=127.0.0.1 CPUs=96 Gres=gpu:8 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=$host MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  for i in 0 1 2 3 4 5 6 7; do mknod "$dir/gpu$i" c 1 3; done # GPUs in name only
  echo "NodeName=$host Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
  export SLURM_CONF="$dir/slurm.conf" PATH="$PATH:/usr/sbin"
  su -s /bin/bash munge -c "$(command -v munged) --force --key-file=$dir/munge/key \
    --socket=$dir/munge/socket --pid-file=$dir/munge/pid --log-file=$dir/munge/log \
    --seed-file=$dir/munge/seed" || cannot "munged did not start"
  slurmctld -c || cannot "slurmctld did not start"
  slurmd || cannot "slurmd did not start"
  for _ in $(seq 60); do
    sinfo -h -o %t 2>/dev/null | grep -q idle && exit 0
    sleep 0.5
  done
  cannot "no idle node after 30 seconds: $(tail -n 3 "$dir/slurmctld.log")"
  ;;
stop)
  dir=$2
  # Jobs first: what a daemon started and nobody ends would stay on this machine.
  export SLURM_CONF="$dir/slurm.conf" PATH="$PATH:/usr/sbin"
  scancel --user=root 2>/dev/null || true
  for _ in $(seq 120); do
    [ -n "$(squeue -h 2>/dev/null)" ] || break
    sleep 0.5
  done
  for file in "$dir/slurmd.pid" "$dir/slurmctld.pid" "$dir/munge/pid"; do
    if [ -s "$file" ]; then kill "$(cat "$file")" 2>/dev/null || true; fi
  done
  ;;
*) echo "usage: $0 install | start DIR | stop DIR"; exit 2 ;;
esac
