"""One-sided contrast over the global batch: each row of x against all columns, with one-hot or softened targets.

A row is complete within a group of tiles, so the forward makes the gradients too, while its logits are at hand: 6 B N D
operations in all, where a backward that began anew would take 8. The precautions of symmetric_contrast.py hold here
too: the positive's gradient is minus the sum of the others'.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import Precision
from modstruct.errors import require
from modstruct.pairwise import dispatch, torch_tiles
from modstruct.pairwise.global_batch import (
    checked_number,
    checked_rows,
    global_rows,
    paired_rows,
    require_constant,
    require_same_shape,
    steady_sum,
    sum_of_products,
)


def info_nce(x: Tensor, y: Tensor, logit_scale: Tensor, precision: Precision = "float32") -> Tensor:
    """Cross entropy of each row of x against all rows of y, where row j's positive is y_j.

      -1/N sum_j log( exp(s <x_j, y_j>) / sum_k exp(s <x_j, y_k>) )       (van den Oord et al. 2018, equation 4)

    x, y: this process's (B, D) rows, the same B on every process; half precision is taken to float32. logit_scale:
    (1,), s = 1 / temperature. precision: how products are formed on a GPU, see config.Precision. Returns a scalar, the
    mean over the N rows of all processes, the same on each. Memory O(N D). Raises ValueError, by name, where a shape,
    dtype or device does not fit.
    """
    x, y = paired_rows(x=x, y=y)
    scale, first = checked_number(x, logit_scale=logit_scale), distributed.rank() * len(x)
    total = row_contrast_sum(x, None, distributed.gather(y), scale, first, 0.0, precision)
    return distributed.all_sum(total) / global_rows(x)


def soft_contrastive(
    x: Tensor,
    x_momentum: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    alpha: float,
    precision: Precision = "float32",
) -> Tensor:
    """Cross entropy of each row of x against columns, with targets that a momentum encoder softens: ALBEF's ITC, one
    way.

      -1/N sum_j sum_k T_jk log softmax_k(s <x_j, c_k>)
      T_j = alpha softmax_k(s <x_momentum_j, c_k>) + (1 - alpha) onehot(the pair of row j)     (Li et al. 2021, eq. 6)

    x, x_momentum: this process's (B, D) rows, the same B on every process. columns: (M, D), the same on every process:
    the other modality's momentum rows of all processes in order of rank, so that row j of process p has its pair in
    column p B + j, then a queue of any length. x_momentum and columns get no gradient and are refused if they ask for
    one. logit_scale: (1,), s = 1 / temperature; as in ALBEF's code its gradient takes the targets for constants.
    alpha: in [0, 1]. Returns a scalar, the mean over the N rows of all processes, the same on each. Memory
    O((N + M) D): the targets are streamed like the logits. Raises ValueError, by name, where an argument does not fit.
    """
    require_same_shape(x=x, x_momentum=x_momentum)
    x, x_momentum, columns = checked_rows(x=x, x_momentum=x_momentum, columns=columns)
    require(0 <= alpha <= 1, "alpha", alpha, "must be from 0 to 1")
    needed = global_rows(x)
    require(len(columns) >= needed, "rows of columns", len(columns), f"at least {needed}, the pairs of all processes")
    require_constant(x_momentum=x_momentum, columns=columns)
    scale, first = checked_number(x, logit_scale=logit_scale), distributed.rank() * len(x)
    total = row_contrast_sum(x, x_momentum, columns, scale, first, float(alpha), precision)
    return distributed.all_sum(total) / global_rows(x)


def row_contrast_sum(
    x: Tensor, x_momentum: Tensor | None, columns: Tensor, scale: Tensor, first: int, alpha: float, precision: Precision
) -> Tensor:
    """Sum over this process's rows of their cross entropies, as `soft_contrastive` has them; a scalar.

    x, x_momentum: (B, D), None for one-hot targets. columns: (M, D), row j's positive being column first + j.
    scale: (1,).
    """
    dispatch.check_precision(precision)
    wanted = torch.is_grad_enabled()
    with_pull = wanted and (x.requires_grad or columns.requires_grad or scale.requires_grad)
    with_column_pull = wanted and columns.requires_grad
    momentum = x_momentum if alpha > 0 else None
    return row_contrast(x, momentum, columns, scale, first, alpha, with_pull, with_column_pull, precision)[0]


@torch.library.custom_op("modstruct::row_contrast", mutates_args=())
def row_contrast(
    x: Tensor,
    x_momentum: Tensor | None,
    columns: Tensor,
    scale: Tensor,
    first: int,
    alpha: float,
    with_pull: bool,
    with_column_pull: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over one process's rows of the cross entropies, and the pulls that its gradients are made of.

    x, x_momentum: (B, D), columns: (N, D), scale: (1,), of one dtype and device, contiguous. Row j's positive is column
    first + j. Returns (), W columns (B, D) and W^T x (N, D), W being the gradient with respect to the logits; each pull
    only if wanted, else with no rows. Differentiable with respect to x, columns and scale, as far as pulls were wanted.
    """
    losses, x_pull, column_pull = dispatch.call(
        "row_contrast", x, x_momentum, columns, scale, first, alpha, with_pull, with_column_pull, precision
    )
    return steady_sum(losses), x_pull, column_pull


