"""Exact ranks of every positive, by counting the scores above it: no list of results, no matrix of scores.

By one process, or by all, each for its share of the queries.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modstruct import distributed
from modstruct.evaluation.retrieval.rows import as_float32, check_dimensions, check_rows, checked_pairs, row_blocks
from modstruct.pairwise import nearest_counts
from modstruct.pairwise.operators import has_kernels_for

PAIRS_AT_ONCE = 4096
"""Pairs of one call of the kernel."""
GALLERY_BYTES = 256 << 20
"""Of float32 gallery rows that are in memory at once."""
CPU = torch.device("cpu")
PairsAhead = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Pairs (p, 2), and for each of them the items ahead and those of them that tie, (p,) each."""


def counting_device() -> torch.device:
    """This process's GPU where modstruct has kernels for it, else the CPU.

    Plain products of matrices give equal rows scores that may differ in the last bit, by their place in the product's
    tiles, and a tie would become a matter of luck.
    """
    device = distributed.device()
    return device if device.type == "cuda" and has_kernels_for(device) else CPU


def items_ahead(queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray, device: torch.device = CPU) -> np.ndarray:
    """Items ahead of each query's best positive, (q,) int64, as `pairs_ahead` counts them; g where it has none."""
    pairs, ahead, _ = pairs_ahead(queries, gallery, pairs, device)
    least = np.full(len(queries), len(gallery), dtype=np.int64)
    np.minimum.at(least, pairs[:, 0], ahead)
    return least


def pairs_ahead(
    queries: np.ndarray,
    gallery: np.ndarray,
    pairs: np.ndarray,
    device: torch.device = CPU,
    progress: bool = False,
) -> PairsAhead:
    """For each pair, how many items that are no positive of its query score at least as high as its item.

    queries: (q, D), gallery: (g, D), float16 or float32, in memory or memory-mapped, scored by inner product, in
    float32. pairs: (p, 2), positives as (query row, gallery row). device: where scores are formed. progress: show a
    bar.
    Returns the pairs, each once and ascending, (p', 2), the items ahead, (p',) int64, and those of them whose score is
    exactly the same, (p',) int64: a tie counts against the model, and other positives of the query count neither way.
    So collapsed embeddings get the last ranks. Cost: 2 q g D
    operations, q being the queries that have a positive. Memory: O(p') and two blocks of rows, whatever g is. On a GPU
    without modstruct's kernels rows tie as far as torch's products do; see `counting_device`.
    """
    for name, rows in (("query", queries), ("gallery", gallery)):
        check_rows(name, rows)
    check_dimensions("query", queries, "gallery", gallery)
    pairs = checked_pairs(pairs, len(queries), len(gallery))
    above, ties = _counts(queries, gallery, pairs, device, progress)
    as_high, equal = _positives_as_high(pairs[:, 0], above)
    return pairs, above + ties + 1 - as_high, ties + 1 - equal


