"""Exact lists of the nearest items by FAISS: on GPUs, the gallery divided among them, else on the CPU.

Ranks need no lists: they are counted (exact.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from modstruct.evaluation.retrieval.gpus import LARGEST_GPU_LIST, ShardedIndex, merged, own_gpu, say_gpu_failed
from modstruct.evaluation.retrieval.rows import Storage, as_float32, block_rows, check_dimensions, check_rows

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
    product. chosen: (g',), the rows of the gallery that are searched, None for all; what is returned are places among
    them. storage: of the rows on GPUs; float16 is exact for rows that are float16 in their file. gpus: those that the
    gallery is divided among, by default this process's own where FAISS can use it; gpus.usable_gpus() are all. Of a tie
    the order is FAISS's. Memory: on GPUs the gallery, on the CPU a block of it and the lists.
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

    best = None
    for start, block in chosen_blocks(gallery, chosen, max(k, GALLERY_BYTES // (4 * gallery.shape[1]))):
        found = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        found = (found[0], found[1] + start)
        best = found if best is None else merged([best, found], k)
    return best[1]


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
