"""Exact lists of the nearest items by FAISS: on GPUs, the gallery divided among them, else on the CPU.

Ranks need no lists: they are counted (exact.py). No GPU has run this yet: it is written after FAISS's documentation,
and its tests use fakes instead of GPU indexes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from modstruct import distributed
from modstruct.evaluation.retrieval.rows import Storage, as_float32, block_rows, check_dimensions, check_rows

Lists = tuple[np.ndarray, np.ndarray]
"""Scores, descending, and rows of each query's list, (b, k) each."""
RESULTS_AT_ONCE = 1 << 21
"""Scores held at once, over the queries of one search on a GPU: bounds the memory, not the result."""
GALLERY_BYTES = 256 << 20
"""Of float32 gallery rows that the CPU searches at once."""


def nearest(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    chosen: np.ndarray | None = None,
    storage: Storage = "float32",
    gpus: Sequence[int] | None = None,
) -> np.ndarray:
    """The k gallery items that score highest for each query, best first, (q, min(k, g)) int64.

    queries: (q, D), gallery: (g, D), float16 or float32, the gallery in memory or memory-mapped, scored by inner
    product. chosen: (g',), the rows of the gallery that are searched, None for all; results are places among them.
    storage: of the rows on GPUs; float16 is exact for rows that are float16 in their file. gpus: the GPUs that the
    gallery is divided among, by default this process's own where FAISS can use it; usable_gpus() are all. Of a tie the
    order is FAISS's. Memory: on GPUs the gallery, on the CPU a block of it and the lists.
    """
    for name, rows in (("query", queries), ("gallery", gallery)):
        check_rows(name, rows)
    check_dimensions("query", queries, "gallery", gallery)
    queries, size = as_float32(queries).numpy(), len(gallery) if chosen is None else len(chosen)
    k = min(k, size)
    gpus = own_gpu() if gpus is None else gpus
    if gpus and k <= LARGEST_GPU_LIST:
        try:
            return _on_gpus(queries, gallery, k, chosen, storage, gpus, size)
        except RuntimeError as error:
            say_gpu_failed(error)
    return _on_cpu(queries, gallery, k, chosen)


def _on_cpu(queries: np.ndarray, gallery: np.ndarray, k: int, chosen: np.ndarray | None) -> np.ndarray:
    import faiss

    best: list[Lists] = []
    for start, block in chosen_blocks(gallery, chosen, max(k, GALLERY_BYTES // (4 * gallery.shape[1]))):
        scores, rows = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        best = [merged([*best, (scores, rows + start)], k)]
    return best[0][1]


def _on_gpus(
    queries: np.ndarray,
    gallery: np.ndarray,
    k: int,
    chosen: np.ndarray | None,
    storage: Storage,
    gpus: Sequence[int],
    size: int,
) -> np.ndarray:
    import faiss

    resources = {gpu: faiss.StandardGpuResources() for gpu in gpus}

    def flat(gpu: int, rows: range):
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = gpu, storage == "float16"
        index = faiss.GpuIndexFlatIP(resources[gpu], gallery.shape[1], config)
        for _, block in chosen_blocks(gallery, chosen, within=rows):
            index.add(block)
        return index

    index = ShardedIndex(size, gpus, flat)
    step = max(1, RESULTS_AT_ONCE // k)
    return np.concatenate([index.search(queries[i : i + step], k)[1] for i in range(0, len(queries), step)])


def chosen_blocks(
    gallery: np.ndarray, chosen: np.ndarray | None, at_once: int | None = None, within: range | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first place, float32 rows (b, D)) of the chosen rows of a gallery, or of a range of their places."""
    within = range(len(gallery) if chosen is None else len(chosen)) if within is None else within
    at_once = at_once or block_rows(gallery.shape[1])
    for start in range(within.start, within.stop, at_once):
        places = slice(start, min(start + at_once, within.stop))
        yield start, as_float32(gallery[places if chosen is None else chosen[places]]).numpy()


log = logging.getLogger(__name__)

LARGEST_GPU_LIST = 2048
"""Results per query, and clusters looked at, that FAISS can select on a GPU."""
CAPABILITIES = ((7, 0), (10, 0))
"""Compute capabilities that FAISS's builds have kernels for: from the first to below the second."""


def usable_gpus() -> list[int]:
    """Numbers of the GPUs that torch and FAISS see and FAISS has kernels for; none where the run is on the CPU.

    On a GPU that its build has no kernels for, FAISS ends the process instead of raising an error.
    """
    import faiss

    if not distributed.on_gpu():
        return []
    lowest, beyond = CAPABILITIES
    seen = range(min(faiss.get_num_gpus(), torch.cuda.device_count()))
    return [gpu for gpu in seen if lowest <= torch.cuda.get_device_capability(gpu) < beyond]


def own_gpu() -> list[int]:
    """This process's GPU where FAISS can use it: with several processes each has its own."""
    gpus = usable_gpus()
    return [gpu for gpu in gpus if gpu == torch.cuda.current_device()] if gpus else []


def say_gpu_failed(error: RuntimeError) -> None:
    """The CPU does what a GPU cannot, mostly for lack of memory: slower, not wrong."""
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


def merged(lists: Sequence[Lists], length: int) -> Lists:
    """Lists of several parts as one of the best `length`; of a tie the first part's."""
    if len(lists) == 1:
        ((scores, rows),) = lists
        return scores[:, :length], rows[:, :length]
    scores, rows = (np.concatenate(arrays, axis=1) for arrays in zip(*lists, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, :length]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
