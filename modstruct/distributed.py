"""Processes: who am I, and sums and gathers that autograd understands. Nothing else asks torch.distributed.

The gradient scale of the whole project is decided here and only here. Every loss of modstruct returns the
value of the GLOBAL batch on every process. `gather` and `all_sum` have the true adjoint of the collective, so a
backward on every process leaves, on process p, W times that process's share of the gradient of that value
(W processes each start a backward of the same value). DeepSpeed then averages over the W processes, and the mean
is exactly the gradient of the global value.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from modstruct.config import RunError, refuse, require

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


class FailedElsewhere(RunError):
    """Another process failed, and says itself why."""


class LostProcess(RunError):
    """Another process ended without a word, and a collective with it."""

    @staticmethod
    def if_it_is(error: RuntimeError) -> LostProcess | None:
        """What gloo's, NCCL's or the store's error says of another process, in a user's words."""
        ours = isinstance(error, RunError)  # it has its own words
        lost = isinstance(error, dist.DistNetworkError) or any(sign in str(error) for sign in _LOST)
        return LostProcess(_LOST_MEANS) if lost and not ours else None


_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_LOST_MEANS = (
    "another process has ended; if it does not say why, it was killed, as the kernel does where memory runs out. "
    "`--resume latest` goes on from the last checkpoint"
)


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


def speaks_for_its_host() -> bool:
    """Whether this process tells what all others of its host notice too; on the main process's host, two may, since
    the main process may be what they have lost."""
    return int(os.environ.get("RANK", 0)) <= 1 or local_rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


def broadcast_object(value: object, source: int = 0) -> object:
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
    values = [None] * world_size()
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


def max_over_processes(values: Tensor) -> Tensor:
    """Elementwise maximum over the processes; no gradient. The input is left as it is."""
    values = values.clone()
    if is_distributed():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def sum_over_processes(values: Tensor) -> Tensor:
    """Elementwise sum over the processes; no gradient. The input is left as it is."""
    values = values.clone()
    if is_distributed():
        dist.all_reduce(values)
    return values


# torch 2.14 renamed both, and warns of the old names in every process.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        out = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
        _all_gather(out, rows.contiguous())
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        mine = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
        _reduce_scatter(mine, gradient.contiguous())
        return mine


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        return sum_over_processes(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)


def require_equal_rows(rows: Tensor, name: str) -> None:
    """Refuse, on every process alike, rows (B, …) that are not as many on each: a gather of them would hang."""
    if world_size() == 1:
        return
    count = len(rows)
    most, fewest = max_over_processes(torch.tensor([count, -count], device=rows.device)).tolist()
    remedy = f"every process must bring the same number, but they range from {-fewest} to {most}"
    require(most == -fewest, name, count, remedy)


def gather(rows: Tensor) -> Tensor:
    """(B, …) of every process -> (W B, …) on every process, in order of rank; differentiable.

    Every process must bring the same number of rows (`require_equal_rows` asks).
    """
    return _Gather.apply(rows) if world_size() > 1 else rows


def all_sum(values: Tensor) -> Tensor:
    """Elementwise sum over the processes, on every process; differentiable."""
    return _AllSum.apply(values) if world_size() > 1 else values


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, sent: Tensor, sends: list[int], receives: list[int], order: Tensor) -> Tensor:
        ctx.sends, ctx.receives, ctx.shape = sends, receives, rows.shape
        ctx.save_for_backward(sent, order)
        received = rows.new_empty((sum(receives), *rows.shape[1:]))
        dist.all_to_all_single(received, rows[sent].contiguous(), receives, sends)
        return received[order]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        sent, order = ctx.saved_tensors
        back = torch.empty_like(gradient)
        back[order] = gradient
        returned = gradient.new_empty((sum(ctx.sends), *gradient.shape[1:]))
        dist.all_to_all_single(returned, back.contiguous(), ctx.sends, ctx.receives)
        total = gradient.new_zeros(ctx.shape)
        # Not index_add: on a GPU its sums depend on chance.
        return total.index_put_((sent,), returned, accumulate=True), None, None, None, None


class HostCopy:
    """Small numbers of a device on their way to the host: asked for early and read late, so that meanwhile the device
    has other work to do."""

    def __init__(self, values: Tensor):
        self._arrived = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list:
        """The numbers; the host waits for what the device was given before the copy, not for what came after."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


class RowExchange:
    """Rows of the global batch, wherever they lie, by the numbers that each process wants. Only what is wanted travels.

    wanted: (B,) int64, of all W B rows in order of rank, the same B on every process. Collective.
    How many rows go where is known to the device alone, and the host has to know it: the one place of a fusion step
    where it waits for the device. Make the exchange as soon as `wanted` is known, and take rows as late as there is
    other work. A process alone waits for nothing.
    """

    def __init__(self, wanted: Tensor):
        self.wanted = wanted
        self._splits: list[list[int]] | None = None
        if world_size() == 1:
            return
        count, me = len(wanted), rank()
        of_all = gather(wanted)  # (W B,)
        owners = of_all // count
        mine = owners.view(world_size(), -1)[me]
        # No row is picked by whether it is wanted: how many these are, the host would have to wait for.
        self._sent = (of_all % count)[torch.argsort((owners != me).to(torch.uint8), stable=True)]
        # Rows come in order of their owners, and of each owner's in the order wanted.
        self._order = torch.empty_like(mine)
        self._order[torch.argsort(mine, stable=True)] = torch.arange(count, device=mine.device)
        sends = (owners.view(world_size(), -1) == me).sum(1)
        receives = (mine == torch.arange(world_size(), device=mine.device)[:, None]).sum(1)
        self._copy = HostCopy(torch.stack([sends, receives]))

    def __call__(self, rows: Tensor) -> Tensor:
        """Row wanted[j] of all processes' rows, (B, …), of this process's (B, …); differentiable.

        A row may be wanted often; its gradient is the sum.
        """
        if world_size() == 1:
            return rows[self.wanted]
        if self._splits is None:
            self._splits = self._copy.read()
            self._sent = self._sent[: sum(self._splits[0])]
        return _Exchange.apply(rows, self._sent, *self._splits, self._order)
