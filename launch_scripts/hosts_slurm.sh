#!/usr/bin/env bash
#SBATCH --job-name=modstruct
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
# Several hosts with SLURM. Set the lines above (a task is a process, one a GPU) and these, and submit from the root of
# the repository:
#   INTERFACE=ib0 sbatch launch_scripts/hosts_slurm.sh --recipe clip_rn50_cc3m --method clip_inmodal
# Three minutes before its time is up each process gets SIGTERM, and the run saves; the job then queues itself again and
# resumes. A job that is cancelled, or ends by itself, does not. REQUEUE=0 leaves queueing to you.
set -euo pipefail
INTERFACE=${INTERFACE:?the network interface through which the hosts reach each other, as `ip addr` names it}
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}
# source /path/to/venv/bin/activate

# gloo would take the address of the host's own name, which is often 127.0.0.1, and wait for ever; NCCL guesses too.
export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
# srun tells each process its number (SLURM_PROCID), but not where the first one is.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))  # two jobs on a host take two ports
export MASTER_ADDR MASTER_PORT

# --kill-on-bad-exit: without it the others would wait for a process that failed.
status=0
srun --kill-on-bad-exit=1 python launch_scripts/pretrain.py --ds_config "$DS_CONFIG" --resume latest "$@" || status=$?
# 143: saved on SIGTERM. That it came because the time is nearly up, SLURM's end of the job tells (from 22.05 on).
if [[ $status == 143 && ${REQUEUE:-1} == 1 && ${SLURM_JOB_END_TIME:-9999999999} -le $(($(date +%s) + 300)) ]]; then
  echo "The time is up: job $SLURM_JOB_ID is queued again and will resume"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
