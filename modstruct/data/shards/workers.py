"""Loader processes: how they start, and which signals reach them."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import util
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.synchronize import SemLock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_storage
from torch.utils.data import DataLoader, Dataset, get_worker_info

from modstruct import stopping
from modstruct.errors import RunError

log = logging.getLogger(__name__)

BATCHES_AHEAD = 2  # prefetched by each loader process
LOSSES_IN_A_ROW = 3  # of loader processes without a batch in between, that a run tolerates

ALIGNMENT = 64  # bytes, of each tensor in a memory file

IN_WORKER = "in DataLoader worker process"  # as torch says it

Batch = TypeVar("Batch")


class WorkerLoader(DataLoader[Batch]):
    """A DataLoader whose items are whole batches and whose processes outlive SIGTERM and SIGINT.

    dataset: its item is a batch. items: the keys to load, in order. workers: loader processes; 0 loads in this one.
    parts: batches of one training step.
    """

    def __init__(self, dataset: Dataset[Batch], items: Sequence, workers: int, parts: int = 1):
        self._items = _Items(items)
        self.parts = parts
        super().__init__(
            dataset,
            batch_size=None,
            sampler=self._items,
            num_workers=workers,
            collate_fn=_unchanged,
            prefetch_factor=BATCHES_AHEAD if workers else None,
            multiprocessing_context=_context() if workers else None,
            worker_init_fn=_start_worker if workers else None,
            # Its own: otherwise starting a loader would advance the random state that a resumed run must find.
            generator=torch.Generator(),
        )

    def __iter__(self):
        self._items.done = 0
        return super().__iter__() if self.num_workers == 0 else self._restarted_after_losses(self._from_processes())

    def _restarted_after_losses(self, batches: Iterator) -> Iterator:
        """The batches; when a loader process is killed, new ones make the remaining batches: the same ones, since an
        item is a function of its key."""
        losses = 0
        while True:
            try:
                for batch in batches:
                    self._items.done += 1
                    losses = 0
                    yield batch
                return
            except (RuntimeError, EOFError, ConnectionError) as error:
                if isinstance(error, RunError) and IN_WORKER in str(error):  # torch puts the traceback into the words
                    raise type(error)(str(error).rstrip().rpartition("\n")[2].partition(": ")[2]) from error
                if not _is_a_loss(error):
                    raise
                losses += 1
                cause = str(error) or "it ended while it handed over a batch"
                lost = f"a loader process was lost ({cause}; the kernel kills one where memory runs out)"
                if losses > LOSSES_IN_A_ROW:
                    fewer = "give fewer, or a smaller train.micro_batch or data.shuffle_window"
                    raise RunError(f"data.workers = {self.num_workers}: {lost}, {losses} in a row; {fewer}") from None
            log.warning("data.workers: %s; its work is resumed by new ones", lost)
            batches = self._from_processes()

    def _from_processes(self) -> Iterator:
        before, named_before = set(multiprocessing.active_children()), _named_semaphores()
        with stopping.children_inherit_block():
            batches = super().__iter__()
        named = _named_semaphores() - named_before
        end = partial(_end, [child for child in multiprocessing.active_children() if child not in before], named)
        atexit.register(end)  # for an iteration that an error interrupts
        stopping.at_end(end)
        return _until_the_end(_unnamed_after(batches, self.num_workers, named), end)


def _is_a_loss(error: Exception) -> bool:
    """Whether the error means that a worker died, not that it raised an error."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    return IN_WORKER not in str(error)


class _Items:
    """Keys in order, without the first `done`."""

    def __init__(self, keys: Sequence):
        self.keys, self.done = keys, 0

    def __iter__(self) -> Iterator:
        return iter(self.keys[self.done :])

    def __len__(self) -> int:
        return len(self.keys)


def _until_the_end(batches: Iterator, end: Callable[[], None]) -> Iterator:
    """The batches; afterwards, on an error, or when the iterator is dropped, the loader processes are ended."""
    try:
        yield from batches
    finally:
        end()
        atexit.unregister(end)
        stopping.not_at_end(end)


def _named_semaphores() -> set[util.Finalize]:
    """What removes the names of this process's semaphores from /dev/shm at its end, one each."""
    finalizers = list(util._finalizer_registry.values())  # type: ignore[attr-defined]
    return {f for f in finalizers if f._callback is SemLock._cleanup}  # type: ignore[attr-defined]