@row_contrast.register_fake
def _(x, x_momentum, columns, scale, first, alpha, with_pull, with_column_pull, precision):
    width = x.shape[1]
    x_pull = x.new_empty(x.shape[0] if with_pull else 0, width)
    return x.new_empty(()), x_pull, x.new_empty(columns.shape[0] if with_column_pull else 0, width)


@torch.library.custom_op("modstruct::row_contrast_grad", mutates_args=())
def row_contrast_grad(
    gradient: Tensor, x: Tensor, columns: Tensor, affine: Tensor, x_grad: Tensor, column_grad: Tensor, bias_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, D), columns (N, D) or (0, D), and affine (1,) or (2,), from that of the sum, ().

    affine: the scale, and the bias where there is one. bias_grad: (1,), or (0,) without a bias. An operator without a
    derivative, and given the columns although their gradient is enough: so autograd refuses a second derivative, which
    would otherwise come out as zero.
    """
    gradient = gradient.to(x.dtype)
    factor = gradient * affine[:1]
    affine_grad = torch.cat((sum_of_products(x_grad, x), bias_grad)) * gradient
    return x_grad * factor, column_grad * factor, affine_grad


@row_contrast_grad.register_fake
def _(gradient, x, columns, affine, x_grad, column_grad, bias_grad):
    return torch.empty_like(x_grad), torch.empty_like(column_grad), torch.empty_like(affine)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, columns, scale, _, _, ctx.with_pull, ctx.with_column_pull, _ = inputs
    _, x_pull, column_pull = output
    ctx.mark_non_differentiable(x_pull, column_pull)
    ctx.save_for_backward(x, columns, scale, x_pull, column_pull, x.new_empty(0))


def _backward(ctx, gradient: Tensor, *_: Tensor) -> tuple:
    require(ctx.with_pull, "with_pull", ctx.with_pull, "must be True where a gradient is wanted")
    needs_columns = ctx.needs_input_grad[2]
    wanted = ctx.with_column_pull or not needs_columns
    require(wanted, "with_column_pull", ctx.with_column_pull, "must be True where a gradient of columns is wanted")
    x_grad, column_grad, scale_grad = row_contrast_grad(gradient, *ctx.saved_tensors)
    return x_grad, None, column_grad if needs_columns else None, scale_grad, None, None, None, None, None


row_contrast.register_autograd(_backward, setup_context=_keep)


def sigmoid_contrastive(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, precision: Precision = "float32"
) -> Tensor:
    """Sigmoid loss of all pairs, each a binary classification of its own: SigLIP's loss.

      -1/N sum_jk log sigmoid( l_jk (s <x_j, y_k> + b) ),   l_jk = 1 for j = k, else -1       (Zhai et al. 2023, eq. 1)

    x, y: this process's (B, D) rows, the same B on every process; half precision is taken to float32. logit_scale:
    (1,), s = 1 / temperature. logit_bias: (1,), b. precision: how products are formed on a GPU, see config.Precision.
    Returns a scalar, the mean over the N rows of all processes of the sums over the N columns, the same on each.
    Memory O(N D). Raises ValueError, by name, where a shape, dtype or device does not fit.
    """
    x, y = paired_rows(x=x, y=y)
    scale, bias = checked_number(x, logit_scale=logit_scale), checked_number(x, logit_bias=logit_bias)
    first = distributed.rank() * len(x)
    total = sigmoid_contrast_sum(x, distributed.gather(y), scale, bias, first, precision)
    return (distributed.all_sum(total) / global_rows(x)).to(x.dtype)


def sigmoid_contrast_sum(
    x: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, first: int, precision: Precision
) -> Tensor:
    """Sum over this process's rows of their terms, as `sigmoid_contrastive` has them; () in float64.

    x: (B, D). columns: (N, D), row j's positive being column first + j. scale, bias: (1,).
    """
    dispatch.check_precision(precision)
    affine = torch.cat((scale, bias))
    return sigmoid_contrast(x, columns, affine, first, _needed_grads(x, columns, affine), precision)[0]


def _needed_grads(x: Tensor, columns: Tensor, numbers: Tensor) -> str:
    """Which gradients a forward has to make: "none", "rows" or "all", those of the columns too."""
    if not torch.is_grad_enabled():
        return "none"
    if columns.requires_grad:
        return "all"
    return "rows" if x.requires_grad or numbers.requires_grad else "none"


@torch.library.custom_op("modstruct::sigmoid_contrast", mutates_args=())
def sigmoid_contrast(
    x: Tensor, columns: Tensor, affine: Tensor, first: int, grads: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum over one process's rows and all columns of softplus(-l_jk S_jk), S_jk = scale <x_j, c_k> + bias.

    x: (B, D), columns: (N, D), affine: (2,), scale and bias; of one dtype and device, contiguous. l_jk is 1 at column
    first + j, the positive, and -1 elsewhere. With W the gradient with respect to S, W_jk = -l_jk sigmoid(-l_jk S_jk),
    returns the sum () in float64, W columns (B, D), W^T x (N, D) and sum_jk W_jk () in float64; the second unless
    grads is "none", the third if it is "all", else with no rows. Differentiable with respect to x, columns and affine.
    """
    with torch.autocast(x.device.type, enabled=False):
        return torch_tiles.sigmoid_contrast(x, columns, affine, first, grads, precision)


