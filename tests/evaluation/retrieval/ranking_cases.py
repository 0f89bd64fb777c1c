"""Embeddings for the tests of retrieval at scale, and the metrics by their definitions, one query after the other."""

from __future__ import annotations

import faiss
import numpy as np
from hypothesis import strategies as st

from modstruct.evaluation.retrieval.exact import pairs_ahead
from modstruct.evaluation.retrieval.metrics import ranked_queries


def grid_rows(count: int, dimension: int, seed: int) -> np.ndarray:
    """Rows of about unit norm, multiples of 2^-11: exact in float16, as float32 scores are in any order of sums."""
    rows = np.random.default_rng(seed).standard_normal((count, dimension))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return (np.trunc(rows * 2048) / 2048).astype(np.float32)


@st.composite
def sets_with_ties(draw):
    """Small integer vectors: exact scores, many of them equal; rows that recur; any number of positives."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images, texts, dimension = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    image = random.integers(-2, 3, (images, dimension)).astype(draw(st.sampled_from([np.float16, np.float32])))
    text = random.integers(-2, 3, (texts, dimension)).astype(np.float32)
    if draw(st.booleans()):  # duplicate captions
        text[random.integers(0, texts, texts // 2 + 1)] = text[0]
    kind = draw(st.sampled_from(["some", "one", "all"]))
    if kind == "all":
        pairs = np.stack(np.meshgrid(np.arange(images), np.arange(texts)), axis=-1).reshape(-1, 2)
    else:
        count = 1 if kind == "one" else draw(st.integers(1, 60))
        pairs = np.stack([random.integers(0, images, count), random.integers(0, texts, count)], axis=1)
    return image, text, pairs


def plain_metrics(queries, gallery, pairs, recall_at) -> dict[str, float]:
    """By the definitions in float64: a list of all items, in which every tie is decided against the positives."""
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    ranks, precisions = [], []
    for query in np.unique(pairs[:, 0]):
        positive = np.isin(np.arange(len(gallery)), pairs[pairs[:, 0] == query, 1])
        order = np.lexsort((positive, -scores[query]))  # of a tie the positives last
        hit = positive[order]
        ranks.append(np.sum(~hit[: np.flatnonzero(hit)[0]]) + 1)
        r = int(positive.sum())
        precisions.append(sum(hit[: i + 1].mean() for i in range(r) if hit[i]) / r)
    ranks = np.array(ranks)
    return {f"recall_at_{k}": np.mean(ranks <= k) for k in recall_at} | {
        "median_rank": np.median(ranks),
        "mean_log_rank": np.mean(np.log(ranks)),
        "mean_reciprocal_rank": np.mean(1 / ranks),
        "map_at_r": np.mean(precisions),
    }


def items_ahead(queries, gallery, pairs) -> np.ndarray:
    """Items ahead of each query's best positive by counting, ties counted against it; g without one."""
    ranked = ranked_queries(*pairs_ahead(queries, gallery, pairs), len(gallery))
    ahead = np.full(len(queries), len(gallery))
    ahead[ranked.query] = ranked.rank - 1
    return ahead


def faiss_items_ahead(queries, gallery, pairs) -> np.ndarray:
    """Items ahead of each query's best positive in FAISS's list of all items, ties counted against it; g without one.

    Rows whose scores float32 holds exactly: of others FAISS may give equal ones scores that differ in the last bit.
    """
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(np.ascontiguousarray(gallery, dtype=np.float32))
    scores, rows = index.search(np.ascontiguousarray(queries, dtype=np.float32), len(gallery))
    ahead = np.full(len(queries), len(gallery))
    for query in np.unique(pairs[:, 0]):
        positive = np.isin(rows[query], pairs[pairs[:, 0] == query, 1])
        ahead[query] = np.sum(~positive & (scores[query] >= scores[query][positive].max()))
    return ahead
