"""Runs a function on several real processes, joined by gloo on this machine."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT_SECONDS = 180  # for one collective; a busy machine with two cores starts four processes slowly
# Imported once by the server that forks the processes: anew they cost each of them five seconds. The server only
# imports, so no running thread is lost in the fork.
PRELOADED = [
    *(
        "torch.distributed",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "pytest",
        "hypothesis",
        "deepspeed",
        "open_clip",
    ),
    *("transformers.models.bert.modeling_bert", "scipy.stats", "jsonargparse", "webdataset"),
]


def run_on_processes(function: Callable, world_size: int, *args: object) -> list:
    """`function(*args)` on each of `world_size` processes; returns their results in order of rank.

    function: defined at the top of a module, since the processes import it by name. It finds its rank through
    `modstruct.distributed`. It may return None, numbers, strings and (CPU) tensors, also in lists, tuples and dicts.
    Every call has new processes, each with torch on one thread and the environment variables of the caller.
    Raises RuntimeError with the traceback of every process that failed, the earliest first, and ends the others.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    # The store lives in this process on a port that the system picks: no other program can take it in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            multiprocessing.start_processes(
                _child, (function, args, environment, folder), nprocs=world_size, start_method="forkserver"
            )
        except multiprocessing.ProcessRaisedException as error:
            # The others often fail too, of the lost connection, and may be noticed first.
            failures = sorted(Path(folder).glob("*.failure"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError("\n".join(path.read_text() for path in failures)) from error
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=True) for rank in range(world_size)]


def _child(rank: int, function: Callable, args: tuple, environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    world_size = int(environment["WORLD_SIZE"])
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    try:
        store = dist.TCPStore("127.0.0.1", int(environment["MASTER_PORT"]), is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        torch.save(function(*args), Path(folder, f"{rank}.result"))
        dist.barrier()
    except Exception:
        Path(folder, f"{rank}.failure").write_text(f"process {rank} of {world_size}:\n{traceback.format_exc()}")
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
