"""The local pairwise terms by the compiled CPU kernels (csrc/cpu/pairwise_cpu.h has the formulas).

All arrays are float32, contiguous, on the CPU; x: (B, D), y: (N, D). A CPU always multiplies in float32, the most that
`precision` can ask for. Kernels run on torch.get_num_threads() threads, whose number changes no bit of a result, and
let other Python threads run meanwhile. Nothing here is differentiable: the operators are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct.errors import require
from modstruct.pairwise.extension import check_array, load_extension

CPU = torch.device("cpu")


def contrastive_statistics(
    x: Tensor, y: Tensor, scale: Tensor, first: int, precision: str = "float32", instruction_set: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps without the positives along rows (B,) and columns (N,), and the positives' logits (B,)."""
    row_lse, column_lse, positive = x.new_empty(len(x)), y.new_empty(len(y)), x.new_empty(len(x))
    load_extension().cpu_contrastive_statistics(
        **_pairs(x, y, instruction_set),
        **_positives(x, y, scale, first),
        row_lse=row_lse.data_ptr(),
        column_lse=column_lse.data_ptr(),
        positive=positive.data_ptr(),
    )
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
    precision: str = "float32",
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """W y (B, D) and W^T x (N, D), where W is the gradient with respect to the logits."""
    pairs = _pairs(x, y, instruction_set)
    rows = {"row_lse": row_lse, "row_weight": row_weight, "positive_weight": positive_weight}
    columns = {"column_lse": column_lse, "column_weight": column_weight}
    for vectors, length in ((rows, len(x)), (columns, len(y))):
        for name, vector in vectors.items():
            check_array(name, vector, (length,), torch.float32, CPU)
    x_pull, y_pull = torch.zeros_like(x), torch.zeros_like(y)
    load_extension().cpu_contrastive_pulls(
        **pairs,
        **_positives(x, y, scale, first),
        **{name: vector.data_ptr() for name, vector in (rows | columns).items()},
        x_pull=x_pull.data_ptr(),
        y_pull=y_pull.data_ptr(),
    )
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
    precision: str = "float32",
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's cross entropy (B,), its pull (B, D) and the columns' (N, D), the last two with no rows if unwanted."""
    pairs = _pairs(x, columns, instruction_set)
    if x_momentum is not None:
        check_array("x_momentum", x_momentum, tuple(x.shape), torch.float32, CPU)
    losses = x.new_empty(len(x))
    x_pull = torch.zeros_like(x) if with_pull else x.new_zeros(0, x.shape[1])
    column_pull = torch.zeros_like(columns) if with_column_pull else x.new_zeros(0, x.shape[1])
    load_extension().cpu_row_contrast(
        **pairs,
        **_positives(x, columns, scale, first),
        momentum=0 if x_momentum is None else x_momentum.data_ptr(),
        alpha=alpha,
        losses=losses.data_ptr(),
        x_pull=x_pull.data_ptr() if with_pull else 0,
        y_pull=column_pull.data_ptr() if with_column_pull else 0,
    )
    return losses, x_pull, column_pull


def gaussian_potential(
    x: Tensor,
    y: Tensor | None,
    t: float,
    with_pull: bool,
    precision: str = "float32",
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of potentials () in float64, pulls of x (B, D) and y (N, D), with no rows if unwanted or y is None."""
    pairs = _pairs(x, x if y is None else y, instruction_set)
    total = torch.empty((), dtype=torch.float64)
    x_pull = torch.zeros_like(x) if with_pull else x.new_zeros(0, x.shape[1])
    y_pull = torch.zeros_like(y) if with_pull and y is not None else x.new_zeros(0, x.shape[1])
    load_extension().cpu_gaussian_potential(
        **pairs,
        symmetric=y is None,
        t=t,
        total=total.data_ptr(),
        x_pull=x_pull.data_ptr() if len(x_pull) else 0,
        y_pull=y_pull.data_ptr() if len(y_pull) else 0,
    )
    return total, x_pull, y_pull


