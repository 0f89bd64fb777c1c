#!/usr/bin/env bash
# Several hosts with torchrun; call it on every host, with its own NODE_RANK:
#   HOSTS=2 NODE_RANK=0 FIRST_HOST=10.0.0.1 INTERFACE=eth0 bash launch_scripts/hosts_torchrun.sh --recipe clip_rn50_cc3m
set -euo pipefail
HOSTS=${HOSTS:?how many hosts}
NODE_RANK=${NODE_RANK:?number of this host, 0 to HOSTS - 1}
FIRST_HOST=${FIRST_HOST:?address of host 0 in the network that the hosts share}
INTERFACE=${INTERFACE:?the network interface through which the hosts reach each other, as `ip addr` names it}
PROCESSES=${PROCESSES:-8}  # on each host: one a GPU
PORT=${PORT:-29500}        # free on host 0
DS_CONFIG=${DS_CONFIG:-ds_configs/zero2.json}

# gloo would take the address of the host's own name, which is often 127.0.0.1, and wait for ever; NCCL guesses too.
export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE

# The static rendezvous: the number of hosts never changes within a run, and no host has to find out by its own name
# whether it is the first. --resume latest: the same command starts the run and resumes it.
exec torchrun --nnodes "$HOSTS" --node_rank "$NODE_RANK" --nproc_per_node "$PROCESSES" \
    --master_addr "$FIRST_HOST" --master_port "$PORT" \
    launch_scripts/pretrain.py --ds_config "$DS_CONFIG" --resume latest "$@"
