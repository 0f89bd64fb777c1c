"""Which GPUs FAISS can use here, and one index a GPU over the parts of a gallery.

No GPU has run this yet: it is written after FAISS's documentation, and its tests put fakes in the place of GPU indexes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from modstruct import distributed

log = logging.getLogger(__name__)

LARGEST_GPU_LIST = 2048
"""Results per query, and clusters looked at, that FAISS can select on a GPU."""
CAPABILITIES = ((7, 0), (10, 0))
"""Compute capabilities that FAISS's builds have kernels for: from the first to below the second."""


def usable_gpus() -> list[int]:
    """Numbers of the GPUs that torch and FAISS see and FAISS has kernels for; none where the run is to keep off GPUs.

    On a card that its build has no kernels for, FAISS ends the process instead of raising an error.
    """
    import faiss

    if not distributed.on_gpu():
        return []
    lowest, beyond = CAPABILITIES
    seen = range(min(faiss.get_num_gpus(), torch.cuda.device_count()))
    return [gpu for gpu in seen if lowest <= torch.cuda.get_device_capability(gpu) < beyond]


def own_gpu() -> list[int]:
    """This process's GPU where FAISS can use it: of a run of several processes each has its own."""
    gpus = usable_gpus()
    return [gpu for gpu in gpus if gpu == torch.cuda.current_device()] if gpus else []


def say_gpu_failed(error: RuntimeError) -> None:
    """What a GPU cannot do, mostly for want of memory, the CPU does: slower, not wrong."""
    log.warning("FAISS cannot use the GPU, searching on the CPU instead: %s", error)


class ShardedIndex:
    """Indexes of consecutive parts of a gallery, one a GPU, searched side by side and their lists merged.

    FAISS's own shards (GpuMultipleClonerOptions.shard) take a flat gallery in one piece, from the host's memory; here
    each GPU is filled block by block, from a file if need be.
    """

    def __init__(self, rows: int, gpus: Sequence[int], make: Callable[[int, range], Any]):
        """make: (GPU, rows) -> the filled index of those rows of the gallery, with .search as FAISS's have."""
        edges = np.linspace(0, rows, min(len(gpus), rows) + 1).astype(int).tolist()
        parts = [range(*edge) for edge in pairwise(edges)]
        self._parts = [(part, make(gpu, part)) for gpu, part in zip(gpus, parts, strict=False)]

    def search(self, queries: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(b, D) float32 -> scores (b, length), descending, and gallery rows (b, length), -1 where none is found."""

        def search(part: tuple[range, Any]) -> tuple[np.ndarray, np.ndarray]:
            rows, index = part
            scores, found = index.search(queries, min(length, len(rows)))
            return np.where(found >= 0, scores, -np.inf), np.where(found >= 0, found + rows.start, -1)

        with ThreadPoolExecutor(len(self._parts)) as pool:
            lists = list(pool.map(search, self._parts))
        return merged(lists, length)


def merged(lists: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lists of several parts, (scores, rows) of each (b, k), as one of the best `length`; of a tie the first part's."""
    if len(lists) == 1:
        return tuple(array[:, :length] for array in lists[0])
    scores, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*lists, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :length]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
