"""Processes: who am I, and what do the others say? Only this room asks torch.distributed."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import warnings
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from modstruct.errors import FailedElsewhere, RunError, refuse

T = TypeVar("T")
WAIT_SECONDS = 60
"""After which a process that waits for the others at the start says so."""
NETWORK_REMEDY = (
    "on several hosts MASTER_ADDR must be the first host's address in a network that all share, and on each host "
    "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME on GPUs) the name of its interface in that network, as `ip addr` says"
)


def start_processes() -> None:
    """Join the other processes of the launcher (deepspeed, torchrun, SLURM); alone if there is no launcher."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls them so at every step of stage 3, and torch 2.14 complains each time.
    renamed = r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"
    warnings.filterwarnings("ignore", renamed, FutureWarning)
    if "RANK" not in os.environ:
        os.environ.update(_slurm_task() or _alone())
    if on_gpu():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())  # SLURM may show each task its own GPU only
    if int(os.environ["WORLD_SIZE"]) == 1:
        return _join(deepspeed)
    waiting = threading.Timer(WAIT_SECONDS, _say, [f"still waits for the others {_through()} after {WAIT_SECONDS} s"])
    waiting.daemon = True
    waiting.start()
    try:
        _join(deepspeed)
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0][:300]
        raise RunError(f"this process cannot join the others {_through()} ({cause}): {NETWORK_REMEDY}") from error
    finally:
        waiting.cancel()


def _join(deepspeed) -> None:
    # While one process indexes a large source at its first use, or searches, the others wait in a collective, and
    # DeepSpeed's ten minutes are too few for that.
    timeout = timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 240)))
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)


def _through() -> str:
    return f"through {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _say(trouble: str) -> None:
    print(f"process {os.environ['RANK']} {trouble}: {NETWORK_REMEDY}", file=sys.stderr, flush=True)


def _slurm_task() -> dict[str, str]:
    """What `srun` says of this process, in the launchers' words; nothing if it started no more than one."""
    if int(os.environ.get("SLURM_NTASKS", 1)) == 1 or "SLURM_PROCID" not in os.environ:
        return {}
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        refuse("MASTER_ADDR, MASTER_PORT", None, "export the first host's name and a free port before `srun`")
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    names["LOCAL_WORLD_SIZE"] = "SLURM_NTASKS_PER_NODE"  # set where sbatch was told it
    return {ours: os.environ[theirs] for ours, theirs in names.items() if theirs in os.environ}


def _alone() -> dict[str, str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in alone.items()}


def on_gpu() -> bool:
    """Whether processes compute on GPUs: where there are any, unless DS_ACCELERATOR says otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def device() -> torch.device:
    """Where this process computes."""
    if on_gpu():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def broadcast_object(value: T, source: int = 0) -> T:
    """The source process's value, on every process (a plain Python object of our own, never file contents)."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather_objects(value: object) -> list:
    """Every process's value, on every process, in order of rank (small Python objects of our own)."""
    if not is_distributed():
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def own_store(name: str, timeout_seconds: float) -> dist.Store:
    """Keys and values that all processes see, over a connection that the training thread does not use.

    Raises RuntimeError, after the timeout, where the process or launcher that holds them does not answer.
    """
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store().clone())
    store.set_timeout(timedelta(seconds=timeout_seconds))
    return store


def main_first(build):
    """Run `build` on one process of each host first, then on the others, which find what the first one made.

    An error of the first process reaches all of them, so that none waits for ever.
    """
    error = result = None
    if local_rank() == 0:
        try:
            result = build()
        except Exception as e:  # reported by every process below
            error = e
    fail_together(error, f"{type(error).__name__}: {error}")
    return result if local_rank() == 0 else build()


def fail_together(error: Exception | None, told: str) -> None:
    """Raise this process's error, if it has one, and FailedElsewhere on those that have none while another has.

    told: what the others are told of the error. Collective: none is left waiting for a process that failed.
    """
    errors = gather_objects(None if error is None else told)
    if error is not None:
        raise error
    failed = [e for e in errors if e is not None]
    if failed:
        raise FailedElsewhere(f"another process failed first: {failed[0]}")
