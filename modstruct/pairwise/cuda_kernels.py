"""The operators of the pairwise terms on the GPU: csrc/cuda's kernels for tiles, torch's products for the gradients.

Arguments and results are those of torch_tiles, in float32; csrc/cuda/pairwise_cuda.h says what the kernels compute.
Rows are taken in panels: a panel's weights, (panel rows, N), are in memory at once, and two plain products with them
make the gradients. So those run at the rate of torch's products, and workspace grows as (B + N) D. The host reads
nothing from the device, except that `nearest_counts` checks its indices. Sums over pairs are float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct.pairwise.cuda_panels import Operand, Panels, add_product, address, kernels, on_device
from modstruct.pairwise.global_batch import check_pairs, softplus, steady_sum, times_scale
from modstruct.pairwise.torch_tiles import combinations

GEOMETRIC_ROWS = 65_536  # rows of a + b and a - b that are in memory at once


def contrastive_statistics(
    x: Tensor, y: Tensor, scale: Tensor, first: int, precision: str, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device(x) as stream:
        panels = Panels(Operand.of(x, precision), Operand.of(y, precision), stream)
        column_lse = panels.workspace(len(y))
        row_lse, positive = _statistics(panels, scale, first, column_lse)
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
    with on_device(x) as stream:
        panels = Panels(Operand.of(x, precision), Operand.of(y, precision), stream)
        x_grad, y_grad = panels.zeros(*x.shape), panels.zeros(*y.shape)
        row_lse, row_weight, positive_weight = row_values.contiguous()
        column_lse, column_weight = column_values.contiguous()
        weights = panels.weights()
        for start, stop in panels:
            kernels().cuda_contrastive_weights(
                **panels.arguments(start, stop, scale, first),
                row_lse=address(row_lse, start),
                row_weight=address(row_weight, start),
                column_lse=address(column_lse),
                column_weight=address(column_weight),
                weights=address(weights),
                weights_stride=weights.stride(0),
            )
            panels.add_grads(weights, start, stop, x_grad, y_grad)
        _add_positives(x, y, first, positive_weight, x_grad, y_grad)
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
    with on_device(x) as stream:
        panels = Panels(Operand.of(x, precision), Operand.of(columns, precision), stream)
        momentum = None if x_momentum is None else Operand.of(x_momentum, precision)
        # Sums are over negatives alone and the positive joins here, so that no 1 - p cancels.
        if momentum is None:
            row_lse, positive = _statistics(panels, scale, first, None)
        else:
            positive = _positives(panels.rows, panels.columns, scale, first)
            row_lse, momentum_lse, gap = _momentum_statistics(panels, momentum, scale, first, positive)
        margin = row_lse - positive
        losses = softplus(margin)
        row_weight = torch.sigmoid(margin)
        positive_weight = -row_weight
        if momentum is not None:
            momentum_weight = alpha * torch.sigmoid(momentum_lse - _positives(momentum, panels.columns, scale, first))
            losses = losses + momentum_weight * gap
            positive_weight = momentum_weight - row_weight

        x_grad, column_grad = panels.zero_grads(grads)
        if grads == "none":
            return steady_sum(losses), x_grad, column_grad
        weights = panels.weights()
        for start, stop in panels:
            arguments = panels.arguments(start, stop, scale, first) | {
                "row_lse": address(row_lse, start),
                "row_weight": address(row_weight, start),
                "weights": address(weights),
                "weights_stride": weights.stride(0),
            }
            if momentum is None:
                kernels().cuda_contrastive_weights(**arguments, column_lse=0, column_weight=0)
            else:
                kernels().cuda_momentum_weights(
                    **arguments,
                    momentum_rows=momentum.address(start),
                    momentum_lse=address(momentum_lse, start),
                    momentum_weight=address(momentum_weight, start),
                )
            panels.add_grads(weights, start, stop, x_grad, column_grad)
        _add_positives(x, columns, first, positive_weight, x_grad, column_grad)
        return steady_sum(losses), x_grad, column_grad


def sigmoid_contrast(
    x: Tensor, columns: Tensor, affine: Tensor, first: int, grads: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with on_device(x) as stream:
        panels = Panels(Operand.of(x, precision), Operand.of(columns, precision), stream)
        affine = affine.contiguous()
        # The kernels leave the positives out: their gradients are the largest, and stay float32 throughout.
        margin = -(_positives(panels.rows, panels.columns, affine[:1], first) + affine[1])
        positive_weight = -torch.sigmoid(margin)
        totals = panels.zeros(2, dtype=torch.float64)
        tile_sums = panels.workspace(panels.row_tiles() * panels.column_tiles(), 2, dtype=torch.float64)
        x_grad, column_grad = panels.zero_grads(grads)
        weights = None if grads == "none" else panels.weights()
        for start, stop in panels:
            kernels().cuda_sigmoid_weights(
                **panels.arguments(start, stop, affine, first),
                bias=address(affine, 1),
                totals=address(totals),
                weights=address(weights),
                weights_stride=0 if weights is None else weights.stride(0),
                tile_sums=address(tile_sums),
            )
            if weights is not None:
                panels.add_grads(weights, start, stop, x_grad, column_grad)
        _add_positives(x, columns, first, positive_weight, x_grad, column_grad)
        of_positives = [steady_sum(values.double()) for values in (softplus(margin), positive_weight)]
        return totals[0] + of_positives[0], x_grad, column_grad, totals[1] + of_positives[1]


def gaussian_potential_sum(
    x: Tensor, y: Tensor | None, t: float, with_grad: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    # Without y, tiles left of a panel are skipped: those right of it count for their rows and their columns.
    own = y is None
    with on_device(x) as stream:
        # Subtracting the mean changes no distance, and keeps the digits where all vectors lie in a narrow cone.
        center = (x if y is None else y).mean(0, dtype=torch.float64).float()
        rows = Operand.of(x - center, precision)
        columns = rows if y is None else Operand.of(y - center, precision)
        panels = Panels(rows, columns, stream)
        row_norms = _squared_norms(rows, stream)
        column_norms = row_norms if own else _squared_norms(columns, stream)
        total = panels.zeros(dtype=torch.float64)
        x_grad, y_grad = panels.zero_grads("none" if not with_grad else "rows" if own else "all")
        row_others = panels.zeros(len(rows), dtype=torch.float64)  # sums of weights
        column_others = row_others if own else panels.zeros(len(columns), dtype=torch.float64)
        weights = panels.weights() if with_grad else None
        tile_sums = panels.workspace(panels.row_tiles() * panels.column_tiles(), dtype=torch.float64)
        row_partials = panels.workspace(panels.column_tiles(), panels.height)
        column_partials = panels.workspace(panels.row_tiles(), len(columns))
        for start, stop in panels:
            left = start if own else 0
            kernels().cuda_gaussian_potential(
                **panels.arguments(start, stop, left=left),
                own=own,
                row_norms=address(row_norms, start),
                column_norms=address(column_norms, left),
                t=t,
                total=address(total),
                row_others=address(row_others, start),
                column_others=address(column_others, left),
                weights=address(weights),
                weights_stride=0 if weights is None else weights.stride(0),
                tile_sums=address(tile_sums),
                row_partials=address(row_partials),
                column_partials=address(column_partials),
            )
            if weights is None:
                continue
            if not own:
                panels.add_grads(weights, start, stop, x_grad, y_grad)
                continue
            panel = weights[: stop - start, : len(columns) - left]
            add_product(x_grad[start:stop], panel, columns.values[left:], precision)
            if stop < len(rows):
                add_product(x_grad[stop:], panel[:, stop - start :].T, rows.values[start:stop], precision)
        if with_grad:
            x_grad.addcmul_(row_others.float()[:, None], rows.values.float(), value=-1)
        if with_grad and not own:
            y_grad.addcmul_(column_others.float()[:, None], columns.values.float(), value=-1)
        return total, x_grad, y_grad


def geometric_products(a: Tensor, b: Tensor, centers: Tensor, precision: str) -> Tensor:
    with on_device(a):
        products = torch.zeros(2, a.shape[1], a.shape[1], device=a.device)
        for a_rows, b_rows in zip(a.split(GEOMETRIC_ROWS), b.split(GEOMETRIC_ROWS), strict=True):
            for out, combined in zip(products, combinations(a_rows, b_rows, centers), strict=True):
                rows = Operand.of(combined, precision).values
                add_product(out, rows.T, rows, precision)
        return products


def geometric_grad(a: Tensor, b: Tensor, centers: Tensor, weights: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    with on_device(a):
        a_grad, b_grad = torch.empty_like(a), torch.empty_like(b)
        plus_weights, minus_weights = (Operand.of(w, precision).values for w in weights)
        for start in range(0, len(a), GEOMETRIC_ROWS):
            rows = slice(start, start + GEOMETRIC_ROWS)
            plus_grad, minus_grad = torch.zeros_like(a[rows]), torch.zeros_like(a[rows])
            plus, minus = combinations(a[rows], b[rows], centers)
            add_product(plus_grad, Operand.of(plus, precision).values, plus_weights, precision)
            add_product(minus_grad, Operand.of(minus, precision).values, minus_weights, precision)
            torch.add(plus_grad, minus_grad, out=a_grad[rows])
            torch.sub(plus_grad, minus_grad, out=b_grad[rows])
        return a_grad, b_grad


def nearest_counts(
    queries: Tensor, gallery: Tensor, pair_query: Tensor, pair_gallery: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    check_pairs(queries, gallery, pair_query, pair_gallery)
    with on_device(queries) as stream:
        panels = Panels(Operand.of(queries, precision), Operand.of(gallery, precision), stream)
        pairs = len(pair_query)
        above, ties = (panels.zeros(pairs, dtype=torch.int32) for _ in range(2))
        pair_query, pair_gallery = pair_query.contiguous(), pair_gallery.contiguous()
        offsets = torch.searchsorted(pair_query, torch.arange(len(queries) + 1, device=pair_query.device))
        scores = panels.workspace(pairs)
        arguments = panels.arguments(0, len(queries))
        kernels().cuda_pair_scores(
            **{name: arguments[name] for name in ("rows", "columns", "row_bytes", "precision", "stream")},
            pair_query=address(pair_query),
            pair_gallery=address(pair_gallery),
            pair_count=pairs,
            scores=address(scores),
        )
        for start, stop in panels:
            kernels().cuda_nearest_counts(
                **panels.arguments(start, stop),
                pair_offsets=address(offsets, start),
                pair_gallery=address(pair_gallery),
                scores=address(scores),
                above=address(above),
                ties=address(ties),
            )
        return above.long(), ties.long()


def _statistics(panels: Panels, scale: Tensor, first: int, column_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of the rows' negatives and the positive logits, (B,); fills column_lse (N,) unless it is None."""
    row_lse, positive = panels.workspace(len(panels.rows)), panels.workspace(len(panels.rows))
    row_partials = panels.workspace(panels.column_tiles(), panels.height, 2)
    with_columns = column_lse is not None
    column_partials = panels.workspace(panels.row_tiles() if with_columns else 0, len(panels.columns), 2)
    column_running = panels.workspace(len(panels.columns) if with_columns else 0, 2)
    for start, stop in panels:
        kernels().cuda_contrastive_statistics(
            **panels.arguments(start, stop, scale, first),
            row_lse=address(row_lse, start),
            positive=address(positive, start),
            column_lse=address(column_lse),
            row_partials=address(row_partials),
            column_partials=address(column_partials),
            column_running=address(column_running),
            first_panel=start == 0,
            last_panel=stop == len(panels.rows),
        )
    return row_lse, positive


