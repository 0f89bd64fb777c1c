"""InfoNCE over the global batch, in tiles: no N x N matrix is ever in memory.

Every process takes its own rows of x against all columns y. Sums along rows are complete there; sums along columns
are combined over the processes, and the gradient of the columns goes back to their owners by a reduce-scatter.

Precision. Each log-sum-exp subtracts its maximum. It runs over the negatives alone, and the positive joins at the end:
  margin_j = lse_{k != j} l_jk - l_jj,   loss_j = log(1 + exp(margin_j)),   d loss_j / d l_jj = -sigmoid(margin_j).
So the gradient of the positive is minus the sum of its negatives' gradients, and no 1 - p cancels. At logit scale 100
a well-trained batch has p within 1e-8 of 1, where that cancellation would leave nothing but rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from modstruct import distributed
from modstruct.config import require
from modstruct.pairwise.global_batch import paired_rows

# Logits that are in memory at once; their probabilities take as much again. On the CPU a tile is 16 MiB, which a
# last-level cache holds; on a GPU 128 MiB, where fewer launches count for more.
TILE_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}


def info_nce(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
    """Cross entropy of each row of x against all rows of y, where row j's positive is y_j.

      -1/N sum_j log( exp(s <x_j, y_j>) / sum_k exp(s <x_j, y_k>) )       (van den Oord et al. 2018, equation 4)

    x, y: this process's (B, D) rows, the same B on every process; half precision is taken to float32.
    logit_scale: (1,), s = 1 / temperature.
    Returns a scalar, the mean over the N rows of all processes, the same on each. Memory O(N D) and two tiles.
    Raises ValueError where the shapes do not fit.
    """
    x, y, scale = _checked(x, y, logit_scale)
    with torch.autocast(x.device.type, enabled=False):  # else the products would run in half precision
        columns = distributed.gather(y)  # (N, D)
        with_gradient = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or scale.requires_grad)
        return _ByRows.apply(x, columns, scale, with_gradient)


def symmetric_info_nce(x: Tensor, y: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Both directions of InfoNCE, (x -> y, y -> x), from one pass over the logits (Radford et al. 2021, figure 3).

    Arguments, memory and errors as in `info_nce`. Returns two scalars; CLIP's loss is half their sum.
    """
    x, y, scale = _checked(x, y, logit_scale)
    with torch.autocast(x.device.type, enabled=False):
        return _BothWays.apply(x, distributed.gather(y), scale).unbind()


