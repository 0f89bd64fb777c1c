"""The local pairwise terms on the GPU: csrc/cuda's kernels for tiles of all pairs, torch's products for the pulls.

The functions that every backend has; csrc/cuda/pairwise_cuda.h says what the kernels compute. Rows are taken in
panels: a panel's weights, (panel rows, N), are in memory at once, and two plain products with them make the pulls. So
the pulls run at the rate of torch's products, and workspace grows as (B + N) D. The host reads nothing from the device.

x: (B, D) this process's rows. y or columns: (N, D). first: the column that is row 0's positive. scale: (1,) float32.
S_jk = scale <x_j, y_k>. precision: "float32", "tf32" or "bf16", of products; sums over pairs are float32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct.pairwise.cuda_panels import Operand, Panels, add_product, address, kernels, on_device
from modstruct.pairwise.global_batch import softplus
from modstruct.pairwise.torch_tiles import combinations

GEOMETRIC_ROWS = 65_536  # rows of a + b and a - b that are in memory at once


def contrastive_statistics(
    x: Tensor, y: Tensor, scale: Tensor, first: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of S over the negatives, of rows (B,) and of columns (N,), and the positive logits (B,)."""
    with on_device(x) as stream:
        panels = Panels(Operand.of(x, precision), Operand.of(y, precision), stream)
        column_lse = panels.workspace(len(y))
        row_lse, positive = _statistics(panels, scale, first, column_lse)
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
    precision: str,
) -> tuple[Tensor, Tensor]:
    """W y (B, D) and W^T x (N, D).

    W_jk = row_weight_j exp(S_jk - row_lse_j) + column_weight_k exp(S_jk - column_lse_k), positive_weight_j at the
    positive. The lse and weights are vectors of B and N.
    """
    with on_device(x) as stream:
        panels = Panels(Operand.of(x, precision), Operand.of(y, precision), stream)
        x_pull, y_pull = panels.zeros(*x.shape), panels.zeros(*y.shape)
        row_lse, row_weight = row_lse.contiguous(), row_weight.contiguous()
        column_lse, column_weight = column_lse.contiguous(), column_weight.contiguous()
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
            panels.pull(weights, start, stop, x_pull, y_pull)
        _add_positives(x, y, first, positive_weight, x_pull, y_pull)
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
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy of each row with the targets alpha P + (1 - alpha) onehot, P the softmax of scale <x_momentum, c>.

    Without x_momentum, (B, D), the target is the one-hot, whatever alpha is.
    Returns losses (B,), W c (B, D) or (0, D), W^T x (N, D) or (0, D) for W the gradient of the losses in S.
    """
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

        x_pull = panels.zeros(len(x) if with_pull else 0, x.shape[1])
        column_pull = panels.zeros(len(columns) if with_column_pull else 0, x.shape[1])
        if not (with_pull or with_column_pull):
            return losses, x_pull, column_pull
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
            panels.pull(weights, start, stop, x_pull, column_pull)
        _add_positives(x, columns, first, positive_weight, x_pull, column_pull)
        return losses, x_pull, column_pull


def gaussian_potential(
    x: Tensor, y: Tensor | None, t: float, with_pull: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of G_jk = exp(-t |x_j - y_k|^2), and the pulls sum_k G_jk (y_k - x_j) and sum_j G_jk (x_j - y_k).

    y None: all pairs of x with itself, j = k included, and no second pull. What lies left of a panel is then not
    computed: what lies right of it serves its rows and its columns.
    Returns a float64 scalar, (B, D) or (0, D), (N, D) or (0, D).
    """
    own = y is None
    with on_device(x) as stream:
        # Taking the mean off changes no distance, and keeps the digits where all vectors lie in a narrow cone.
        center = (x if own else y).mean(0, dtype=torch.float64).float()
        rows = Operand.of(x - center, precision)
        columns = rows if own else Operand.of(y - center, precision)
        panels = Panels(rows, columns, stream)
        row_norms = _squared_norms(rows, stream)
        column_norms = row_norms if own else _squared_norms(columns, stream)
        total = panels.zeros(dtype=torch.float64)
        x_pull = panels.zeros(len(x) if with_pull else 0, x.shape[1])
        y_pull = panels.zeros(len(columns) if with_pull and not own else 0, x.shape[1])
        row_others = panels.zeros(len(rows), dtype=torch.float64)  # sums of weights
        column_others = row_others if own else panels.zeros(len(columns), dtype=torch.float64)
        weights = panels.weights() if with_pull else None
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
                weights=address(weights) if with_pull else 0,
                weights_stride=weights.stride(0) if with_pull else 0,
                tile_sums=address(tile_sums),
                row_partials=address(row_partials),
                column_partials=address(column_partials),
            )
            if with_pull and not own:
                panels.pull(weights, start, stop, x_pull, y_pull)
            elif with_pull:
                panel = weights[: stop - start, : len(columns) - left]
                add_product(x_pull[start:stop], panel, columns.values[left:], precision)
                if stop < len(rows):
                    add_product(x_pull[stop:], panel[:, stop - start :].T, rows.values[start:stop], precision)
        if with_pull:
            x_pull.addcmul_(row_others.float()[:, None], rows.values.float(), value=-1)
        if with_pull and not own:
            y_pull.addcmul_(column_others.float()[:, None], columns.values.float(), value=-1)
        return total, x_pull, y_pull


