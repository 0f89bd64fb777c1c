"""Symmetric InfoNCE over the global batch: both directions from one pass over the logits, which are never kept.

Every process takes its own rows of x against all columns y, once. Log-sum-exps along rows are complete there; those
along columns are put together over the processes by a maximum and a sum, and the gradient of the columns goes back to
their owners by a reduce-scatter. The operator below is one process's part: forward 2 B N D operations, backward 6 B N
D.

Precision. Each log-sum-exp runs over the negatives alone, and the positive joins at the end:
  margin_j = lse_{k != j} S_jk - S_jj,   loss_j = log(1 + exp(margin_j)),   d loss_j / d S_jj = -sigmoid(margin_j).
So the gradient of the positive is minus the sum of its negatives' gradients, and no 1 - p cancels. At logit scale 100
a well-trained batch has p within 1e-8 of 1, where that cancellation would leave nothing but rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.config import Precision
from modstruct.pairwise import dispatch
from modstruct.pairwise.global_batch import checked_number, global_rows, paired_rows, softplus, sum_of_products


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
    dispatch.check_precision(precision)
    first = distributed.rank() * len(x)
    row_lse, column_lse, positive = contrastive_statistics(x, distributed.gather(y), scale, first, precision)
    column_lse = _over_processes(column_lse)[first : first + len(x)]
    margins = torch.stack((row_lse - positive, column_lse - positive))  # (2, B)
    losses = softplus(margins).sum(1)
    return (distributed.all_sum(losses) / global_rows(x)).unbind()


def _over_processes(column_lse: Tensor) -> Tensor:
    """The columns' log-sum-exps over the rows of all processes, from those over the rows of each, (N,)."""
    if distributed.world_size() == 1:
        return column_lse
    largest = distributed.max_over_processes(column_lse.detach())
    return largest + distributed.all_sum((column_lse - largest).exp()).log()


@torch.library.custom_op("modstruct::contrastive_statistics", mutates_args=())
def contrastive_statistics(
    x: Tensor, y: Tensor, scale: Tensor, first: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of the logits S_jk = scale <x_j, y_k>, without the positives; one process's part.

    x: (B, D), y: (N, D), scale: (1,), of one dtype and device, contiguous. Row j's positive is column first + j.
    Returns along rows (B,), along columns (N,), and the positives' logits (B,).
    """
    return dispatch.call("contrastive_statistics", x, y, scale, first, precision)


@contrastive_statistics.register_fake
def _(x: Tensor, y: Tensor, scale: Tensor, first: int, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(y.shape[0]), x.new_empty(x.shape[0])


@torch.library.custom_op("modstruct::contrastive_gradients", mutates_args=())
def contrastive_gradients(
    row_gradient: Tensor,
    column_gradient: Tensor,
    positive_gradient: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    first: int,
    row_lse: Tensor,
    column_lse: Tensor,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradients of the three results of `contrastive_statistics` to those of x, y and scale.

    An operator without a derivative, so that autograd refuses a second one instead of taking it for zero.
    """
    weights = [gradient.contiguous() for gradient in (row_gradient, column_gradient, positive_gradient)]
    x_pull, y_pull = dispatch.call("contrastive_pulls", x, y, scale, first, row_lse, column_lse, *weights, precision)
    scale_gradient = sum_of_products(x_pull, x)
    return x_pull.mul_(scale), y_pull.mul_(scale), scale_gradient


@contrastive_gradients.register_fake
def _(row_gradient, column_gradient, positive_gradient, x, y, scale, first, row_lse, column_lse, precision):
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(scale)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, scale, ctx.first, ctx.precision = inputs
    row_lse, column_lse, _ = output
    ctx.save_for_backward(x, y, scale, row_lse, column_lse)


def _backward(ctx, row_gradient: Tensor, column_gradient: Tensor, positive_gradient: Tensor) -> tuple:
    x, y, scale, row_lse, column_lse = ctx.saved_tensors
    gradients = contrastive_gradients(
        row_gradient, column_gradient, positive_gradient, x, y, scale, ctx.first, row_lse, column_lse, ctx.precision
    )
    return *gradients, None, None


contrastive_statistics.register_autograd(_backward, setup_context=_keep)
