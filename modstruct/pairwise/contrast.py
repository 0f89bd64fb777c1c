"""Contrastive terms over the global batch: InfoNCE both ways and one way, softened targets, SigLIP's sigmoid loss.

Every process takes its own rows against the columns of all, in tiles; the gradient of the columns goes back to their
owners by a reduce-scatter. The operators below are one process's part.

Both ways (`contrastive`). One pass gives the log-sum-exps along rows and along columns: forward 2 B N D operations,
backward 6 B N D, or 4 where the logits fit in memory and are kept. Those along columns are combined over the processes
by a maximum and a sum.

One way (`info_nce`, `soft_contrastive`, `sigmoid_contrastive`). A tile's weights W, the gradient with respect to the
logits, are known in the forward, so it makes the products W y and W^T x too, while they are at hand: 6 B N D
operations in all, where a backward that computed the logits again would take 8.

Precision. A log-sum-exp runs over the negatives alone, and the positive joins at the end:
  margin_j = lse_{k != j} S_jk - S_jj,   loss_j = log(1 + exp(margin_j)),   d loss_j / d S_jj = -sigmoid(margin_j).
So the gradient of the positive is minus the sum of its negatives' gradients, and no 1 - p cancels. At logit scale 100
a well-trained batch has p within 1e-8 of 1, where that cancellation would leave nothing but rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import Precision
from modstruct.errors import require
from modstruct.pairwise import cpu_kernels, cuda_kernels, torch_tiles
from modstruct.pairwise.global_batch import (
    checked_number,
    checked_rows,
    global_rows,
    paired_rows,
    require_constant,
    require_same_shape,
    softplus,
    sum_of_products,
)
from modstruct.pairwise.operators import check_precision, operator


def contrastive(x: Tensor, y: Tensor, logit_scale: Tensor, precision: Precision = "float32") -> tuple[Tensor, Tensor]:
    """Both directions of InfoNCE, (x -> y, y -> x); CLIP's loss is half their sum (Radford et al. 2021, figure 3).

      x -> y:  -1/N sum_j log( exp(s <x_j, y_j>) / sum_k exp(s <x_j, y_k>) )     (van den Oord et al. 2018, equation 4)

    x, y: this process's (B, D) rows, the same B on every process; half precision is taken to float32. logit_scale:
    (1,), s = 1 / temperature. precision: how products are formed on a GPU, see config.Precision. Returns two scalars,
    means over the N rows of all processes, the same on each. Memory O(N D). Raises ValueError, by name, where a shape,
    dtype or device does not fit.
    """
    x, y = paired_rows(x=x, y=y)
    scale = checked_number(x, logit_scale=logit_scale)
    check_precision(precision)
    first = distributed.rank() * len(x)
    row_lse, column_lse, positive = row_and_column_lse(x, distributed.gather(y), scale, first, precision)
    column_lse = _over_processes(column_lse)[first : first + len(x)]
    margins = torch.stack((row_lse - positive, column_lse - positive))  # (2, B)
    losses = softplus(margins).sum(1)
    x_to_y, y_to_x = (distributed.all_sum(losses) / global_rows(x)).unbind()
    return x_to_y, y_to_x


def info_nce(x: Tensor, y: Tensor, logit_scale: Tensor, precision: Precision = "float32") -> Tensor:
    """Cross entropy of each row of x against all rows of y, where row j's positive is y_j.

      -1/N sum_j log( exp(s <x_j, y_j>) / sum_k exp(s <x_j, y_k>) )       (van den Oord et al. 2018, equation 4)

    Arguments and errors as in `contrastive`. Returns a scalar, the mean over the N rows of all processes, the same on
    each. Memory O(N D).
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
    """Cross entropy of each row of x against columns, with targets softened by an EMA model: ALBEF's ITC, one way.

      -1/N sum_j sum_k T_jk log softmax_k(s <x_j, c_k>)
      T_j = alpha softmax_k(s <x_momentum_j, c_k>) + (1 - alpha) onehot(the pair of row j)     (Li et al. 2021, eq. 6)

    x, x_momentum: this process's (B, D) rows, the same B on every process. columns: (M, D), the same on every process:
    the other modality's EMA rows of all processes in order of rank, so that row j of process p has its pair in
    column p B + j, then a queue of any length. x_momentum and columns get no gradient and are refused if they require
    one. logit_scale: (1,), s = 1 / temperature; as in ALBEF's code its gradient treats the targets as constants.
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


def sigmoid_contrastive(
    x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor, precision: Precision = "float32"
) -> Tensor:
    """Sigmoid loss of all pairs, each a binary classification of its own: SigLIP's loss.

      -1/N sum_jk log sigmoid( l_jk (s <x_j, y_k> + b) ),   l_jk = 1 for j = k, else -1       (Zhai et al. 2023, eq. 1)

    logit_bias: (1,), b; other arguments and errors as in `contrastive`. Returns a scalar, the mean over the N rows of
    all processes of the sums over the N columns, the same on each. Memory O(N D).
    """
    x, y = paired_rows(x=x, y=y)
    scale, bias = checked_number(x, logit_scale=logit_scale), checked_number(x, logit_bias=logit_bias)
    first = distributed.rank() * len(x)
    total = sigmoid_contrast_sum(x, distributed.gather(y), scale, bias, first, precision)
    return (distributed.all_sum(total) / global_rows(x)).to(x.dtype)


def _over_processes(column_lse: Tensor) -> Tensor:
    """The columns' log-sum-exps over the rows of all processes, from those over the rows of each, (N,)."""
    if distributed.world_size() == 1:
        return column_lse
    largest = distributed.max_over_processes(column_lse.detach())
    return largest + distributed.all_sum((column_lse - largest).exp()).log()


