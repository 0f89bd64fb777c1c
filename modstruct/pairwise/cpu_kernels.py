"""The operators of the pairwise terms by the compiled CPU kernels (csrc/cpu/pairwise_cpu.h has the formulas).

Arguments and results are those of torch_tiles, in float32. Products are always formed in float32,
whatever `precision` says. Kernels run on torch.get_num_threads() threads, whose number changes no bit of a result, and
let other Python threads run meanwhile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from modstruct.errors import require
from modstruct.pairwise.global_batch import check_pairs, steady_sum, times_scale
from modstruct.pairwise.operators import check_array, load_extension

Arguments = dict[str, Tensor | float | None]
CPU = torch.device("cpu")
KEPT_BYTES = 2**29
"""Of logits that the forward leaves to the backward, which saves it one product of three; the plain form keeps several
arrays of them. Enough for 11,000 rows against as many."""


def contrastive_statistics(
    x: Tensor, y: Tensor, scale: Tensor, first: int, precision: str, keep: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = _pairs(x, y) | _positives(x, y, first, scale=scale)
    row_lse, column_lse, positive = x.new_empty(len(x)), y.new_empty(len(y)), x.new_empty(len(x))
    logits = x.new_empty(kept_logits(x, y) if keep else 0)
    found: Arguments = {"row_lse": row_lse, "column_lse": column_lse, "positive": positive, "logits": logits}
    _run(load_extension().cpu_contrastive_statistics, **pairs, **found)
    return row_lse, column_lse, positive, logits


def kept_logits(x: Tensor, y: Tensor) -> int:
    """How many numbers `contrastive_statistics` keeps for `contrastive_grad`: 0 where they do not fit in KEPT_BYTES."""
    count: int = load_extension().cpu_kept_logits(len(x), len(y))
    return count if 4 * count <= KEPT_BYTES else 0


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
    pairs = _pairs(x, y) | _positives(x, y, first, scale=scale)
    check_array("row_values", row_values, (3, len(x)), torch.float32, CPU)
    check_array("column_values", column_values, (2, len(y)), torch.float32, CPU)
    if logits is not None and len(logits):
        check_array("logits", logits, (kept_logits(x, y),), torch.float32, CPU)
    x_grad, y_grad = _zero_grads(x, y, "all")
    _run(
        load_extension().cpu_contrastive_grad,
        **pairs,
        row_values=row_values,
        column_values=column_values,
        logits=logits,
        x_grad=x_grad,
        y_grad=y_grad,
    )
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
    pairs = _pairs(x, columns) | _positives(x, columns, first, scale=scale)
    if x_momentum is not None:
        check_array("x_momentum", x_momentum, tuple(x.shape), torch.float32, CPU)
    losses = x.new_empty(len(x))
    x_grad, y_grad = _zero_grads(x, columns, grads)
    _run(
        load_extension().cpu_row_contrast,
        **pairs,
        momentum=x_momentum,
        alpha=alpha,
        losses=losses,
        x_grad=x_grad,
        y_grad=y_grad,
    )
    return steady_sum(losses), x_grad, y_grad


def sigmoid_contrast(
    x: Tensor, columns: Tensor, affine: Tensor, first: int, grads: str, precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = _pairs(x, columns) | _positives(x, columns, first, affine=affine)
    totals = torch.empty(2, dtype=torch.float64)
    x_grad, y_grad = _zero_grads(x, columns, grads)
    _run(load_extension().cpu_sigmoid_contrast, **pairs, totals=totals, x_grad=x_grad, y_grad=y_grad)
    return totals[0].clone(), x_grad, y_grad, totals[1].clone()


def gaussian_potential_sum(
    x: Tensor, y: Tensor | None, t: float, with_grad: bool, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    columns = x if y is None else y
    pairs = _pairs(x, columns)
    total = torch.empty((), dtype=torch.float64)
    x_grad, y_grad = _zero_grads(x, columns, "none" if not with_grad else "rows" if y is None else "all")
    _run(
        load_extension().cpu_gaussian_potential,
        **pairs,
        symmetric=y is None,
        t=t,
        total=total,
        x_grad=x_grad,
        y_grad=y_grad,
    )
    return total, x_grad, y_grad


def geometric_products(a: Tensor, b: Tensor, centers: Tensor, precision: str) -> Tensor:
    rows = _combined(a, b, centers)
    products = a.new_empty(2, a.shape[1], a.shape[1])
    _run(load_extension().cpu_geometric_products, **rows, products=products)
    return products


def geometric_grad(a: Tensor, b: Tensor, centers: Tensor, weights: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    rows = _combined(a, b, centers)
    check_array("weights", weights, (2, a.shape[1], a.shape[1]), torch.float32, CPU)
    a_grad, b_grad = torch.empty_like(a), torch.empty_like(b)
    _run(load_extension().cpu_geometric_grad, **rows, weights=weights, a_grad=a_grad, b_grad=b_grad)
    return a_grad, b_grad


def nearest_counts(
    queries: Tensor, gallery: Tensor, pair_query: Tensor, pair_gallery: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    pairs = _pairs(queries, gallery)
    for name, indices in (("pair_query", pair_query), ("pair_gallery", pair_gallery)):
        check_array(name, indices, (len(pair_query),), torch.int64, CPU)
    check_pairs(queries, gallery, pair_query, pair_gallery)
    above, ties = torch.empty_like(pair_query), torch.empty_like(pair_query)
    of_pairs: Arguments = {"query": pair_query, "item": pair_gallery, "count": len(pair_query)}
    _run(load_extension().cpu_nearest_counts, **pairs, **of_pairs, above=above, ties=ties)
    return above, ties


@functools.cache
def instruction_set() -> str:
    """The fastest that this build holds and this machine runs."""
    return load_extension().features()["cpu_here"][-1]


def _run(kernel: Callable[..., None], **arguments: Tensor | float | None) -> None:
    """Call a kernel of the extension, which takes tensors by their address, 0 where there is none or it has no rows."""

    def handed_over(value: Tensor | float | None) -> float:
        if isinstance(value, Tensor):
            return value.data_ptr() if value.numel() else 0
        return 0 if value is None else value

    given = {name: handed_over(value) for name, value in arguments.items()}
    kernel(**given, threads=torch.get_num_threads(), instruction_set=instruction_set())


def _pairs(x: Tensor, y: Tensor) -> Arguments:
    """The arguments that every kernel over pairs takes, checked."""
    for name, matrix in (("x", x), ("y", y)):
        require(matrix.dim() == 2, name, tuple(matrix.shape), "must be 2-D, (rows, dimension)")
        check_array(name, matrix, (len(matrix), x.shape[1]), torch.float32, CPU)
    return {"x": x, "y": y, "rows": len(x), "columns": len(y), "dimension": x.shape[1]}


def _positives(x: Tensor, y: Tensor, first: int, **numbers: Tensor) -> Arguments:
    """Scale and the column of the first positive, checked; scale (1,), or affine (2,)."""
    for name, values in numbers.items():
        check_array(name, values, (1 if name == "scale" else 2,), torch.float32, CPU)
    last = len(y) - len(x)
    require(0 <= first <= last, "first", first, f"must be from 0 to {last}, so that each row's positive is a column")
    return {**numbers, "first": first}


def _combined(a: Tensor, b: Tensor, centers: Tensor) -> Arguments:
    """The arguments that both geometric kernels take, checked."""
    require(a.dim() == 2, "a", tuple(a.shape), "must be 2-D, (rows, dimension)")
    for name, matrix in (("a", a), ("b", b)):
        check_array(name, matrix, tuple(a.shape), torch.float32, CPU)
    check_array("centers", centers, (3, a.shape[1]), torch.float32, CPU)
    return {"a": a, "b": b, "centers": centers, "rows": len(a), "dimension": a.shape[1]}


def _zero_grads(x: Tensor, y: Tensor, grads: str) -> tuple[Tensor, Tensor]:
    """(B, D), unless "none" are wanted, and (N, D), if "all" are; else with no rows."""
    x_grad = x.new_zeros(0 if grads == "none" else len(x), x.shape[1])
    return x_grad, y.new_zeros(len(y) if grads == "all" else 0, x.shape[1])
