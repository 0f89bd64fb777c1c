"""FAISS's approximate indexes of a gallery, and ranks as their lists give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from tqdm import tqdm

from modstruct.config.checks import require, require_counts
from modstruct.evaluation.ranking.rows import (
    as_float32,
    check_dimensions,
    check_rows,
    checked_pairs,
    distinct_rows,
    row_blocks,
)

Kind = Literal["exact", "ivf", "hnsw"]
Storage = Literal["float32", "float16"]
RESULTS_AT_ONCE = 1 << 20
"""Scores of one search."""
LONGEST_LIST = 2048
"""Results per query that are asked for, however many positives it has."""
TRAINING_ROWS_PER_LIST = 64
"""Of the clustering of an inverted file; FAISS wants 39 to 256."""
TRAINING_BLOCK = 1 << 16
SCORES_AT_ONCE = 1 << 25
"""Scores at hand while an index is measured against exact search."""


@dataclass(frozen=True)
class IndexConfig:
    """How a gallery is searched."""

    kind: Kind = "exact"
    """exact: all ranks by counting. ivf: inverted file. hnsw: graph. The last two are approximate."""
    storage: Storage = "float32"
    """Of the rows in an approximate index; exact search reads the array as it is."""
    lists: int | None = None
    """ivf: number of clusters; None: 4 times the root of the gallery's size."""
    probes: int = 32
    """ivf: clusters looked at per query."""
    neighbours: int = 32
    """hnsw: edges of a node."""
    construction_width: int = 100
    """hnsw: candidates kept while the graph is built."""
    search_width: int = 128
    """hnsw: candidates kept in a search; at least the length of the list asked for is taken."""
    sample: int = 1000
    """Queries on which an approximate index is measured against exact search."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(Kind)), ("storage", get_args(Storage))):
            require(
                getattr(self, name) in allowed, f"index.{name}", getattr(self, name), f"one of {', '.join(allowed)}"
            )
        counts = ("probes", "neighbours", "construction_width", "search_width", "sample")
        require_counts("index", self, counts if self.lists is None else (*counts, "lists"))


class ApproximateIndex:
    """A FAISS index of the distinct rows of a gallery, by inner product, on the CPU.

    gallery: (g, D), float16 or float32, may be memory-mapped; it is read in blocks. Memory: the index's own.
    """

    def __init__(self, gallery: np.ndarray, config: IndexConfig, progress: bool = False):
        check_rows("gallery", gallery)
        self.gallery, self.config = gallery, config
        self.first, self.row_of_item, self.occurrences = distinct_rows(gallery)
        self._index = self._made()
        blocks = range(0, len(self.first), TRAINING_BLOCK)
        for start in tqdm(blocks, desc=f"building {config.kind}", disable=not progress, leave=False):
            self._index.add(as_float32(gallery[self.first[start : start + TRAINING_BLOCK]]).numpy())

    def search(self, queries: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(b, D) float32 -> scores (b, length), descending, and distinct rows (b, length), -1 where none is found."""
        if self.config.kind == "hnsw":
            self._index.hnsw.efSearch = max(self.config.search_width, length)
        return self._index.search(queries, length)

    def _made(self):
        import faiss

        dimension, rows = self.gallery.shape[1], len(self.first)
        metric, half = faiss.METRIC_INNER_PRODUCT, self.config.storage == "float16"
        sixteen_bits = faiss.ScalarQuantizer.QT_fp16
        if self.config.kind == "hnsw":
            m = self.config.neighbours
            index = (
                faiss.IndexHNSWSQ(dimension, sixteen_bits, m, metric)
                if half
                else faiss.IndexHNSWFlat(dimension, m, metric)
            )
            index.hnsw.efConstruction = self.config.construction_width
            if half:
                index.train(self._sample(1))
            return index
        lists = min(self.config.lists or int(4 * rows**0.5), max(1, rows // 39))
        self._quantizer = faiss.IndexFlatIP(dimension)  # the index holds no reference of its own
        if half:
            index = faiss.IndexIVFScalarQuantizer(self._quantizer, dimension, lists, sixteen_bits, metric, False)
        else:
            index = faiss.IndexIVFFlat(self._quantizer, dimension, lists, metric)
        index.nprobe = min(self.config.probes, lists)
        index.train(self._sample(TRAINING_ROWS_PER_LIST * lists))
        return index

    def _sample(self, count: int) -> np.ndarray:
        random = np.random.default_rng(self.config.seed)
        chosen = np.sort(random.choice(len(self.first), min(count, len(self.first)), replace=False))
        return as_float32(self.gallery[self.first[chosen]]).numpy()


def listed_pairs_ahead(
    queries: np.ndarray, index: ApproximateIndex, pairs: np.ndarray, longest_k: int, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`exact.pairs_ahead` as an approximate index sees it.

    Of each query the best longest_k + R distinct rows are listed, R being the most positives of one query, at most
    LONGEST_LIST. An item that the index did not list is taken to come last, behind every item that is no positive.
    """
    check_rows("query", queries)
    check_dimensions("query", queries, "gallery", index.gallery)
    pairs = checked_pairs(pairs, len(queries), len(index.gallery))
    rows = len(index.first)
    keys, positive_items = np.unique(pairs[:, 0] * rows + index.row_of_item[pairs[:, 1]], return_counts=True)
    asked, query_of_pair = np.unique(pairs[:, 0], return_inverse=True)
    positives = np.bincount(query_of_pair.reshape(-1))
    key_ahead = (len(index.gallery) - positives)[np.searchsorted(asked, keys // rows)]
    length = min(longest_k + int(positives.max()), rows, LONGEST_LIST)
    step = max(1, RESULTS_AT_ONCE // length)
    for start in tqdm(range(0, len(asked), step), desc="searching", disable=not progress, leave=False):
        chunk = asked[start : start + step]
        scores, found = index.search(as_float32(queries[chunk]).numpy(), length)
        found_keys = chunk[:, None] * rows + found
        place = np.minimum(np.searchsorted(keys, found_keys), len(keys) - 1)
        positive = (keys[place] == found_keys) & (found >= 0)
        others = np.where(found >= 0, index.occurrences[found] - np.where(positive, positive_items[place], 0), 0)
        key_ahead[place[positive]] = _ahead_in_list(scores, others)[positive]
    pair_keys = pairs[:, 0] * rows + index.row_of_item[pairs[:, 1]]
    return pairs, key_ahead[np.searchsorted(keys, pair_keys)]


def _ahead_in_list(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each place, how many others score at least as high. scores: (b, k), descending; others: (b, k), counts."""
    ahead = others.cumsum(axis=1)
    ahead[:, :-1][scores[:, :-1] == scores[:, 1:]] = np.iinfo(np.int64).max  # not the last of its tie
    return np.minimum.accumulate(ahead[:, ::-1], axis=1)[:, ::-1]


def index_recall(queries: np.ndarray, index: ApproximateIndex, recall_at: Sequence[int]) -> dict[str, dict[str, float]]:
    """Recall of the index against exact search, on a sample of queries.

    Returns {"recall_at_K": {"value": …, "queries": …}}: the mean share of the exact first K distinct rows among the K
    that the index lists. A listed row that scores as high as the exact K-th counts.
    """
    random = np.random.default_rng(index.config.seed)
    count = min(index.config.sample, len(queries))
    sample = as_float32(queries[np.sort(random.choice(len(queries), count, replace=False))])
    figures = {}
    longest = min(max(recall_at), len(index.first))
    _, found = index.search(sample.numpy(), longest)
    right = _exact_lists(sample, index, longest)
    found_scores, right_scores = (_float64_scores(sample, index, rows) for rows in (found, right))
    for k in recall_at:
        k_here = min(k, longest)
        enough = right_scores[:, k_here - 1 : k_here]
        good = (found_scores[:, :k_here] >= enough - 1e-12 * np.abs(enough)).sum(axis=1)
        figures[f"recall_at_{k}"] = {"value": float(np.mean(good / k_here)), "queries": count}
    return figures


def _exact_lists(sample: torch.Tensor, index: ApproximateIndex, k: int) -> np.ndarray:
    """(s, k) distinct rows, best first, by all scores, of which blocks are at hand."""
    best_scores = torch.empty(len(sample), 0)
    best_rows = torch.empty(len(sample), 0, dtype=torch.int64)
    for start, block in _distinct_blocks(index, max(1, SCORES_AT_ONCE // len(sample))):
        scores, rows = torch.topk(sample @ block.T, min(k, len(block)), dim=1)
        best_scores, best_rows = torch.cat((best_scores, scores), 1), torch.cat((best_rows, rows + start), 1)
        best_scores, order = torch.topk(best_scores, min(k, best_scores.shape[1]), dim=1)
        best_rows = best_rows.gather(1, order)
    return best_rows.numpy()


def _distinct_blocks(index: ApproximateIndex, at_once: int) -> Iterator[tuple[int, torch.Tensor]]:
    if len(index.first) == len(index.gallery):
        yield from row_blocks(index.gallery, at_once)
        return
    for start in range(0, len(index.first), at_once):
        yield start, as_float32(index.gallery[index.first[start : start + at_once]])


def _float64_scores(sample: torch.Tensor, index: ApproximateIndex, rows: np.ndarray) -> np.ndarray:
    """Scores of listed rows, (s, k), -inf where the list has none."""
    scores = np.empty(rows.shape)
    for j, (query, listed) in enumerate(zip(sample.double(), rows, strict=True)):
        items = as_float32(index.gallery[index.first[np.maximum(listed, 0)]]).double()
        scores[j] = (items * query).sum(1).numpy()
    return np.where(rows >= 0, scores, -np.inf)
