"""Processes: who am I, and what do the others say? Only this room asks torch.distributed."""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from modstruct.errors import FailedElsewhere, RunError, refuse, require

T = TypeVar("T")
WAIT_SECONDS = 60
"""After which, and as long again each time, a process that waits for the others at the start says so."""
MINUTES = 240
"""That a collective may take: while one process indexes a large source at its first use, or searches, the others wait
in one."""
NETWORK_REMEDY = (
    "on several hosts MASTER_ADDR must be the first host's address in a network that all share, and on each host "
    "GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME on GPUs) the name of its interface in that network, as `ip addr` says"
)
PORT_REMEDY = (
    "another program of this host listens there, such as another run: give a free one "
    "(`--master_port` of deepspeed and torchrun; MASTER_PORT where you set it yourself, as under SLURM)"
)


def start_processes() -> None:
    """Join the other processes of the launcher (deepspeed, torchrun, SLURM); alone if there is no launcher.

    DeepSpeed finds torch.distributed started, and what only measures needs no DeepSpeed. Raises ValueError for a
    MASTER_PORT that cannot be used, RunError where the others cannot be joined.
    """
    if is_distributed():
        return
    if "RANK" not in os.environ:
        os.environ.update(_slurm_task() or ALONE)
    if on_gpu():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())  # SLURM may show each task its own GPU only
    backend = "nccl" if on_gpu() else "gloo"
    minutes = os.environ.get("DEEPSPEED_TIMEOUT", str(MINUTES))
    positive = minutes.isdigit() and int(minutes) > 0
    require(positive, "DEEPSPEED_TIMEOUT", minutes, "give the minutes that processes wait for each other, as 120")
    timeout = timedelta(minutes=int(minutes))
    if int(os.environ["WORLD_SIZE"]) == 1:  # needs no port, which another run may hold
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    joined = threading.Event()
    threading.Thread(target=_say_while_waiting, args=[joined], daemon=True).start()
    try:
        dist.init_process_group(backend, timeout=timeout, device_id=device() if on_gpu() else None)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _keep_a_store()
    except (RuntimeError, ValueError) as error:  # torch has its own wording for each
        cause = str(error).strip().splitlines()[0][:300]
        port = os.environ.get("MASTER_PORT")
        require(port is None or port.isdigit(), "MASTER_PORT", port, "must be the number of a port")
        require("EADDRINUSE" not in str(error), "MASTER_PORT", port, PORT_REMEDY)
        raise RunError(f"this process cannot join the others {_through()} ({cause}): {NETWORK_REMEDY}") from error
    finally:
        joined.set()


_kept_store: dist.Store | None = None


def _keep_a_store() -> None:
    """Let the main process hold a store: torchrun's ends with it, and then a run still saves and stops in order."""
    global _kept_store
    host = os.environ["MASTER_ADDR"]
    mine = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if is_main() else None
    port = broadcast_object(mine.port if mine is not None else 0)
    _kept_store = mine if mine is not None else dist.TCPStore(host, port, is_master=False, wait_for_workers=False)


def _through() -> str:
    return f"through {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _say_while_waiting(joined: threading.Event) -> None:
    world, waited = os.environ["WORLD_SIZE"], 0
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's and DeepSpeed's word
    means = "those of this host are still starting, which takes minutes on a busy machine"
    if here != world:
        means = f"they have not started yet, or cannot be reached; {NETWORK_REMEDY}"
    while not joined.wait(WAIT_SECONDS):
        waited += WAIT_SECONDS
        told = f"process {os.environ['RANK']} still waits for the others of {world} {_through()} after {waited} s"
        print(f"{told}: {means}", file=sys.stderr, flush=True)


def _slurm_task() -> dict[str, str]:
    """What `srun` says of this process, in the launchers' words; nothing if it started no more than one."""
    if int(os.environ.get("SLURM_NTASKS", 1)) == 1 or "SLURM_PROCID" not in os.environ:
        return {}
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        refuse("MASTER_ADDR, MASTER_PORT", None, "export the first host's name and a free port before `srun`")
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    names["LOCAL_WORLD_SIZE"] = "SLURM_NTASKS_PER_NODE"  # set where sbatch was told it
    return {ours: os.environ[theirs] for ours, theirs in names.items() if theirs in os.environ}


# What a launcher would say.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


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


def local_world_size() -> int:
    """Processes of this host, as the launcher has told; 1 if it has not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, DeepSpeed


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

    Raises RuntimeError, after the timeout, where the process that holds them does not answer.
    """
    held = _kept_store if _kept_store is not None else dist.distributed_c10d._get_default_store()
    store = dist.PrefixStore(name, held.clone())
    store.set_timeout(timedelta(seconds=timeout_seconds))
    return store


_first_has_run = False


def main_first(build):
    """Run `build` on one process of each host first, then on the others, which find what the first one made.

    An error of the first process reaches all of them, so that none waits for ever.
    """
    global _first_has_run
    error = result = None
    if local_rank() == 0:
        try:
            result = build()
        except Exception as e:  # reported by every process below
            error = e
    fail_together(error, f"{type(error).__name__}: {error}")
    if local_rank() == 0:
        return result
    _first_has_run = True
    try:
        return build()
    finally:
        _first_has_run = False


def first_has_run() -> bool:
    """Whether this is called in `main_first` on a process of which another of its host has done the same before."""
    return _first_has_run


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