@sigmoid_contrast.register_fake
def _(x, columns, affine, first, grads, precision):
    sums = [x.new_empty((), dtype=torch.float64) for _ in range(2)]
    x_grad = x.new_empty(x.shape[0] if grads != "none" else 0, x.shape[1])
    return sums[0], x_grad, x.new_empty(columns.shape[0] if grads == "all" else 0, x.shape[1]), sums[1]


def _keep_sigmoid(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, columns, affine, _, ctx.grads, _ = inputs
    _, x_grad, column_grad, bias_grad = output
    ctx.mark_non_differentiable(x_grad, column_grad, bias_grad)
    ctx.save_for_backward(x, columns, affine, x_grad, column_grad, bias_grad.to(x.dtype).reshape(1))


def _sigmoid_backward(ctx, gradient: Tensor, *_: Tensor) -> tuple:
    needed = "all" if ctx.needs_input_grad[1] else "rows"
    require(ctx.grads in (needed, "all"), "grads", ctx.grads, f"must be {needed!r}: these gradients are wanted")
    x_grad, column_grad, affine_grad = row_contrast_grad(gradient, *ctx.saved_tensors)
    return x_grad, column_grad if ctx.grads == "all" else None, affine_grad, None, None, None


sigmoid_contrast.register_autograd(_sigmoid_backward, setup_context=_keep_sigmoid)
