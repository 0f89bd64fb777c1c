"""Exact image-text retrieval: recall at K both ways, beside the recall that chance would give.

One convention for ties, everywhere: a tie counts against the model. An item that is not a positive of a query and
scores as high as the query's best positive is placed ahead of it, so collapsed embeddings get 0, not 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

log = logging.getLogger(__name__)

RESULTS_AT_ONCE = 1 << 21
"""Scores held at once, over the queries of one search: bounds the memory, not the result."""
FAISS_GPU_LARGEST_LIST = 2048
"""Results per query that FAISS can select on a GPU."""
FAISS_GPU_CAPABILITIES = ((7, 0), (10, 0))
"""Compute capabilities that FAISS's builds have kernels for: from the first to below the second."""


def retrieval(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, recall_at: Sequence[int]
) -> dict[str, dict[str, dict[str, float]]]:
    """Recall at K of texts by images and of images by texts, each beside chance.

    image: (n, D) and text: (m, D), float32, scored by inner product. pairs: (p, 2), positives as (image row, text row);
    an image may have several texts and a text several images. recall_at: the K.
    Returns {"text_to_image": {"recall_at_1": {"value": …, "chance": …}, …}, "image_to_text": {…}}, shares from 0 to 1.
    A query is a hit if at least one of its positives is among the first K; queries without a positive are left out,
    but stay in the gallery of the other direction. A K above the size of the gallery counts as the whole gallery.
    """
    pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return {
        "text_to_image": _direction(text, image, pairs[:, ::-1], recall_at),
        "image_to_text": _direction(image, text, pairs, recall_at),
    }


def _direction(
    queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray, recall_at: Sequence[int]
) -> dict[str, dict[str, float]]:
    return recalls(items_ahead(queries, gallery, pairs, max(recall_at)), pairs, len(gallery), recall_at)


def recalls(
    ahead: np.ndarray, pairs: np.ndarray, gallery_size: int, recall_at: Sequence[int]
) -> dict[str, dict[str, float]]:
    """{"recall_at_1": {"value": …, "chance": …}, …} of queries, (q,) items ahead of whose positives."""
    positives = np.bincount(np.unique(pairs, axis=0)[:, 0], minlength=len(ahead))
    asked = positives > 0
    return {
        f"recall_at_{k}": {
            "value": float(np.mean(ahead[asked] < k)),
            "chance": float(np.mean(chance_of_hit(positives[asked], gallery_size, k))),
        }
        for k in recall_at
    }


