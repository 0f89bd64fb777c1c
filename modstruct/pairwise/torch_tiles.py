"""The operators of the pairwise terms in plain torch, a tile of rows at a time: for float64, and for devices without
kernels. Their docstrings are the contract of all kernels.

x: (B, D), this process's rows; y or columns: (N, D); all tensors of one dtype and device, contiguous. S_jk = scale
<x_j, y_k>. The positive of row j is column first + j. precision: "float32", "tf32" or "bf16", of products on a GPU;
here it is left to torch's own settings. No array is larger than a tile or than the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from modstruct.pairwise.global_batch import check_pairs, softplus, steady_sum, times_scale

# Logits that are in memory at once. On the CPU a tile of float32 is 16 MiB, which a last-level cache holds; on a GPU it
# is 128 MiB, where fewer launches count for more.
TILE_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}


def contrastive_statistics(
    x: Tensor, y: Tensor, scale: Tensor, first: int, precision: str, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exps of S over the negatives, of rows (B,) and of columns (N,), and the positives' logits (B,).

    scale: (1,). A log-sum-exp over nothing is the lowest finite number. keep: whether `contrastive_grad` will be asked
    for; then the fourth result may hold the logits for it, in a kernel's own layout, where they are not too many. Here
    and else it is (0,).
    """
    row_lse, positive = x.new_empty(len(x)), x.new_empty(len(x))
    column_lse = x.new_full((len(y),), torch.finfo(x.dtype).min)
    for rows in _tiles(x, y):
        logits = (x[rows] * scale) @ y.T
        positive[rows] = _take_positives(logits, first + rows.start)
        row_lse[rows] = logits.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
    return row_lse, column_lse, positive, x.new_empty(0)