def geometric_products(
    a: Tensor, b: Tensor, centers: Tensor, precision: str = "float32", instruction_set: str | None = None
) -> tuple[Tensor, Tensor]:
    """P^T P and M^T M, both (D, D), of P = (a - c_a) + (b - c_b) and M = (a - b) - c_d, (B, D), never held whole.

    centers: (3, D), c_a, c_b and c_d.
    """
    rows = _combined(a, b, centers, instruction_set)
    plus, minus = (a.new_empty(a.shape[1], a.shape[1]) for _ in range(2))
    load_extension().cpu_geometric_products(**rows, plus=plus.data_ptr(), minus=minus.data_ptr())
    return plus, minus


def geometric_pulls(
    a: Tensor,
    b: Tensor,
    centers: Tensor,
    plus_weights: Tensor,
    minus_weights: Tensor,
    precision: str = "float32",
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """P plus_weights + M minus_weights and P plus_weights - M minus_weights, both (B, D), P and M as above."""
    rows = _combined(a, b, centers, instruction_set)
    for name, weights in (("plus_weights", plus_weights), ("minus_weights", minus_weights)):
        check_array(name, weights, (a.shape[1], a.shape[1]), torch.float32, CPU)
    a_pull, b_pull = torch.empty_like(a), torch.empty_like(b)
    load_extension().cpu_geometric_pulls(
        **rows,
        plus_weights=plus_weights.data_ptr(),
        minus_weights=minus_weights.data_ptr(),
        a_pull=a_pull.data_ptr(),
        b_pull=b_pull.data_ptr(),
    )
    return a_pull, b_pull


def nearest_counts(
    queries: Tensor,
    gallery: Tensor,
    pair_query: Tensor,
    pair_gallery: Tensor,
    precision: str = "float32",
    instruction_set: str | None = None,
) -> tuple[Tensor, Tensor]:
    """For each pair, the gallery items above it and the others that tie with it, both (p,) int64."""
    pairs = _pairs(queries, gallery, instruction_set)
    for name, indices in (("pair_query", pair_query), ("pair_gallery", pair_gallery)):
        check_array(name, indices, (len(pair_query),), torch.int64, CPU)
    above, ties = torch.empty_like(pair_query), torch.empty_like(pair_query)
    load_extension().cpu_nearest_counts(
        **pairs,
        query=pair_query.data_ptr(),
        item=pair_gallery.data_ptr(),
        count=len(pair_query),
        above=above.data_ptr(),
        ties=ties.data_ptr(),
    )
    return above, ties


def _pairs(x: Tensor, y: Tensor, instruction_set: str | None) -> dict[str, object]:
    """The arguments that every kernel over pairs takes."""
    for name, matrix in (("x", x), ("y", y)):
        require(matrix.dim() == 2, name, tuple(matrix.shape), "must be 2-D, (rows, dimension)")
        check_array(name, matrix, (len(matrix), x.shape[1]), torch.float32, CPU)
    sizes = {"rows": len(x), "columns": len(y), "dimension": x.shape[1]}
    return {"x": x.data_ptr(), "y": y.data_ptr(), **sizes, **_execution(instruction_set)}


def _combined(a: Tensor, b: Tensor, centers: Tensor, instruction_set: str | None) -> dict[str, object]:
    """The arguments that both geometric kernels take."""
    require(a.dim() == 2, "a", tuple(a.shape), "must be 2-D, (rows, dimension)")
    for name, matrix in (("a", a), ("b", b)):
        check_array(name, matrix, tuple(a.shape), torch.float32, CPU)
    check_array("centers", centers, (3, a.shape[1]), torch.float32, CPU)
    addresses = {"a": a.data_ptr(), "b": b.data_ptr(), "centers": centers.data_ptr()}
    return {**addresses, "rows": len(a), "dimension": a.shape[1], **_execution(instruction_set)}


def _execution(instruction_set: str | None) -> dict[str, object]:
    """torch's number of threads, and the fastest instruction set unless one is named."""
    return {
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set or load_extension().features()["cpu_here"][-1],
    }


def _positives(x: Tensor, y: Tensor, scale: Tensor, first: int) -> dict[str, int]:
    check_array("scale", scale, (1,), torch.float32, CPU)
    last = len(y) - len(x)
    require(0 <= first <= last, "first", first, f"must be from 0 to {last}, so that each row's positive is a column")
    return {"scale": scale.data_ptr(), "first": first}
