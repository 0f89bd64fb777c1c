"""Exact ranks of every positive, by counting the scores above it: no list of results, no matrix of scores."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modstruct import distributed
from modstruct.evaluation.retrieval.rows import as_float32, checked_pairs, row_blocks
from modstruct.pairwise import nearest_counts
from modstruct.pairwise.operators import has_kernels_for

PAIRS_AT_ONCE = 4096
"""Pairs of one call of the kernel."""
GALLERY_BYTES = 256 << 20
"""Of float32 gallery rows that are in memory at once."""
PairsAhead = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Pairs (p, 2), and for each of them the items ahead and those of them that tie, (p,) each."""


def counting_device() -> torch.device:
    """This process's GPU where modstruct has kernels for it, else the CPU: plain products of matrices give equal rows
    scores that may differ in the last bit, and a tie would become a matter of luck."""
    device = distributed.device()
    return device if device.type == "cuda" and has_kernels_for(device) else torch.device("cpu")


def pairs_ahead(queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray) -> PairsAhead:
    """For each pair, how many items that are no positive of its query score at least as high as its item.

    queries: (q, D), gallery: (g, D), float16 or float32, in memory or memory-mapped, scored by inner product, in
    float32, all finite. pairs: (p, 2), positives as (query row, gallery row).
    Returns the pairs, each once and ascending, (p', 2), the items ahead, (p',) int64, and those of them whose score is
    exactly the same, (p',) int64: a tie counts against the model, and other positives of the query count neither way.
    So collapsed embeddings get the last ranks. Cost: 2 q g D operations, q being the queries that have a positive.
    Memory: O(p') and two blocks of rows, whatever g is.
    """
    pairs = checked_pairs(pairs, len(queries), len(gallery))
    above, ties = _counts(queries, gallery, pairs)
    # Positives of a query that score as high, or the same, itself among them: the more items are above an item, the
    # lower it scores, and equal counts are equal scores.
    query = pairs[:, 0]
    _, place, equal = np.unique(query * (len(gallery) + 1) + above, return_inverse=True, return_counts=True)
    as_high = equal.cumsum()[place] - np.searchsorted(query, query)
    return pairs, above + ties + 1 - as_high, ties + 1 - equal[place]


def _counts(queries: np.ndarray, gallery: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Items above each pair's, and others that tie with it, (2, p), over a gallery that is read in blocks.

    Each block is followed by the items of the current pairs, so that the kernel can look up their scores: equal rows
    have equal scores wherever they lie. What those copies add is counted apart and taken off.
    """
    device, at_once = counting_device(), max(1, GALLERY_BYTES // (4 * gallery.shape[1]))
    starts, firsts = range(0, len(gallery), at_once), range(0, len(pairs), PAIRS_AT_ONCE)
    whole = len(starts) == 1
    room = 0 if whole else min(PAIRS_AT_ONCE, len(pairs))
    buffer = torch.empty(min(at_once, len(gallery)) + room, gallery.shape[1], device=device)
    found = np.zeros((2, len(pairs)), dtype=np.int64)

    def counts(items: Tensor, query: np.ndarray, item: np.ndarray) -> np.ndarray:
        positives = torch.from_numpy(np.stack([query, item], axis=1)).to(device)
        return torch.stack(nearest_counts(asked, items, positives)).cpu().numpy()

    hidden = not distributed.is_main()
    with tqdm(total=len(starts) * len(firsts), desc="counting scores", disable=hidden, leave=False) as bar:
        for start in starts:
            block = gallery[start : start + at_once]
            for offset, rows in row_blocks(block):
                buffer[offset : offset + len(rows)] = rows
            for first in firsts:
                part = slice(first, first + PAIRS_AT_ONCE)
                distinct, query = np.unique(pairs[part, 0], return_inverse=True)
                asked = as_float32(queries[distinct]).to(device)
                if whole:
                    found[:, part] = counts(buffer, query, pairs[part, 1])
                else:
                    items, item = np.unique(pairs[part, 1], return_inverse=True)
                    copies = buffer[len(block) : len(block) + len(items)]
                    copies[:] = as_float32(gallery[items])
                    found[:, part] += counts(buffer[: len(block) + len(items)], query, len(block) + item)
                    found[:, part] -= counts(copies, query, item)
                bar.update()
    found[1] -= not whole  # in its own block each item ties with its copy
    return found
