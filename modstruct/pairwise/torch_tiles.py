"""The local pairwise terms in plain torch, a tile of rows at a time: for float64, and for devices without kernels.

The functions are those of cpu_kernels, with the same arguments and results, for any floating dtype. `precision` is left
to torch's own settings. No array is larger than a tile or than the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from modstruct.pairwise.global_batch import softplus

# Logits that are in memory at once. On the CPU a tile of float32 is 16 MiB, which a last-level cache holds; on a GPU it
# is 128 MiB, where fewer launches count for more.
TILE_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}


def contrastive_statistics(
    x: Tensor, y: Tensor, scale: Tensor, first: int, precision: str = "float32"
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu_kernels.contrastive_statistics."""
    row_lse, positive = x.new_empty(len(x)), x.new_empty(len(x))
    column_lse = x.new_full((len(y),), torch.finfo(x.dtype).min)
    for rows in _tiles(x, y):
        logits = (x[rows] * scale) @ y.T
        positive[rows] = _take_positives(logits, first + rows.start)
        row_lse[rows] = logits.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, logits.logsumexp(0))
    return row_lse, column_lse, positive


def contrastive_pulls(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    first: int,
    row_lse: Tensor,
    column_lse: Tensor,
    row_weight: Tensor,
    column_weight: Tensor,
    positive_weight: Tensor,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """As cpu_kernels.contrastive_pulls."""
    x_pull, y_pull = torch.empty_like(x), torch.zeros_like(y)
    for rows in _tiles(x, y):
        logits = (x[rows] * scale) @ y.T
        weights = torch.exp(logits - row_lse[rows, None]).mul_(row_weight[rows, None])
        weights.addcmul_(logits.sub_(column_lse).exp_(), column_weight)
        _diagonal(weights, first + rows.start).copy_(positive_weight[rows])
        x_pull[rows] = weights @ y
        y_pull.addmm_(weights.T, x[rows])
    return x_pull, y_pull


def row_contrast(
    x: Tensor,
    x_momentum: Tensor | None,
    columns: Tensor,
    scale: Tensor,
    first: int,
    alpha: float,
    with_pull: bool,
    with_column_pull: bool,
    precision: str = "float32",
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu_kernels.row_contrast."""
    losses = x.new_empty(len(x))
    x_pull = torch.empty_like(x) if with_pull else x.new_empty(0, x.shape[1])
    column_pull = torch.zeros_like(columns) if with_column_pull else x.new_empty(0, x.shape[1])
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
            _diagonal(targets, place).zero_()
            # Not the lowest number: it is taken from the positive, and 0 times that must not become NaN.
            _diagonal(logits, place).copy_(positive)
            losses[rows] += (targets * (positive[:, None] - logits)).sum(1)
            weights -= targets
        _diagonal(weights, place).zero_()
        _diagonal(weights, place).copy_(-weights.sum(1))
        if with_pull:
            x_pull[rows] = weights @ columns
        if with_column_pull:
            column_pull.addmm_(weights.T, x[rows])
    return losses, x_pull, column_pull


def sigmoid_contrast(
    x: Tensor, columns: Tensor, affine: Tensor, first: int, grads: str, precision: str = "float32"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As row_contrast.sigmoid_contrast."""
    scale, bias = affine.unbind()
    total, bias_grad = (x.new_zeros((), dtype=torch.float64) for _ in range(2))
    x_grad = torch.empty_like(x) if grads != "none" else x.new_empty(0, x.shape[1])
    column_grad = torch.zeros_like(columns) if grads == "all" else x.new_empty(0, x.shape[1])
    for rows in _tiles(x, columns):
        place = first + rows.start
        margins = ((x[rows] * scale) @ columns.T).add_(bias)
        _diagonal(margins, place).neg_()
        total += softplus(margins).sum(dtype=torch.float64)
        weights = margins.sigmoid_()
        _diagonal(weights, place).neg_()
        bias_grad += weights.sum(dtype=torch.float64)
        if len(x_grad):
            x_grad[rows] = weights @ columns
        if len(column_grad):
            column_grad.addmm_(weights.T, x[rows])
    return total, x_grad, column_grad, bias_grad


def gaussian_potential(
    x: Tensor, y: Tensor | None, t: float, with_pull: bool, precision: str = "float32"
) -> tuple[Tensor, Tensor, Tensor]:
    """As cpu_kernels.gaussian_potential, except that without y every pair is computed in both its roles."""
    columns = x if y is None else y
    center = columns.mean(0)  # as in csrc/cpu/gaussian_potential.cpp: distances stay, digits are kept
    columns = columns - center
    column_norms = columns.square().sum(1)
    total = x.new_zeros((), dtype=torch.float64)
    x_pull = torch.empty_like(x) if with_pull else x.new_empty(0, x.shape[1])
    y_pull = torch.zeros_like(y) if with_pull and y is not None else x.new_empty(0, x.shape[1])
    column_sums = x.new_zeros(len(columns))
    for tile in _tiles(x, columns):
        rows = x[tile] - center
        squares = torch.addmm(rows.square().sum(1)[:, None] + column_norms, rows, columns.T, alpha=-2).clamp_min_(0)
        if y is None:
            _diagonal(squares, tile.start).zero_()
        potentials = squares.mul_(-t).exp_()
        total += potentials.sum(dtype=torch.float64)
        if with_pull:
            x_pull[tile] = potentials @ columns - potentials.sum(1, keepdim=True) * rows
        if len(y_pull):
            y_pull.addmm_(potentials.T, rows)
            column_sums += potentials.sum(0)
    return total, x_pull, y_pull.sub_(column_sums[:, None] * columns) if len(y_pull) else y_pull


def combinations(a: Tensor, b: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """P = (a - c_a) + (b - c_b) and M = (a - b) - c_d, each difference first of near numbers, and so exact."""
    return (a - centers[0]) + (b - centers[1]), (a - b) - centers[2]


def geometric_products(a: Tensor, b: Tensor, centers: Tensor, precision: str = "float32") -> tuple[Tensor, Tensor]:
    """As cpu_kernels.geometric_products."""
    plus_products, minus_products = (a.new_zeros(a.shape[1], a.shape[1]) for _ in range(2))
    for rows in _tiles(a, a.T):
        plus, minus = combinations(a[rows], b[rows], centers)
        plus_products.addmm_(plus.T, plus)
        minus_products.addmm_(minus.T, minus)
    return plus_products, minus_products


def geometric_pulls(
    a: Tensor,
    b: Tensor,
    centers: Tensor,
    plus_weights: Tensor,
    minus_weights: Tensor,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """As cpu_kernels.geometric_pulls."""
    a_pull, b_pull = torch.empty_like(a), torch.empty_like(b)
    for rows in _tiles(a, a.T):
        plus, minus = combinations(a[rows], b[rows], centers)
        plus_pull, minus_pull = plus @ plus_weights, minus @ minus_weights
        torch.add(plus_pull, minus_pull, out=a_pull[rows])
        torch.sub(plus_pull, minus_pull, out=b_pull[rows])
    return a_pull, b_pull


def nearest_counts(
    queries: Tensor, gallery: Tensor, pair_query: Tensor, pair_gallery: Tensor, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """As cpu_kernels.nearest_counts. Equal gallery rows tie as far as torch's product gives them equal scores."""
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


def _diagonal(tile: Tensor, column: int) -> Tensor:
    """A view of each row's positive, that of the tile's first row being `column`."""
    return tile.diagonal(column)


def _take_positives(logits: Tensor, column: int) -> Tensor:
    """The positives of a tile of logits, which come out of it: the lowest number takes their place."""
    positive = _diagonal(logits, column).clone()
    _diagonal(logits, column).fill_(torch.finfo(logits.dtype).min)  # not -inf: with no negative that would give NaN
    return positive
