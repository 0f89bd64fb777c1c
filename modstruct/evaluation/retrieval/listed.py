"""Ranks as an approximate index's lists give them, and how much of the exact lists those hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from modstruct.evaluation.retrieval.gpus import usable_gpus
from modstruct.evaluation.retrieval.index import ApproximateIndex
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import as_float32, check_dimensions, check_rows, checked_pairs

RESULTS_AT_ONCE = 1 << 20
"""Scores of one search."""


def listed_pairs_ahead(
    queries: np.ndarray, index: ApproximateIndex, pairs: np.ndarray, longest_k: int, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`exact.pairs_ahead` as an approximate index sees it.

    Of each query the best longest_k + R distinct rows are listed, R being the most positives of one query, at most
    index.longest_list. An item that the index did not list is taken to come last, behind every item that is no
    positive.
    """
    check_rows("query", queries)
    check_dimensions("query", queries, "gallery", index.gallery)
    pairs = checked_pairs(pairs, len(queries), len(index.gallery))
    rows = len(index.first)
    keys, positive_items = np.unique(pairs[:, 0] * rows + index.row_of_item[pairs[:, 1]], return_counts=True)
    asked, query_of_pair = np.unique(pairs[:, 0], return_inverse=True)
    positives = np.bincount(query_of_pair.reshape(-1))
    key_ahead = (len(index.gallery) - positives)[np.searchsorted(asked, keys // rows)]
    length = min(longest_k + int(positives.max()), rows, index.longest_list)
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
    longest = min(max(recall_at), len(index.first), index.longest_list)
    _, found = index.search(sample.numpy(), longest)
    right = nearest(sample.numpy(), index.gallery, longest, index.distinct, gpus=usable_gpus())
    found_scores, right_scores = (_float64_scores(sample, index, rows) for rows in (found, right))
    for k in recall_at:
        k_here = min(k, longest)
        enough = right_scores[:, k_here - 1 : k_here]
        good = (found_scores[:, :k_here] >= enough - 1e-12 * np.abs(enough)).sum(axis=1)
        figures[f"recall_at_{k}"] = {"value": float(np.mean(good / k_here)), "queries": count}
    return figures


def _float64_scores(sample: torch.Tensor, index: ApproximateIndex, rows: np.ndarray) -> np.ndarray:
    """Scores of listed rows, (s, k), -inf where the list has none."""
    scores = np.empty(rows.shape)
    for j, (query, listed) in enumerate(zip(sample.double(), rows, strict=True)):
        items = as_float32(index.gallery[index.first[np.maximum(listed, 0)]]).double()
        scores[j] = (items * query).sum(1).numpy()
    return np.where(rows >= 0, scores, -np.inf)
