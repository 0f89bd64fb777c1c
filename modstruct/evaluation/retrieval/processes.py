"""Exact ranks counted by all processes, each for its share of the queries."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from modstruct import distributed
from modstruct.evaluation.retrieval.exact import CPU, pairs_ahead
from modstruct.evaluation.retrieval.rows import checked_pairs


def shared_pairs_ahead(
    queries: np.ndarray,
    gallery: np.ndarray,
    pairs: np.ndarray,
    device: torch.device = CPU,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """`pairs_ahead` by all processes: every one calls it with the same arrays, and gets the whole.

    A process counts for consecutive queries, about as many as any other, and reads the whole gallery. A score depends
    on its two rows alone, so the counts are the same on any number of processes. An error of one reaches all.
    """
    pairs = checked_pairs(pairs, len(queries), len(gallery))
    shares = query_shares(pairs[:, 0], distributed.world_size())
    mine, ahead, error = shares[distributed.rank()], np.empty(0, dtype=np.int64), None
    try:
        if len(mine):
            show = progress and distributed.is_main()
            _, ahead = pairs_ahead(queries, gallery, pairs[mine.start : mine.stop], device, show)
    except Exception as e:  # raised below, here as it is and elsewhere by its text
        error = e
    distributed.fail_together(error, f"{type(error).__name__}: {error}")
    padded = torch.zeros((1, max(map(len, shares))), dtype=torch.int64)
    padded[0, : len(mine)] = torch.from_numpy(ahead)
    everyone = distributed.gather(padded.to(distributed.device())).cpu().numpy()
    return pairs, np.concatenate([row[: len(share)] for row, share in zip(everyone, shares, strict=True)])


def query_shares(query: np.ndarray, processes: int) -> list[range]:
    """Consecutive ranges of pairs, one a process, that divide no query's pairs. query: (p,), ascending."""
    first = np.flatnonzero(np.append(True, query[1:] != query[:-1]))
    edges = np.append(first, len(query))[np.linspace(0, len(first), processes + 1).astype(int)].tolist()
    return [range(*edge) for edge in pairwise(edges)]