def row_and_column_lse(
    x: Tensor, y: Tensor, scale: Tensor, first: int, precision: Precision
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of scale <x_j, y_k> over the negatives, of rows (B,) and of columns (N,), and the positives (B,).

    x: (B, D). y: (N, D), row j's positive being column first + j. scale: (1,).
    """
    keep = torch.is_grad_enabled() and any(z.requires_grad for z in (x, y, scale))
    return contrastive_statistics(x, y, scale, first, precision, keep)[:3]


def row_contrast_sum(
    x: Tensor, x_momentum: Tensor | None, columns: Tensor, scale: Tensor, first: int, alpha: float, precision: Precision
) -> Tensor:
    """Sum over this process's rows of their cross entropies, as `soft_contrastive` has them; a scalar.

    x, x_momentum: (B, D), None for one-hot targets. columns: (M, D), row j's positive being column first + j.
    scale: (1,).
    """
    check_precision(precision)
    momentum = x_momentum if alpha > 0 else None
    return row_contrast(x, momentum, columns, scale, first, alpha, _needed_grads(x, columns, scale), precision)[0]


def sigmoid_contrast_sum(
    x: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, first: int, precision: Precision
) -> Tensor:
    """Sum over this process's rows of their terms, as `sigmoid_contrastive` has them; () in float64.

    x: (B, D). columns: (N, D), row j's positive being column first + j. scale, bias: (1,).
    """
    check_precision(precision)
    affine = torch.cat((scale, bias)).to(x.dtype)
    return sigmoid_contrast(x, columns, affine, first, _needed_grads(x, columns, affine), precision)[0]


def _needed_grads(x: Tensor, columns: Tensor, affine: Tensor) -> str:
    """Which products the forward has to make for the backward: "none", those of the "rows", or "all"."""
    if not torch.is_grad_enabled():
        return "none"
    if columns.requires_grad:
        return "all"
    return "rows" if x.requires_grad or affine.requires_grad else "none"


contrastive_statistics = operator(
    torch_tiles.contrastive_statistics,
    cpu=cpu_kernels.contrastive_statistics,
    cuda=cuda_kernels.contrastive_statistics,
)
contrastive_grad = operator(
    torch_tiles.contrastive_grad, cpu=cpu_kernels.contrastive_grad, cuda=cuda_kernels.contrastive_grad
)
row_contrast = operator(torch_tiles.row_contrast, cpu=cpu_kernels.row_contrast, cuda=cuda_kernels.row_contrast)
sigmoid_contrast = operator(
    torch_tiles.sigmoid_contrast, cpu=cpu_kernels.sigmoid_contrast, cuda=cuda_kernels.sigmoid_contrast
)


@contrastive_statistics.register_fake
def _(x, y, scale, first, precision, keep=False):
    kept = cpu_kernels.kept_logits(x, y) if keep and x.device.type == "cpu" and x.dtype == torch.float32 else 0
    return x.new_empty(x.shape[0]), x.new_empty(y.shape[0]), x.new_empty(x.shape[0]), x.new_empty(kept)


@contrastive_grad.register_fake
def _(x, y, scale, first, row_values, column_values, precision, logits=None):
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(scale)


@row_contrast.register_fake
def _(x, x_momentum, columns, scale, first, alpha, grads, precision):
    return x.new_empty(()), *_grads_like(x, columns, grads)


@sigmoid_contrast.register_fake
def _(x, columns, affine, first, grads, precision):
    sums = [x.new_empty((), dtype=torch.float64) for _ in range(2)]
    return sums[0], *_grads_like(x, columns, grads), sums[1]


def _grads_like(x: Tensor, columns: Tensor, grads: str) -> tuple[Tensor, Tensor]:
    width = x.shape[1]
    x_grad = x.new_empty(0 if grads == "none" else x.shape[0], width)
    return x_grad, x.new_empty(columns.shape[0] if grads == "all" else 0, width)


def _keep_statistics(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, y, scale, ctx.first, ctx.precision, _ = inputs
    row_lse, column_lse, _, logits = output
    ctx.mark_non_differentiable(logits)
    ctx.save_for_backward(x, y, scale, row_lse, column_lse, logits)


def _statistics_backward(ctx, row_gradient: Tensor, column_gradient: Tensor, positive_gradient: Tensor, _) -> tuple:
    x, y, scale, row_lse, column_lse, logits = ctx.saved_tensors
    row_values = torch.stack((row_lse, row_gradient, positive_gradient))
    column_values = torch.stack((column_lse, column_gradient))
    grads = contrastive_grad(x, y, scale, ctx.first, row_values, column_values, ctx.precision, logits)
    return *grads, None, None, None


contrastive_statistics.register_autograd(_statistics_backward, setup_context=_keep_statistics)


@torch.library.custom_op("modstruct::row_contrast_grad", mutates_args=())
def row_contrast_grad(
    gradient: Tensor, x: Tensor, columns: Tensor, affine: Tensor, x_grad: Tensor, column_grad: Tensor, bias_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, D), columns (N, D) or (0, D), and affine (1,) or (2,), from that of the sum, ().

    affine: the scale, and the bias where there is one. x_grad, column_grad: as the operators return them. bias_grad:
    (1,), or (0,) without a bias. An operator without a derivative, and given x and the columns although their products
    are enough: so autograd refuses a second derivative, which would otherwise come out as zero.
    """
    gradient = gradient.to(x.dtype)
    factor = gradient * affine[:1]
    affine_grad = torch.cat((sum_of_products(x_grad, x), bias_grad)) * gradient
    return x_grad * factor, column_grad * factor, affine_grad


@row_contrast_grad.register_fake
def _(gradient, x, columns, affine, x_grad, column_grad, bias_grad):
    return torch.empty_like(x_grad), torch.empty_like(column_grad), torch.empty_like(affine)


def _keep_row_contrast(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, columns, scale, _, _, ctx.grads, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, columns, scale, *output[1:], x.new_empty(0))


def _row_contrast_backward(ctx, gradient: Tensor, *_: Tensor) -> tuple:
    x_grad, column_grad, scale_grad = _row_grads(ctx, gradient, ctx.needs_input_grad[2])
    return x_grad, None, column_grad, scale_grad, None, None, None, None


def _keep_sigmoid_contrast(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, columns, affine, _, ctx.grads, _ = inputs
    _, x_grad, column_grad, bias_grad = output
    ctx.mark_non_differentiable(x_grad, column_grad, bias_grad)
    ctx.save_for_backward(x, columns, affine, x_grad, column_grad, bias_grad.to(x.dtype).reshape(1))


def _sigmoid_contrast_backward(ctx, gradient: Tensor, *_: Tensor) -> tuple:
    x_grad, column_grad, affine_grad = _row_grads(ctx, gradient, ctx.needs_input_grad[1])
    return x_grad, column_grad, affine_grad, None, None, None


def _row_grads(ctx, gradient: Tensor, with_columns: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    needed = ("all",) if with_columns else ("rows", "all")
    require(ctx.grads in needed, "grads", ctx.grads, f"must be {needed[0]!r} where these gradients are wanted")
    x_grad, column_grad, affine_grad = row_contrast_grad(gradient, *ctx.saved_tensors)
    return x_grad, column_grad if with_columns else None, affine_grad


row_contrast.register_autograd(_row_contrast_backward, setup_context=_keep_row_contrast)
sigmoid_contrast.register_autograd(_sigmoid_contrast_backward, setup_context=_keep_sigmoid_contrast)