def _momentum_statistics(
    panels: Panels, momentum: Operand, scale: Tensor, first: int, positive: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of the negatives of both products, and the mean of positive - S under the second's weights; (B,)."""
    row_lse, momentum_lse, gap = (panels.workspace(len(panels.rows)) for _ in range(3))
    partials = panels.workspace(panels.column_tiles("narrow_tile_columns"), panels.height, 2)
    momentum_partials = panels.workspace(panels.column_tiles("narrow_tile_columns"), panels.height, 3)
    for start, stop in panels:
        kernels().cuda_momentum_statistics(
            **panels.arguments(start, stop, scale, first),
            momentum_rows=momentum.address(start),
            positive=address(positive, start),
            row_lse=address(row_lse, start),
            momentum_lse=address(momentum_lse, start),
            gap=address(gap, start),
            partials=address(partials),
            momentum_partials=address(momentum_partials),
        )
    return row_lse, momentum_lse, gap


def _positives(rows: Operand, columns: Operand, scale: Tensor, first: int) -> Tensor:
    """The positive logits (B,), of the rounded vectors."""
    own = columns.values[first : first + len(rows)].float()
    return scale * (rows.values.float() * own).sum(1)


def _add_positives(x: Tensor, columns: Tensor, first: int, weight: Tensor, x_grad: Tensor, column_grad: Tensor) -> None:
    """The positives' part of the gradients, which the panels leave out: it is the largest and stays in float32."""
    own = slice(first, first + len(x))
    if len(x_grad) > 0:
        x_grad.addcmul_(weight[:, None], columns[own])
    if len(column_grad) > 0:
        column_grad[own].addcmul_(weight[:, None], x)


def _squared_norms(operand: Operand, stream: int) -> Tensor:
    norms = torch.empty(len(operand), dtype=torch.float32, device=operand.padded.device)
    kernels().cuda_squared_norms(
        rows=operand.address(),
        row_count=len(operand),
        row_bytes=operand.row_bytes,
        norms=address(norms),
        precision=operand.precision,
        stream=stream,
    )
    return norms