def _unnamed_after(batches: Iterator, workers: int, named: set[util.Finalize]) -> Iterator:
    """The batches; once each loader process has brought one, it has opened its semaphores, whose names can go: those
    that are there when everything is killed stay in /dev/shm."""
    for number, batch in enumerate(batches, 1):
        if number == workers:
            _remove(named)
        yield batch


def _remove(named: set[util.Finalize]) -> None:
    for remove in named:
        remove()  # once; again, it does nothing


def _end(workers: list[BaseProcess], named: set[util.Finalize]) -> None:
    """End the running loader processes, and remove their semaphores, of which Python's tracker would warn.

    torch and multiprocessing would send SIGTERM, which these ignore, and wait for ever. torch reports a killed worker
    as an error if it is a child of this process; ours are children of the server.
    """
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    _remove(named)


class OutgoingRows:
    """Buffers that the rows of a batch are written to, and the way of its tensors to the training process.

    In a loader process the next batch reuses the buffers, since all tensors of a batch are copied to one memory file.
    Left to torch, which shares each when it is sent, every batch would cost page faults for either memory, and each
    tensor a file that is open on both sides and a connection over which it is handed on.
    """

    def __init__(self):
        self._kept: dict[str, np.ndarray] = {}

    def empty(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Rows uint8 to fill; a loader process reuses those of the last batch of this name if they suffice."""
        if get_worker_info() is None:
            return np.empty(shape, dtype=np.uint8)
        kept = self._kept.get(name)
        if kept is None or kept.shape[1:] != shape[1:] or len(kept) < shape[0]:
            kept = self._kept[name] = np.empty(shape, dtype=np.uint8)
        return kept[: shape[0]]

    def sent(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a finished batch."""
        return tensors if get_worker_info() is None else shared_tensors(tensors)


def shared_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in one memory file, which loader processes map instead of getting copies of their own."""
    rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
    storage, starts = _memory_file([tensor.view(-1).view(torch.uint8).numpy().data for tensor in rows.values()])
    return {
        name: torch.empty(0, dtype=tensor.dtype).set_(storage, start // tensor.itemsize, tensor.shape, tensor.stride())
        for (name, tensor), start in zip(rows.items(), starts, strict=True)
    }


def shared_tensor(rows: np.ndarray) -> Tensor:
    """The same of an array uint8."""
    storage, _ = _memory_file([np.ascontiguousarray(rows).reshape(-1).data])
    return torch.empty(0, dtype=torch.uint8).set_(storage)[: rows.size].view(rows.shape)


def _memory_file(parts: Sequence[memoryview]) -> tuple[torch.UntypedStorage, list[int]]:
    """A copy of all parts that other processes can map, and where each starts.

    Its file has no name: /dev/shm, of which a container often has 64 MiB, does not limit it, and whatever end the
    processes meet, nothing is left there.
    """
    starts, end = [], 0
    for part in parts:
        starts.append(end)
        end += -(-len(part) // ALIGNMENT) * ALIGNMENT
    file = os.memfd_create("modstruct-batch")
    try:
        os.ftruncate(file, end)
        for part, start in zip(parts, starts, strict=True):
            written = 0
            while written < len(part):  # one call writes 2 GiB at most
                written += os.pwrite(file, part[written:], start + written)
        storage = torch.UntypedStorage._new_shared_fd_cpu(file, end)  # type: ignore[attr-defined]
        return storage, starts
    finally:
        os.close(file)  # the storage has one of its own


def _share_storage(storage: torch.UntypedStorage) -> tuple:
    """How a loader process hands a tensor's memory over: torch's way, but never through a file in /dev/shm."""
    if storage.nbytes() and not storage.is_shared():
        storage, _ = _memory_file([torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data])
    return reduce_storage(storage)


def _context() -> BaseContext:
    """A server process imports the loader once and forks every worker from its clean state.

    A fork of the training process itself would deadlock: torch and OpenMP have threads there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modstruct.data.shards.loader", "modstruct.data.shards.evaluation_samples"])
    return context


def _unchanged(batch: object) -> object:
    return batch


def _start_worker(_: int) -> None:
    ForkingPickler.register(torch.UntypedStorage, _share_storage)
    stopping.outlive_signals()
