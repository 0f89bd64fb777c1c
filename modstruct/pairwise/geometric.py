"""Differences between the similarities of two sets of embeddings, over all pairs of the global batch.

For row-embeddings A, B (N x D) put P = A + B, M = A - B, X = M^T P. Then, exactly,
  |A B^T - B A^T|^2 + |A A^T - B B^T|^2 = <P^T P, M^T M> = |P M^T|^2        (squared Frobenius norms)
                      |A A^T - B B^T|^2 = 1/2 (<P^T P, M^T M> + tr(X X))
                      |A B^T - B A^T|^2 = 1/2 (<P^T P, M^T M> - tr(X X)).
The products that run over the batch are D x D: only they are summed over the processes, and no embedding is gathered.
Where the global batch is smaller than D, the N x N matrix is the smaller and cheaper one, and is used instead.

Never expand these into |A^T A|^2 + |B^T B|^2 - 2 |A^T B|^2: for towers that nearly agree it loses every digit.

Embeddings of one modality lie in a cone, and for rows of unit norm the mean p of P is nearly orthogonal to the mean m
of M, since p.m = |mean of A|^2 - |mean of B|^2. The large parts that the means have in P^T P and M^T M then cancel in
the inner product, with most digits. So the means are subtracted first; with C_P and C_M the products of the rest,
  <P^T P, M^T M> = <C_P, C_M> + N p.(C_M p) + N m.(C_P m) + N^2 (p.m)^2,
of which no part is negative.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import Precision
from modstruct.pairwise import cpu_kernels, cuda_kernels, torch_tiles
from modstruct.pairwise.global_batch import global_rows, paired_rows
from modstruct.pairwise.operators import check_precision, operator

FLOAT64_ROWS = 4096  # rows that are in float64 at once


def geometric_consistency(a: Tensor, b: Tensor, precision: Precision = "float32") -> Tensor:
    """Both geometric terms at once: sum over pairs j, k of (<a_j,b_k> - <a_k,b_j>)^2 + (<a_j,a_k> - <b_j,b_k>)^2.

    N times the L_GC of Jiang et al. 2023, section 4.3.
    a, b: this process's (B, D) rows, the same B on every process; half precision is taken to float32.
    precision: how products are formed on a GPU, see config.Precision; for N < D torch's own setting holds.
    Returns a scalar, the sum over the N^2 pairs of all processes, the same on each. Exactly 0 where a equals b.
    Raises ValueError, by name, where a shape, dtype or device does not fit.

    Accuracy: every term of the sum is formed from a - b, and the means are apart (see above), so float32 is within 2e-6
    of the value however small it is, in a narrow cone too. What is left is an error of 1e-7 |C_P| |C_M|, which would
    show if the towers' sum and difference varied along other directions altogether. Gradients are within 1e-5 up to
    cosines of 0.999 within a modality; at 0.9999 3e-5 was seen.
    Cost: 8 N D^2 operations forward and backward, memory O(D^2) besides the gradients; for N < D 6 N^2 D and O(B N).
    """
    a, b = paired_rows(a=a, b=b)
    check_precision(precision)
    count = global_rows(a)
    gathered = (distributed.gather(a), distributed.gather(b)) if fits_pairs(count, a.shape[1]) else None
    return consistency_value(_all_sum(consistency_sums(a, b, gathered, precision)), count).to(a.dtype)


def fits_pairs(count: int, dimension: int) -> bool:
    """Whether the N x N matrix is the smaller one, so that the terms are formed from the gathered rows."""
    return count < dimension


def consistency_sums(
    a: Tensor, b: Tensor, gathered: tuple[Tensor, Tensor] | None, precision: Precision
) -> dict[str, Tensor]:
    """This process's part of what `consistency_value` takes, to be summed over the processes.

    a, b: (B, D), contiguous. gathered: the rows of all processes, (N, D) each, where `fits_pairs`; else None.
    """
    if gathered is not None:
        with torch.autocast(a.device.type, enabled=False):  # else the product would run in half precision
            products = (a + b) @ (gathered[0] - gathered[1]).T  # (B, N)
        return {"squares": products.square().sum(1).sum()}
    # One node of the graph for sums and products: their gradients are added to each other before any other term's.
    a, b = a.view_as(a), b.view_as(b)
    sums = torch.stack((a.sum(0, dtype=torch.float64), b.sum(0, dtype=torch.float64)))
    with torch.no_grad():
        a_mean, b_mean = sums / len(a)
        centers = torch.stack((a_mean, b_mean, a_mean - b_mean)).to(a.dtype)
    found = {"products": geometric_products(a, b, centers, precision).double(), "sums": sums}
    if distributed.world_size() > 1:  # the means of the processes differ
        found["means"] = len(a) * _outer(*(sums / len(a)))
    return found


def consistency_value(sums: dict[str, Tensor], count: int) -> Tensor:
    """The sum over all N^2 pairs, a scalar, from `consistency_sums` of all processes. count: N."""
    if "squares" in sums:
        return sums["squares"]
    a_mean, b_mean = sums["sums"] / count
    plus_products, minus_products = sums["products"]
    if "means" in sums:
        # C = sum_p (C_p + n_p mu_p mu_p^T) - N mu mu^T
        between = sums["means"] - count * _outer(a_mean, b_mean)
        plus_products, minus_products = plus_products + between[0], minus_products + between[1]
    plus_mean, minus_mean = a_mean + b_mean, a_mean - b_mean
    value = _inner(plus_products, minus_products) + count**2 * (plus_mean * minus_mean).sum().square()
    for mean, other in ((plus_mean, minus_products), (minus_mean, plus_products)):
        value = value + count * _inner(mean[:, None] * mean, other)
    return value


def _outer(a_mean: Tensor, b_mean: Tensor) -> Tensor:
    """mu mu^T for the means of a + b and of a - b, (2, D, D)."""
    means = torch.stack((a_mean + b_mean, a_mean - b_mean))
    return means[:, :, None] * means[:, None, :]


def _all_sum(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: distributed.all_sum(value) for name, value in sums.items()}


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of (D, D) matrices. In two stages: a sum to one number would be split by the number of threads."""
    return (a * b).sum(1).sum()