def _checked(x: Tensor, y: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, y = paired_rows(x, y, "x and y")
    require(logit_scale.numel() == 1, "shape of logit_scale", tuple(logit_scale.shape), "give one number, shape (1,)")
    return x, y, logit_scale.to(x.dtype).reshape(())


class _ByRows(torch.autograd.Function):
    """Rows (B, D) against columns (N, D), scale () -> the global loss.

    A row is complete within its tile, so the forward makes the gradients too, while the logits are at hand: a backward
    that began anew would multiply rows and columns once more.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor, scale: Tensor, with_gradient: bool) -> Tensor:
        first = _first_column(rows, columns)
        tiles = _tiles(rows, columns)
        logits_memory, memory = (columns.new_empty(tiles[0].stop, len(columns)) for _ in range(2))
        scaled = rows * scale
        margins = rows.new_empty(len(rows))
        if with_gradient:
            scaled_gradient, columns_gradient = torch.empty_like(rows), torch.empty_like(columns)
        for tile in tiles:
            height = tile.stop - tile.start
            logits, positive = _logits(scaled[tile], columns, first + tile.start, logits_memory[:height])
            lse, softmax = _softmax(logits, 1, memory[:height])
            margin = torch.sub(lse, positive, out=margins[tile])
            if with_gradient:
                pull = torch.sigmoid(margin)
                logits_gradient = softmax.mul_(pull[:, None])
                logits_gradient.diagonal(first + tile.start).copy_(pull.neg_())
                torch.mm(logits_gradient, columns, out=scaled_gradient[tile])
                columns_gradient.addmm_(logits_gradient.T, scaled[tile], beta=0 if tile.start == 0 else 1)
        if with_gradient:
            ctx.save_for_backward(scaled_gradient * scale, columns_gradient, (scaled_gradient * rows).sum())
        return _global_mean(margins, len(columns))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows_gradient, columns_gradient, scale_gradient = ctx.saved_tensors
        weight = _global_weight(gradient, len(rows_gradient), len(columns_gradient))
        return rows_gradient * weight, columns_gradient * weight, scale_gradient * weight, None


class _BothWays(torch.autograd.Function):
    """Rows (B, D) against columns (N, D), scale () -> the global losses of rows and of columns, (2,)."""

    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor, scale: Tensor) -> Tensor:
        ctx.first = first = _first_column(rows, columns)
        tiles = _tiles(rows, columns)
        # A batch of a single tile keeps its probabilities for the backward. With more tiles they share their memory,
        # since fresh memory costs more than they do, and are formed anew in the backward.
        logits_memory, row_memory = (columns.new_empty(tiles[0].stop, len(columns)) for _ in range(2))
        column_memory = torch.empty_like(row_memory) if len(tiles) == 1 else row_memory
        scaled = rows * scale
        positive = rows.new_empty(len(rows))
        row_negatives = rows.new_empty(len(rows))  # log-sum-exp over the negatives of each row
        column_negatives = None  # likewise of each column, (N,), over the rows seen so far
        for tile in tiles:
            height = tile.stop - tile.start
            logits, positive[tile] = _logits(scaled[tile], columns, first + tile.start, logits_memory[:height])
            row_negatives[tile], row_softmax = _softmax(logits, 1, row_memory[:height])
            seen, column_softmax = _softmax(logits, 0, column_memory[:height])
            column_negatives = seen if column_negatives is None else torch.logaddexp(column_negatives, seen)
        kept = (row_softmax, column_softmax, column_negatives) if len(tiles) == 1 else ()

        column_negatives, positives = _join(column_negatives, positive, first)
        own = slice(first, first + len(rows))
        margins = torch.stack((row_negatives - positive, column_negatives[own] - positive))  # (2, B)
        row_lse = torch.logaddexp(row_negatives, positive)
        column_lse = torch.logaddexp(column_negatives, positives)
        ctx.save_for_backward(rows, columns, scale, margins, row_lse, column_lse, *kept)
        return _global_mean(margins, len(columns))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        rows, columns, scale, margins, row_lse, column_lse, *kept = ctx.saved_tensors
        weights = _global_weight(gradient, len(rows), len(columns))
        pulls = torch.sigmoid(margins) * weights[:, None]
        positive_gradient = -pulls.sum(0)

        scaled_gradient, columns_gradient = torch.empty_like(rows), torch.empty_like(columns)
        scaled = rows * scale
        for tile in _tiles(rows, columns):
            if kept:
                row_softmax, column_softmax, column_negatives = kept
                logits_gradient = row_softmax * pulls[0, :, None]
                logits_gradient.addcmul_(column_softmax, (column_negatives - column_lse).exp_().mul_(weights[1]))
            else:
                logits = scaled[tile] @ columns.T
                logits_gradient = torch.sub(logits, row_lse[tile, None]).exp_().mul_(weights[0])
                logits_gradient.addcmul_(logits.sub_(column_lse).exp_(), weights[1])
            # The positive is written last: it replaces whatever the lines above made of it.
            logits_gradient.diagonal(ctx.first + tile.start).copy_(positive_gradient[tile])
            torch.mm(logits_gradient, columns, out=scaled_gradient[tile])
            columns_gradient.addmm_(logits_gradient.T, scaled[tile], beta=0 if tile.start == 0 else 1)
        scale_gradient = (scaled_gradient * rows).sum()
        return scaled_gradient.mul_(scale), columns_gradient, scale_gradient


def _tiles(rows: Tensor, columns: Tensor) -> list[slice]:
    height = max(1, TILE_ELEMENTS.get(rows.device.type, TILE_ELEMENTS["cpu"]) // len(columns))
    return [slice(start, min(start + height, len(rows))) for start in range(0, len(rows), height)]


def _first_column(rows: Tensor, columns: Tensor) -> int:
    """Where among the columns this process's first positive stands."""
    return distributed.rank() * len(rows) if len(columns) > len(rows) else 0


def _logits(scaled: Tensor, columns: Tensor, diagonal: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a tile, written to `out`, with the positives taken out of their diagonal; and the positives."""
    torch.mm(scaled, columns.T, out=out)
    positive = out.diagonal(diagonal).clone()
    out.diagonal(diagonal).fill_(torch.finfo(out.dtype).min)  # not -inf: where there is no negative it would give NaN
    return out, positive


def _softmax(logits: Tensor, dim: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp along dim, and the softmax, which is written to `out`.

    The softmax at the maximum is one over the sum of the exponentials, so the sum needs no pass of its own.
    """
    torch.softmax(logits, dim, out=out)
    return logits.amax(dim) - out.amax(dim).log_(), out


def _join(negatives: Tensor, positive: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The columns' log-sum-exps over the rows of all processes, (N,), and all positives, (N,)."""
    if len(negatives) == len(positive):
        return negatives, positive
    largest = distributed.max_over_processes(negatives)
    parts = negatives.new_zeros(2, len(negatives))
    parts[0] = (negatives - largest).exp_()
    parts[1, first : first + len(positive)] = positive
    exponentials, positives = distributed.sum_over_processes(parts)
    return largest + exponentials.log_(), positives


def _global_mean(margins: Tensor, total: int) -> Tensor:
    """Mean over all N rows of log(1 + exp(margin)), of margins (..., B)."""
    own = torch.nn.functional.softplus(margins, threshold=40).sum(-1) / total  # from 40 on float64 has no more digits
    return distributed.sum_over_processes(own) if total > margins.shape[-1] else own


def _global_weight(gradient: Tensor, count: int, total: int) -> Tensor:
    """The adjoint of `_global_mean`: every process asks for the gradient of the same global value."""
    return (distributed.sum_over_processes(gradient) if total > count else gradient) / total