def contrastive_grad(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    first: int,
    row_values: Tensor,
    column_values: Tensor,
    precision: str,
    logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale, from those of the results of `contrastive_statistics`, whose fourth is `logits`.

    row_values: (3, B), log-sum-exps, their gradients and the gradients of the positives' logits; column_values: (2, N),
    log-sum-exps and their gradients. No derivative: autograd refuses a second one instead of taking it for zero.
    """
    row_lse, row_weight, positive_weight = row_values
    column_lse, column_weight = column_values
    x_grad, y_grad = torch.empty_like(x), torch.zeros_like(y)
    for rows in _tiles(x, y):
        tile = (x[rows] * scale) @ y.T
        weights = torch.exp(tile - row_lse[rows, None]).mul_(row_weight[rows, None])
        weights.addcmul_(tile.sub_(column_lse).exp_(), column_weight)
        weights.diagonal(first + rows.start).copy_(positive_weight[rows])
        x_grad[rows] = weights @ y
        y_grad.addmm_(weights.T, x[rows])
    return times_scale(x, x_grad, y_grad, scale)


def row_contrast(
    x: Tensor,
    x_momentum: Tensor | None,
    columns: Tensor,
    scale: Tensor,
    first: int,
    alpha: float,
    grads: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over the rows of the cross entropies with the targets alpha P + (1 - alpha) onehot(positive).

    P: the softmax of scale <x_momentum_j, c_k>, x_momentum (B, D). Without it the target is the one-hot, whatever alpha
    is. Returns the sum (), W columns (B, D) and W^T x (N, D), W being the gradient of the sum with respect to S: the
    second unless grads is "none", the third if it is "all", else with no rows. Differentiable with respect to x,
    columns and scale, as far as `grads` says.
    """
    losses = x.new_empty(len(x))
    x_grad = torch.empty_like(x) if grads != "none" else x.new_empty(0, x.shape[1])
    column_grad = torch.zeros_like(columns) if grads == "all" else x.new_empty(0, x.shape[1])
    for rows in _tiles(x, columns):
        place = first + rows.start
        logits = (x[rows] * scale) @ columns.T
        positive = _take_positives(logits, place)
        lse = logits.logsumexp(1)
        losses[rows] = softplus(lse - positive)
        weights = torch.exp(logits - lse[:, None]).mul_(torch.sigmoid(lse - positive)[:, None])
        if x_momentum is not None:
            momentum_logits = (x_momentum[rows] * scale) @ columns.T
            targets = momentum_logits.softmax(1).mul_(alpha)
            targets.diagonal(place).zero_()
            # Not the lowest number: it is taken from the positive, and 0 times that must not become NaN.
            logits.diagonal(place).copy_(positive)
            losses[rows] += (targets * (positive[:, None] - logits)).sum(1)
            weights -= targets
        weights.diagonal(place).zero_()
        weights.diagonal(place).copy_(-weights.sum(1))
        if len(x_grad):
            x_grad[rows] = weights @ columns
        if len(column_grad):
            column_grad.addmm_(weights.T, x[rows])
    return steady_sum(losses), x_grad, column_grad


def sigmoid_contrast(
    x: Tensor, columns: Tensor, affine: Tensor, first: int, grads: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum over rows and columns of softplus(-l_jk S_jk), S_jk = scale <x_j, c_k> + bias.

    affine: (2,), scale and bias. l_jk is 1 at the positive and -1 elsewhere. With W the gradient of the sum with
    respect to S, W_jk = -l_jk sigmoid(-l_jk S_jk), returns the sum () in float64, W columns and W^T x as `row_contrast`
    does, and the sum of W () in float64. Differentiable with respect to x, columns and affine, as far as `grads` says.
    """
    scale, bias = affine.unbind()
    total, bias_grad = (x.new_zeros((), dtype=torch.float64) for _ in range(2))
    x_grad = torch.empty_like(x) if grads != "none" else x.new_empty(0, x.shape[1])
    column_grad = torch.zeros_like(columns) if grads == "all" else x.new_empty(0, x.shape[1])
    for rows in _tiles(x, columns):
        place = first + rows.start
        margins = ((x[rows] * scale) @ columns.T).add_(bias)
        margins.diagonal(place).neg_()
        total += softplus(margins).sum(dtype=torch.float64)
        weights = margins.sigmoid_()
        weights.diagonal(place).neg_()
        bias_grad += weights.sum(dtype=torch.float64)
        if len(x_grad):
            x_grad[rows] = weights @ columns
        if len(column_grad):
            column_grad.addmm_(weights.T, x[rows])
    return total, x_grad, column_grad, bias_grad


def gaussian_potential_sum(
    x: Tensor, y: Tensor | None, t: float, with_grad: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of G_jk = exp(-t |x_j - y_k|^2) over all pairs, y being x where it is None, j = k included.

    Returns the sum () in float64 and, `with_grad`, its gradients over 2 t: sum_k G_jk (y_k - x_j), (B, D), of the rows
    in the role of x alone, and sum_j G_jk (x_j - y_k), (N, D); without it or without y, no rows in their place.
    Differentiable with respect to x and y, and only `with_grad`.
    """
    columns = x if y is None else y
    center = columns.mean(0)  # as in csrc/cpu/gaussian_potential.cpp: distances stay, digits are kept
    columns = columns - center
    column_norms = columns.square().sum(1)
    total = x.new_zeros((), dtype=torch.float64)
    x_grad = torch.empty_like(x) if with_grad else x.new_empty(0, x.shape[1])
    y_grad = torch.zeros_like(y) if with_grad and y is not None else x.new_empty(0, x.shape[1])
    column_sums = x.new_zeros(len(columns))
    for tile in _tiles(x, columns):
        rows = x[tile] - center
        squares = torch.addmm(rows.square().sum(1)[:, None] + column_norms, rows, columns.T, alpha=-2).clamp_min_(0)
        if y is None:
            squares.diagonal(tile.start).zero_()
        potentials = squares.mul_(-t).exp_()
        total += potentials.sum(dtype=torch.float64)
        if with_grad:
            x_grad[tile] = potentials @ columns - potentials.sum(1, keepdim=True) * rows
        if len(y_grad):
            y_grad.addmm_(potentials.T, rows)
            column_sums += potentials.sum(0)
    return total, x_grad, y_grad.sub_(column_sums[:, None] * columns) if len(y_grad) else y_grad


def combinations(a: Tensor, b: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """P = (a - c_a) + (b - c_b) and M = (a - b) - c_d, each difference first of near numbers, and so exact."""
    return (a - centers[0]) + (b - centers[1]), (a - b) - centers[2]


def geometric_products(a: Tensor, b: Tensor, centers: Tensor, precision: str) -> Tensor:
    """P^T P and M^T M, (2, D, D), of P = (a - c_a) + (b - c_b) and M = (a - b) - c_d, both (B, D), never held whole.

    a, b: (B, D). centers: (3, D), c_a, c_b and c_d, constants near the means: there the products' derivative with
    respect to them is 0. Differentiable with respect to a and b.
    """
    products = a.new_zeros(2, a.shape[1], a.shape[1])
    for rows in _tiles(a, a.T):
        for out, combined in zip(products, combinations(a[rows], b[rows], centers), strict=True):
            out.addmm_(combined.T, combined)
    return products


def geometric_grad(a: Tensor, b: Tensor, centers: Tensor, weights: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """P W_P + M W_M and P W_P - M W_M, both (B, D), P and M as above: the gradients of a and of b.

    weights: (2, D, D), W_P and W_M: the gradient of each product plus its transpose. No derivative: autograd refuses a
    second one instead of taking it for zero.
    """
    a_grad, b_grad = torch.empty_like(a), torch.empty_like(b)
    for rows in _tiles(a, a.T):
        plus, minus = combinations(a[rows], b[rows], centers)
        plus_grad, minus_grad = plus @ weights[0], minus @ weights[1]
        torch.add(plus_grad, minus_grad, out=a_grad[rows])
        torch.sub(plus_grad, minus_grad, out=b_grad[rows])
    return a_grad, b_grad


def nearest_counts(
    queries: Tensor, gallery: Tensor, pair_query: Tensor, pair_gallery: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """For each pair, the gallery items that score above its own with its query, and the others that score the same.

    queries: (q, D), gallery: (g, D), scored by inner product; pair_query (ascending) and pair_gallery: (p,) int64,
    row indices of the two. Returns two (p,) int64. A pair whose score is NaN has all g above; an item whose score is
    NaN counts as above any other pair. Equal gallery rows tie exactly in the compiled kernels, here as far as torch's
    product gives them equal scores. Raises ValueError where an index is out of range.
    """
    check_pairs(queries, gallery, pair_query, pair_gallery)
    above, ties = torch.empty_like(pair_query), torch.empty_like(pair_query)
    for pairs in _tiles(pair_query, gallery):
        scores = queries[pair_query[pairs]] @ gallery.T
        own = scores.gather(1, pair_gallery[pairs, None])
        above[pairs] = (~(scores <= own)).sum(1)
        ties[pairs] = (scores == own).sum(1) - (own == own)[:, 0].long()
    return above, ties


def _tiles(rows: Tensor, columns: Tensor) -> Iterator[slice]:
    height = max(1, TILE_ELEMENTS.get(columns.device.type, TILE_ELEMENTS["cpu"]) // len(columns))
    for start in range(0, len(rows), height):
        yield slice(start, min(start + height, len(rows)))


def _take_positives(logits: Tensor, column: int) -> Tensor:
    """The positives of a tile of logits, which are removed: the lowest number takes their place.

    column: that of the positive of the tile's first row.
    """
    positive = logits.diagonal(column).clone()
    logits.diagonal(column).fill_(torch.finfo(logits.dtype).min)  # not -inf: with no negative that would give NaN
    return positive