def gram_difference(a: Tensor, b: Tensor) -> Tensor:
    """The second geometric term alone, the Gram matrices' distance: sum over pairs j, k of (<a_j,a_k> - <b_j,b_k>)^2.

    Inside L_GC^a of Jiang et al. 2023, section 4.3. Arguments, result and errors as in `geometric_consistency`; never
    negative.

    Accuracy: the two terms of the closed form have opposite signs. Rounding is relative to the sum of BOTH geometric
    terms, not to this one, which can be a 1e-8 part of it: where b is a rotated a, both have the same Gram matrix. In
    float32 that left a value 700 % off and negative. So all products here are in float64 (1e-16 of the sum), the value
    is cut at 0, and the gradient is that of the uncut value, which is right at 0 too.
    Cost: 14 N D^2 operations in float64, forward and backward, memory O(D^2) and blocks of rows in float64; for N < D
    12 N^2 D and O(B N).
    """
    a, b = paired_rows(a=a, b=b)
    gathered = (distributed.gather(a), distributed.gather(b)) if fits_pairs(global_rows(a), a.shape[1]) else None
    return difference_value(_all_sum(difference_sums(a, b, gathered))).to(a.dtype)


def difference_sums(a: Tensor, b: Tensor, gathered: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """This process's part of what `difference_value` takes; arguments as in `consistency_sums`."""
    if gathered is None:
        return {"products": gram_products(a, b)}
    with torch.autocast(a.device.type, enabled=False):
        difference = _float64_gram(a, gathered[0]) - _float64_gram(b, gathered[1])
    return {"squares": difference.square().sum(1).sum()}


def difference_value(sums: dict[str, Tensor]) -> Tensor:
    """The sum over all N^2 pairs, a scalar in float64, from `difference_sums` of all processes."""
    return sums["squares"] if "squares" in sums else _single_term(sums["products"], 1)


def gram_asymmetry(a: Tensor, b: Tensor) -> Tensor:
    """The first geometric term alone, the asymmetry of a b^T: sum over pairs j, k of (<a_j,b_k> - <a_k,b_j>)^2.

    Inside L_GC of Jiang et al. 2023, section 4.3. All else as in `gram_difference`.
    """
    a, b = paired_rows(a=a, b=b)
    if fits_pairs(global_rows(a), a.shape[1]):
        with torch.autocast(a.device.type, enabled=False):
            difference = _float64_gram(a, distributed.gather(b)) - _float64_gram(b, distributed.gather(a))
        return distributed.all_sum(difference.square().sum(1).sum()).to(a.dtype)
    return _single_term(distributed.all_sum(gram_products(a, b)), -1).to(a.dtype)


def _float64_gram(rows: Tensor, columns: Tensor) -> Tensor:
    """Inner products of this process's rows (B, D) with columns (N, D), (B, N), in float64."""
    return rows.double() @ columns.double().T


def _single_term(products: Tensor, sign: int) -> Tensor:
    plus_products, minus_products, mixed = products
    value = (_inner(plus_products, minus_products) + sign * _inner(mixed, mixed.T)) / 2
    return value + (value.clamp(min=0) - value).detach()


geometric_products = operator(
    torch_tiles.geometric_products, cpu=cpu_kernels.geometric_products, cuda=cuda_kernels.geometric_products
)
geometric_grad = operator(torch_tiles.geometric_grad, cpu=cpu_kernels.geometric_grad, cuda=cuda_kernels.geometric_grad)


@geometric_products.register_fake
def _(a, b, centers, precision):
    return a.new_empty(2, a.shape[1], a.shape[1])


@geometric_grad.register_fake
def _(a, b, centers, weights, precision):
    return torch.empty_like(a), torch.empty_like(b)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    a, b, centers, ctx.precision = inputs
    ctx.save_for_backward(a, b, centers)


def _backward(ctx, gradient: Tensor) -> tuple:
    weights = (gradient + gradient.mT).contiguous()
    return *geometric_grad(*ctx.saved_tensors, weights, ctx.precision), None, None


geometric_products.register_autograd(_backward, setup_context=_keep)


# P^T P, M^T M and M^T P in float64, for the single terms. Plain products of matrices, best left to a BLAS.


@torch.library.custom_op("modstruct::gram_products", mutates_args=())
def gram_products(a: Tensor, b: Tensor) -> Tensor:
    """(a + b)^T (a + b), (a - b)^T (a - b) and (a - b)^T (a + b), (3, D, D) in float64. a, b: (B, D)."""
    products = a.new_zeros(3, a.shape[1], a.shape[1], dtype=torch.float64)
    with torch.autocast(a.device.type, enabled=False):
        for plus, minus in _float64_blocks(a, b):
            products[0].addmm_(plus.T, plus)
            products[1].addmm_(minus.T, minus)
            products[2].addmm_(minus.T, plus)
    return products


@gram_products.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(3, a.shape[1], a.shape[1], dtype=torch.float64)


@torch.library.custom_op("modstruct::gram_grad", mutates_args=())
def gram_grad(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of the products, (3, D, D), to those of a and b.

    An operator without a derivative, so that autograd refuses a second one instead of taking it for zero.
    """
    a_grad, b_grad = torch.empty_like(a), torch.empty_like(b)
    plus_weights, minus_weights = (gradient[i] + gradient[i].T for i in range(2))
    mixed = gradient[2]
    start = 0
    with torch.autocast(a.device.type, enabled=False):
        for plus, minus in _float64_blocks(a, b):
            rows = slice(start, start := start + len(plus))
            plus_grad = plus @ plus_weights + minus @ mixed
            minus_grad = minus @ minus_weights + plus @ mixed.T
            a_grad[rows] = plus_grad + minus_grad
            b_grad[rows] = plus_grad - minus_grad
    return a_grad, b_grad


@gram_grad.register_fake
def _(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


def _keep_rows(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gram_backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return gram_grad(gradient, *ctx.saved_tensors)


gram_products.register_autograd(_gram_backward, setup_context=_keep_rows)


def _float64_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """a + b and a - b in float64, some rows at a time."""
    for a_rows, b_rows in zip(a.split(FLOAT64_ROWS), b.split(FLOAT64_ROWS), strict=True):
        a_rows, b_rows = a_rows.double(), b_rows.double()
        yield a_rows + b_rows, a_rows - b_rows