def nearest(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """Rows of the k gallery items that score highest for each query, best first, (q, min(k, g)) int64.

    queries: (q, D), gallery: (g, D), float32, scored by inner product. Of a tie the order is FAISS's.
    """
    queries, gallery = _rows("query", queries), _rows("gallery", gallery)
    k = min(k, len(gallery))
    found = [rows for _, rows, _ in _search(gallery, queries, np.arange(len(queries)), k)]
    return np.concatenate(found)


def chance_of_hit(positives: np.ndarray, gallery_size: int, k: int) -> np.ndarray:
    """Probability that a uniformly random ranking has a positive among its first k, for each query.

    positives: (q,), number P of positives of each query among the G = gallery_size items.
    Returns (q,): 1 - C(G - P, K) / C(G, K), as a product of min(P, K) factors, which no factorial overflows.
    """
    k = min(k, gallery_size)
    distinct, place = np.unique(positives, return_inverse=True)
    few, many = np.minimum(distinct, k), np.maximum(distinct, k)  # C(G-P,K) / C(G,K) is symmetric in P and K
    misses = np.array(
        [
            np.prod(np.clip((gallery_size - m - np.arange(f)) / (gallery_size - np.arange(f)), 0, 1))
            for f, m in zip(few, many, strict=True)
        ]
    )
    return 1 - misses[place]


def items_ahead(queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray, k: int) -> np.ndarray:
    """Number of non-positive items placed ahead of each query's best positive, ties included, exact below k.

    queries: (q, D), gallery: (g, D), float32. pairs: (p, 2), positives as (query row, gallery row).
    Returns (q,) int64: the exact number where it is below k, some number of at least k elsewhere (and for queries
    without a positive). Hence `items_ahead(…, k) < j` is "a hit at j" for every j up to k.
    """
    queries, gallery = _rows("query", queries), _rows("gallery", gallery)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries have dimension {queries.shape[1]}, the gallery {gallery.shape[1]}: they must agree")
    pairs = _checked_pairs(pairs, len(queries), len(gallery))
    # Equal rows can get scores that differ in the last bit, by their place in the tiles of a matrix product (seen with
    # FAISS on the CPU from 20 queries on), and a tie would become a matter of luck. So each distinct row is searched
    # once, and counts as often as it occurs.
    distinct, row_of_item, occurrences = _distinct_rows(gallery)
    # Sorted keys query * (distinct rows) + row, with the number of positive items behind each.
    positive_keys, positive_items = np.unique(
        pairs[:, 0] * len(distinct) + row_of_item[pairs[:, 1]], return_counts=True
    )
    positive_rows = np.bincount(positive_keys // len(distinct), minlength=len(queries))

    ahead = np.full(len(queries), max(k, len(gallery)), dtype=np.int64)
    for asked, most in _queries_by_positives(positive_rows):
        # Why a list of k + P rows is enough, where P is the most rows that hold a positive of one query. At least k
        # rows of the list hold no positive, and the list leaves out only rows that score no higher than its last.
        #  - No positive in the list: all k of those rows score at least as high as the best positive: k are ahead.
        #  - The list ends inside a tie with the best positive: the same, all of its rows score as high: k are ahead.
        #  - Else every row that scores as high as the best positive is in the list: the count is exact.
        # A list of the whole gallery is the last case. The sum below gives all three without asking which it is.
        length = min(k + most, len(distinct))
        for scores, rows, chunk in _search(distinct, queries, asked, length):
            keys = chunk[:, None] * len(distinct) + rows  # (b, length)
            place = np.minimum(np.searchsorted(positive_keys, keys), len(positive_keys) - 1)
            positives = np.where(positive_keys[place] == keys, positive_items[place], 0)
            best = np.where(positives > 0, scores, -np.inf).max(axis=1, keepdims=True)  # (b, 1)
            others = occurrences[rows] - positives
            ahead[chunk] = np.where(scores >= best, others, 0).sum(axis=1)
    return ahead


def _queries_by_positives(positive_rows: np.ndarray):
    """Yields (queries, most positives among them), so that one query with many does not lengthen every list."""
    bucket = np.ceil(np.log2(np.maximum(positive_rows, 1))).astype(np.int64)
    for b in np.unique(bucket[positive_rows > 0]):
        asked = np.flatnonzero((positive_rows > 0) & (bucket == b))
        yield asked, int(positive_rows[asked].max())


def _search(gallery: np.ndarray, queries: np.ndarray, asked: np.ndarray, length: int):
    """Yields (scores (b, length) descending, gallery rows (b, length), query rows (b,)) for the queries asked."""
    index = _Index(gallery, length)
    step = max(1, RESULTS_AT_ONCE // length)
    for start in range(0, len(asked), step):
        chunk = asked[start : start + step]
        scores, rows = index.search(np.ascontiguousarray(queries[chunk]))
        yield scores, rows, chunk


class _Index:
    """FAISS's exact index of the gallery for lists of one length: on the GPU as long as that works, else on the CPU.

    gallery: (g, D) float32. What the GPU cannot do (mostly for want of memory) is logged: slower, not wrong.
    """

    def __init__(self, gallery: np.ndarray, length: int):
        self._gallery, self._length = gallery, length
        self._on_cpu = None
        self._on_gpu = None
        if _gpu_can_search(length):
            try:
                self._on_gpu = self._gpu_index()
            except RuntimeError as error:
                _log_gpu_failure(error)

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(b, D) float32 -> scores (b, length), descending, and gallery rows (b, length)."""
        if self._on_gpu is not None:
            try:
                return self._on_gpu.search(queries, self._length)
            except RuntimeError as error:
                _log_gpu_failure(error)
                self._on_gpu = None
        if self._on_cpu is None:
            self._on_cpu = self._cpu_index()
            self._on_cpu.add(self._gallery)
        return self._on_cpu.search(queries, self._length)

    def _cpu_index(self):
        import faiss

        return faiss.IndexFlatIP(self._gallery.shape[1])

    def _gpu_index(self):
        import faiss

        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), torch.cuda.current_device(), self._cpu_index())
        index.add(self._gallery)
        return index


def _gpu_can_search(length: int) -> bool:
    """Whether FAISS and torch see a GPU that can give lists of this length.

    On a card that its build has no kernels for, FAISS ends the process instead of raising an error.
    """
    import faiss

    if not torch.cuda.is_available() or faiss.get_num_gpus() == 0 or length > FAISS_GPU_LARGEST_LIST:
        return False
    lowest, beyond = FAISS_GPU_CAPABILITIES
    return lowest <= torch.cuda.get_device_capability() < beyond


def _log_gpu_failure(error: RuntimeError) -> None:
    log.warning("FAISS cannot use the GPU, searching on the CPU instead: %s", error)


def _distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(g, D) -> distinct rows (u, D), place of each row among them (g,), occurrences (u,)."""
    as_bytes = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).reshape(-1)
    _, first, place, occurrences = np.unique(as_bytes, return_index=True, return_inverse=True, return_counts=True)
    return rows[first], place, occurrences


def _rows(name: str, rows: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(rows, dtype=np.float32) + 0.0  # makes -0.0 and 0.0 the same bytes
    if rows.ndim != 2 or not rows.size:
        raise ValueError(f"{name} embeddings have shape {rows.shape}: give at least one row, as (rows, dimension)")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(rows)} {name} embeddings are not finite, the first is row {bad[0]}: "
            "the weights or the precision of the forward pass are broken"
        )
    return rows


def _checked_pairs(pairs: np.ndarray, queries: int, gallery: int) -> np.ndarray:
    pairs = np.unique(np.asarray(pairs, dtype=np.int64).reshape(-1, 2), axis=0)
    if not len(pairs):
        raise ValueError("there is no image-text pair: retrieval needs at least one")
    if pairs.min() < 0 or (pairs.max(axis=0) >= (queries, gallery)).any():
        raise ValueError(f"a pair names a row outside the {queries} queries and {gallery} gallery items")
    return pairs
