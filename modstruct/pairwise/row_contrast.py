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
from modstruct.pairwise import dispatch
from modstruct.pairwise.global_batch import (
    checked_rows,
    checked_scale,
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
    return _mean_contrast(x, None, distributed.gather(y), checked_scale(logit_scale, x), 0.0, precision)


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
    momentum = x_momentum if alpha > 0 else None
    return _mean_contrast(x, momentum, columns, checked_scale(logit_scale, x), float(alpha), precision)


def _mean_contrast(
    x: Tensor, x_momentum: Tensor | None, columns: Tensor, scale: Tensor, alpha: float, precision: str
) -> Tensor:
    dispatch.check_precision(precision)
    wanted = torch.is_grad_enabled()
    with_pull = wanted and (x.requires_grad or columns.requires_grad or scale.requires_grad)
    with_column_pull = wanted and columns.requires_grad
    first = distributed.rank() * len(x)
    total, _, _ = row_contrast(x, x_momentum, columns, scale, first, alpha, with_pull, with_column_pull, precision)
    return distributed.all_sum(total) / global_rows(x)


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


@torch.library.custom_op("modstruct::row_contrast_gradients", mutates_args=())
def row_contrast_gradients(
    gradient: Tensor, x: Tensor, columns: Tensor, scale: Tensor, x_pull: Tensor, column_pull: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, D), columns (N, D) or (0, D), and scale (1,), from that of the sum, ().

    An operator without a derivative, and given the columns although their pull is enough: so autograd refuses a second
    derivative, which would otherwise come out as zero.
    """
    factor = gradient * scale
    return x_pull * factor, column_pull * factor, sum_of_products(x_pull, x) * gradient


@row_contrast_gradients.register_fake
def _(gradient, x, columns, scale, x_pull, column_pull):
    return torch.empty_like(x_pull), torch.empty_like(column_pull), torch.empty_like(scale)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, columns, scale, _, _, ctx.with_pull, ctx.with_column_pull, _ = inputs
    _, x_pull, column_pull = output
    ctx.mark_non_differentiable(x_pull, column_pull)
    ctx.save_for_backward(x, columns, scale, x_pull, column_pull)


def _backward(ctx, gradient: Tensor, *_: Tensor) -> tuple:
    require(ctx.with_pull, "with_pull", ctx.with_pull, "must be True where a gradient is wanted")
    needs_columns = ctx.needs_input_grad[2]
    wanted = ctx.with_column_pull or not needs_columns
    require(wanted, "with_column_pull", ctx.with_column_pull, "must be True where a gradient of columns is wanted")
    x_gradient, column_gradient, scale_gradient = row_contrast_gradients(gradient, *ctx.saved_tensors)
    return x_gradient, None, column_gradient if needs_columns else None, scale_gradient, None, None, None, None, None


row_contrast.register_autograd(_backward, setup_context=_keep)
