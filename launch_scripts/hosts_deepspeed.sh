#!/usr/bin/env bash
# Several hosts with DeepSpeed's launcher, which starts the others over ssh (without a password) from where you call it:
#   HOSTFILE=hosts.txt INTERFACE=eth0 bash launch_scripts/hosts_deepspeed.sh --recipe clip_rn50_cc3m --method clip_inmodal
# Where no host reaches another by ssh, call it on every host with NODE_RANK=0, 1, … as well.
set -euo pipefail
HOSTFILE=${HOSTFILE:?a file with a line "HOST slots=GPUS" for each host, the first host first}
INTERFACE=${INTERFACE:?the network interface through which the hosts reach each other, as `ip addr` names it}
FIRST_HOST=${FIRST_HOST:-$(awk '$1 !~ /^#/ && NF {print $1; exit}' "$HOSTFILE")}  # its address in that network
PORT=${PORT:-29500}                                                               # free on the first host
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}

# gloo (CPU collectives, and the start of every run) asks for the address of the host's own name, which is often
# 127.0.0.1, and then waits for ever; NCCL guesses too. ssh passes no variable on, but the launcher sends this file.
export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
DS_ENV_FILE=$(mktemp)
export DS_ENV_FILE
trap 'rm -f "$DS_ENV_FILE"' EXIT
printf '%s\n' "GLOO_SOCKET_IFNAME=$INTERFACE" "NCCL_SOCKET_IFNAME=$INTERFACE" > "$DS_ENV_FILE"

# --resume latest: the same command starts the run and resumes it.
deepspeed --hostfile "$HOSTFILE" --master_addr "$FIRST_HOST" --master_port "$PORT" \
    ${NODE_RANK:+--no_ssh --node_rank "$NODE_RANK"} \
    launch_scripts/pretrain.py --ds_config "$DS_CONFIG" --resume latest "$@"