def _positives_as_high(query: np.ndarray, above: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each pair, the positives of its query that score as high or higher, and as high, itself among them, (p,).

    query: (p,), ascending. The more items are above an item, the lower it scores; equal counts are equal scores.
    """
    order = np.lexsort((above, query))
    query, above = query[order], above[order]
    first = np.flatnonzero(np.append(True, query[1:] != query[:-1]))  # of each query
    last_of_tie = np.append((query[1:] != query[:-1]) | (above[1:] != above[:-1]), True)
    ends = np.flatnonzero(last_of_tie) + 1
    end = np.repeat(ends, np.diff(ends, prepend=0))
    start = np.repeat(first, np.diff(first, append=len(query)))
    as_high, equal = np.empty_like(above), np.empty_like(above)
    as_high[order] = end - start
    equal[order] = np.repeat(np.diff(ends, prepend=0), np.diff(ends, prepend=0))
    return as_high, equal


def _counts(
    queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray, device: torch.device, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`nearest_counts` of all pairs, over a gallery that is read in blocks.

    Each block is followed by the items of the current pairs, so that the kernel can look up their scores: equal rows
    have equal scores wherever they lie. What those copies add is counted apart and taken off.
    """
    dimension = gallery.shape[1]
    at_once = max(1, GALLERY_BYTES // (4 * dimension))
    starts = range(0, len(gallery), at_once)
    slices = [slice(first, first + PAIRS_AT_ONCE) for first in range(0, len(pairs), PAIRS_AT_ONCE)]
    above, ties = np.zeros(len(pairs), dtype=np.int64), np.zeros(len(pairs), dtype=np.int64)
    whole = len(starts) == 1
    room = 0 if whole else min(PAIRS_AT_ONCE, len(pairs))
    buffer = torch.empty(min(at_once, len(gallery)) + room, dimension, device=device)
    with tqdm(total=len(starts) * len(slices), desc="counting scores", disable=not progress, leave=False) as bar:
        for start in starts:
            rows = min(at_once, len(gallery) - start)
            for offset, block in row_blocks(gallery[start : start + rows]):
                buffer[offset : offset + len(block)] = block
            for part in slices:
                distinct, query = np.unique(pairs[part, 0], return_inverse=True)
                some = as_float32(queries[distinct]).to(device)
                if whole:
                    above[part], ties[part] = _call(some, buffer, query, pairs[part, 1])
                else:
                    items, item = np.unique(pairs[part, 1], return_inverse=True)
                    copies = buffer[rows : rows + len(items)]
                    copies[:] = as_float32(gallery[items])
                    found = _call(some, buffer[: rows + len(items)], query, rows + item)
                    added = _call(some, copies, query, item)
                    above[part] += found[0] - added[0]
                    ties[part] += found[1] - added[1]
                bar.update()
    # In its own block each item ties with its copy.
    return above, ties - (0 if whole else 1)


def _call(queries: Tensor, gallery: Tensor, query: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    positives = torch.from_numpy(np.stack([query.reshape(-1), item.reshape(-1)], axis=1)).to(queries.device)
    above, ties = nearest_counts(queries, gallery, positives)
    return above.cpu().numpy(), ties.cpu().numpy()


def shared_pairs_ahead(
    queries: np.ndarray,
    gallery: np.ndarray,
    pairs: np.ndarray,
    device: torch.device = CPU,
    progress: bool = False,
) -> PairsAhead:
    """`pairs_ahead` by all processes: every one calls it with the same arrays, and gets the whole.

    A process counts for consecutive queries, about as many as any other, and reads the whole gallery. A score depends
    on its two rows alone, so the counts are the same on any number of processes. An error of one reaches all.
    """
    pairs = checked_pairs(pairs, len(queries), len(gallery))
    shares = query_shares(pairs[:, 0], distributed.world_size())
    mine, error = shares[distributed.rank()], None
    ahead = tied = np.empty(0, dtype=np.int64)
    try:
        if len(mine):
            show = progress and distributed.is_main()
            _, ahead, tied = pairs_ahead(queries, gallery, pairs[mine.start : mine.stop], device, show)
    except Exception as e:  # raised below, here as it is and elsewhere by its text
        error = e
    distributed.fail_together(error, f"{type(error).__name__}: {error}")
    padded = torch.zeros((1, 2, max(map(len, shares))), dtype=torch.int64)
    padded[0, :, : len(mine)] = torch.from_numpy(np.stack([ahead, tied]))
    everyone = distributed.gather(padded.to(distributed.device())).cpu().numpy()
    ahead, tied = np.concatenate([row[:, : len(share)] for row, share in zip(everyone, shares, strict=True)], axis=1)
    return pairs, ahead, tied


def query_shares(query: np.ndarray, processes: int) -> list[range]:
    """Consecutive ranges of pairs, one a process, that divide no query's pairs. query: (p,), ascending."""
    first = np.flatnonzero(np.append(True, query[1:] != query[:-1]))
    edges = np.append(first, len(query))[np.linspace(0, len(first), processes + 1).astype(int)].tolist()
    return [range(*edge) for edge in pairwise(edges)]