def geometric_products(a: Tensor, b: Tensor, centers: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """P^T P and M^T M, both (D, D), of P = (a - c_a) + (b - c_b) and M = (a - b) - c_d; centers: (3, D).

    Products of matrices are all there is to it.
    """
    with on_device(a):
        width = a.shape[1]
        products = [torch.zeros(width, width, device=a.device) for _ in range(2)]
        for a_rows, b_rows in zip(a.split(GEOMETRIC_ROWS), b.split(GEOMETRIC_ROWS), strict=True):
            for out, combined in zip(products, combinations(a_rows, b_rows, centers), strict=True):
                rows = Operand.of(combined, precision).values
                add_product(out, rows.T, rows, precision)
        return tuple(products)


def geometric_pulls(
    a: Tensor, b: Tensor, centers: Tensor, plus_weights: Tensor, minus_weights: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """P plus_weights + M minus_weights and P plus_weights - M minus_weights, both (B, D), P and M as above."""
    with on_device(a):
        a_pull, b_pull = torch.empty_like(a), torch.empty_like(b)
        weights = [Operand.of(w, precision).values for w in (plus_weights, minus_weights)]
        for start in range(0, len(a), GEOMETRIC_ROWS):
            rows = slice(start, start + GEOMETRIC_ROWS)
            plus_pull, minus_pull = torch.zeros_like(a[rows]), torch.zeros_like(a[rows])
            plus, minus = combinations(a[rows], b[rows], centers)
            add_product(plus_pull, Operand.of(plus, precision).values, weights[0], precision)
            add_product(minus_pull, Operand.of(minus, precision).values, weights[1], precision)
            torch.add(plus_pull, minus_pull, out=a_pull[rows])
            torch.sub(plus_pull, minus_pull, out=b_pull[rows])
        return a_pull, b_pull


def nearest_counts(
    queries: Tensor, gallery: Tensor, pair_query: Tensor, pair_gallery: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """For each pair, the gallery items that score above its own with its query, and the others that score the same.

    queries: (q, D), gallery: (g, D); pair_query (ascending) and pair_gallery: (p,) int64. Returns two (p,) int64.
    A pair whose score is NaN has all g above; an item whose score is NaN counts as above any other pair.
    """
    with on_device(queries) as stream:
        panels = Panels(Operand.of(queries, precision), Operand.of(gallery, precision), stream)
        pairs = len(pair_query)
        above, ties = (panels.zeros(pairs, dtype=torch.int32) for _ in range(2))
        if pairs == 0:
            return above.long(), ties.long()
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
            column_lse=address(column_lse) if with_columns else 0,
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


def _add_positives(x: Tensor, columns: Tensor, first: int, weight: Tensor, x_pull: Tensor, column_pull: Tensor) -> None:
    """The positives' part of the pulls, which the panels leave out: it is the largest and stays float32 throughout."""
    own = slice(first, first + len(x))
    if len(x_pull) > 0:
        x_pull.addcmul_(weight[:, None], columns[own])
    if len(column_pull) > 0:
        column_pull[own].addcmul_(weight[:, None], x)


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
