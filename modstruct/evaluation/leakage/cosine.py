"""Exact search of embeddings by cosine above a threshold, in bounded memory."""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from modstruct.evaluation.leakage.best_pairs import Pairs
from modstruct.evaluation.retrieval.exact import CPU
from modstruct.evaluation.retrieval.rows import as_float32, check_dimensions, check_rows, row_blocks

QUERIES_AT_ONCE = 2048
MARGIN = 0.005
"""Norms of rows in float16 are off by up to 0.0005, products in float32 by less: what is nearer is computed again."""


def near_embeddings(
    queries: np.ndarray,
    gallery: np.ndarray,
    cosine: float,
    keep: int,
    device: torch.device = CPU,
    progress: bool = False,
) -> Pairs:
    """The `keep` items of highest cosine of each query, as far as they reach the threshold; a tie reaches it.

    queries: (q, D), gallery: (g, D), float16 or float32, of unit norm but for rounding, may be memory-mapped. Whether
    a pair reaches the threshold is decided in float64, whatever the blocks. Returns Pairs with -cosine as score. Cost:
    2 q g D operations on `device`. Raises ValueError for a threshold outside (-1, 1] and rows that are not finite.
    """
    if not -1 < cosine <= 1:
        raise ValueError(f"cosine = {cosine}: give a number above -1, up to 1")
    for name, rows in (("evaluation", queries), ("training", gallery)):
        check_rows(name, rows)
    check_dimensions("evaluation", queries, "training", gallery)
    pairs = []
    starts = range(0, len(queries), QUERIES_AT_ONCE)
    with tqdm(total=len(starts) * len(gallery), desc="comparing embeddings", disable=not progress, leave=False) as bar:
        for start in starts:
            some, best = as_float32(queries[start : start + QUERIES_AT_ONCE]), Pairs.none()
            some_there = some.to(device)
            for low, block in row_blocks(gallery):
                query, item = (some_there @ block.to(device).T >= cosine - MARGIN).nonzero().cpu().numpy().T
                exact = cosines(some.numpy(), block.numpy(), query, item)
                near = exact >= cosine
                best = best.and_best(Pairs(query[near], item[near] + low, -exact[near]), keep)
                bar.update(len(block))
            pairs.append(Pairs(best.query + start, best.item, best.score))
    return Pairs(*map(np.concatenate, zip(*pairs, strict=True)))


def cosines(first: np.ndarray, second: np.ndarray, first_row: np.ndarray, second_row: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows in float64, (p,)."""
    found = np.empty(len(first_row))
    for start in range(0, len(found), QUERIES_AT_ONCE):
        part = slice(start, start + QUERIES_AT_ONCE)
        one, other = first[first_row[part]].astype(np.float64), second[second_row[part]].astype(np.float64)
        norms = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
        found[part] = (one * other).sum(axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)
    return found
