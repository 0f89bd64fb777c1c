"""Differences between the similarities of two sets of embeddings, over all pairs of the global batch.

For row-embeddings A, B (N x D) put P = A + B, M = A - B, X = M^T P. Then, exactly,
  |A B^T - B A^T|^2 + |A A^T - B B^T|^2 = <P^T P, M^T M> = |P M^T|^2        (squared Frobenius norms)
                      |A A^T - B B^T|^2 = 1/2 (<P^T P, M^T M> + tr(X X)).
The products that run over the batch are D x D: only they are summed over the processes, and no embedding is gathered.
Where the global batch is smaller than D, the N x N matrix is the smaller and cheaper one, and takes their place.

Never expand these into |A^T A|^2 + |B^T B|^2 - 2 |A^T B|^2: for towers that nearly agree it loses every digit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modstruct import distributed
from modstruct.pairwise.global_batch import global_rows, paired_rows

BLOCK_ROWS = 4096  # rows that are in float64 at once


def geometric_consistency(a: Tensor, b: Tensor) -> Tensor:
    """Both geometric terms at once: sum over pairs j, k of (<a_j,b_k> - <a_k,b_j>)^2 + (<a_j,a_k> - <b_j,b_k>)^2.

    N times the L_GC of Jiang et al. 2023, section 4.3. a, b: this process's (B, D) rows, the same B on every process.
    Returns a scalar, the sum over the N^2 pairs of all processes, the same on each. Exactly 0 where a equals b.

    Accuracy: every term of the sum is formed from a - b, so float32 is within 1e-6 of the value however small it is.
    Cost: 8 N D^2 operations forward and backward, memory O(B D + D^2); for N < D 6 N^2 D and O(B D + B N).
    """
    a, b = paired_rows(a, b, "a and b")
    with torch.autocast(a.device.type, enabled=False):  # else the products would run in half precision
        if global_rows(a) < a.shape[1]:
            products = (a + b) @ distributed.gather(a - b).T  # (B, N)
            return distributed.all_sum(products.square().sum())
        return _GeometricConsistency.apply(a, b)


def gram_difference(a: Tensor, b: Tensor) -> Tensor:
    """The second geometric term alone, the Gram matrices' distance: sum over pairs j, k of (<a_j,a_k> - <b_j,b_k>)^2.

    Inside L_GC^a of Jiang et al. 2023, section 4.3. Arguments and result as in `geometric_consistency`, never negative.

    Accuracy: the two terms of the closed form have opposite signs. Rounding is relative to the sum of BOTH geometric
    terms, not to this one, which can be a 1e-8 part of it: where b is a rotated a, both have the same Gram matrix. In
    float32 that left a value 700 % off and negative. So all products here are in float64 (1e-16 of the sum), the value
    is cut at 0, and the gradient is that of the uncut value, which is right at 0 too.
    Cost: 14 N D^2 operations in float64, forward and backward, memory O(B D + D^2) and blocks of rows in float64;
    for N < D 12 N^2 D and O(B N).
    """
    a, b = paired_rows(a, b, "a and b")
    if global_rows(a) < a.shape[1]:
        a_rows, b_rows = a.double(), b.double()
        a_all, b_all = distributed.gather(a).double(), distributed.gather(b).double()
        difference = a_rows @ a_all.T - b_rows @ b_all.T  # (B, N)
        return distributed.all_sum(difference.square().sum()).to(a.dtype)
    return _GramDifference.apply(a, b)


class _GeometricConsistency(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        plus, minus = a + b, a - b
        products = distributed.sum_over_processes(torch.stack((plus.T @ plus, minus.T @ minus)))  # (2, D, D)
        ctx.save_for_backward(a, b, products)
        return (products[0] * products[1]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b, (plus_products, minus_products) = ctx.saved_tensors
        # Every process asks for the gradient of the same global value: the adjoint of the sum in the forward.
        factor = 2 * distributed.sum_over_processes(gradient)
        plus_gradient = factor * ((a + b) @ minus_products)
        minus_gradient = factor * ((a - b) @ plus_products)
        return plus_gradient + minus_gradient, plus_gradient - minus_gradient


class _GramDifference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        width = a.shape[1]
        products = a.new_zeros(3, width, width, dtype=torch.float64)
        for plus, minus in _float64_blocks(a, b):
            products[0].addmm_(plus.T, plus)
            products[1].addmm_(minus.T, minus)
            products[2].addmm_(minus.T, plus)
        products = distributed.sum_over_processes(products)
        ctx.save_for_backward(a, b, products)
        plus_products, minus_products, mixed = products
        value = ((plus_products * minus_products).sum() + (mixed * mixed.T).sum()) / 2
        return value.clamp(min=0).to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b, (plus_products, minus_products, mixed) = ctx.saved_tensors
        factor = distributed.sum_over_processes(gradient).double()
        a_gradient, b_gradient = [], []
        for plus, minus in _float64_blocks(a, b):
            plus_gradient = factor * (plus @ minus_products + minus @ mixed.T)
            minus_gradient = factor * (minus @ plus_products + plus @ mixed)
            a_gradient.append((plus_gradient + minus_gradient).to(a.dtype))
            b_gradient.append((plus_gradient - minus_gradient).to(a.dtype))
        return torch.cat(a_gradient), torch.cat(b_gradient)


def _float64_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """a + b and a - b in float64, some rows at a time."""
    for a_rows, b_rows in zip(a.split(BLOCK_ROWS), b.split(BLOCK_ROWS), strict=True):
        a_rows, b_rows = a_rows.double(), b_rows.double()
        yield a_rows + b_rows, a_rows - b_rows
