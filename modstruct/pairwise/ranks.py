"""Exact ranks for retrieval by counting, at any size of the gallery: no matrix of scores is ever in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct.config import Precision
from modstruct.errors import require
from modstruct.pairwise import cpu_kernels, cuda_kernels, torch_tiles
from modstruct.pairwise.global_batch import checked_rows
from modstruct.pairwise.operators import check_precision, operator


@torch.no_grad()
def nearest_counts(
    queries: Tensor, gallery: Tensor, positives: Tensor, precision: Precision = "float32"
) -> tuple[Tensor, Tensor]:
    """For each query and positive, how many gallery items score above the positive, and how many tie with it.

    queries: (q, D), gallery: (g, D), scored by inner product, half precision taken to float32. positives: (p, 2)
    integers, (query row, gallery row), in any order, several for a query or none. precision: how scores are formed on a
    GPU. Returns above and ties, (p,) int64: items that score higher, and OTHER items that score the same. So the
    positive's rank lies from above + 1 to above + ties + 1; this project counts a tie against the model. Other
    positives of the query count as any other item. Equal gallery rows tie exactly. A NaN score is the worst for a
    positive (above = g) and counts as above for any other item. Raises ValueError, by name, where an argument
    does not fit.
    """
    queries, gallery = checked_rows(queries=queries, gallery=gallery)
    check_precision(precision)
    require(
        positives.dim() == 2 and positives.shape[1] == 2, "shape of positives", tuple(positives.shape), "give (p, 2)"
    )
    integer = not (positives.is_floating_point() or positives.is_complex() or positives.dtype == torch.bool)
    require(integer, "dtype of positives", positives.dtype, "must be an integer type")
    require(positives.device == queries.device, "device of positives", positives.device, f"must be {queries.device}")
    positives = positives.long()
    if not len(positives):
        return positives[:, 0], positives[:, 0]
    order = positives[:, 0].argsort(stable=True)
    pair_query, pair_gallery = (column.contiguous() for column in positives[order].T)
    above, ties = (
        torch.empty_like(count).index_copy_(0, order, count)
        for count in counted(queries, gallery, pair_query, pair_gallery, precision)
    )
    return above, ties


counted = operator(torch_tiles.nearest_counts, cpu=cpu_kernels.nearest_counts, cuda=cuda_kernels.nearest_counts)


@counted.register_fake
def _(queries, gallery, pair_query, pair_gallery, precision):
    return torch.empty_like(pair_query), torch.empty_like(pair_query)
