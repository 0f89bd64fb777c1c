"""The rows that one process brings to the global batch: checked and counted."""

from __future__ import annotations

import torch
from torch import Tensor

from modstruct import distributed
from modstruct.errors import require

ROWS_AT_ONCE = 4096


def checked_rows(**matrices: Tensor) -> list[Tensor]:
    """What kernels take of (rows, D) matrices: contiguous, half precision taken to float32; float64 stays, for checks.

    All on one device, of one dtype and one D. Raises ValueError, by the name of the argument, where one is not.
    """
    first_name, first = next(iter(matrices.items()))
    for name, matrix in matrices.items():
        require(isinstance(matrix, Tensor), name, type(matrix).__name__, "give a tensor (rows, D)")
        require(matrix.dim() == 2, f"shape of {name}", tuple(matrix.shape), "must be 2-D, (rows, D)")
        require(matrix.numel() > 0, f"shape of {name}", tuple(matrix.shape), "must hold at least one row and dimension")
        require(matrix.is_floating_point(), f"dtype of {name}", matrix.dtype, "must be floating point")
        for what, value, needed in (
            ("width", matrix.shape[1], first.shape[1]),
            ("dtype", matrix.dtype, first.dtype),
            ("device", matrix.device, first.device),
        ):
            require(value == needed, f"{what} of {name}", value, f"must be {needed}, that of {first_name}")
    return [matrix.to(torch.promote_types(matrix.dtype, torch.float32)).contiguous() for matrix in matrices.values()]


def paired_rows(**matrices: Tensor) -> list[Tensor]:
    """`checked_rows` of matrices that have as many rows, row j of each belonging to pair j."""
    require_same_shape(**matrices)
    return checked_rows(**matrices)


def require_same_shape(**matrices: Tensor) -> None:
    first_name, first = next(iter(matrices.items()))
    for name, matrix in matrices.items():
        remedy = f"must be {tuple(first.shape)}, that of {first_name}"
        require(matrix.shape == first.shape, f"shape of {name}", tuple(matrix.shape), remedy)


def checked_number(x: Tensor, **named: Tensor) -> Tensor:
    """One named number as (1,), of the dtype of x. Raises ValueError where it is not one number on the device of x."""
    ((name, number),) = named.items()
    require(isinstance(number, Tensor), name, number, "give a tensor, shape (1,)")
    require(number.numel() == 1, f"shape of {name}", tuple(number.shape), "give one number, shape (1,)")
    require(number.is_floating_point(), f"dtype of {name}", number.dtype, "must be floating point")
    require(number.device == x.device, f"device of {name}", number.device, f"must be {x.device}")
    return number.to(x.dtype).reshape(1)


def require_constant(**tensors: Tensor) -> None:
    """Refuse tensors that require a gradient where the term has none for them."""
    for name, tensor in tensors.items():
        constant = not (torch.is_grad_enabled() and tensor.requires_grad)
        require(constant, f"{name}.requires_grad", True, "no gradient reaches it: give it detached, as .detach()")


def check_pairs(queries: Tensor, gallery: Tensor, pair_query: Tensor, pair_gallery: Tensor) -> None:
    """Raise ValueError unless the indices are of rows of queries and of gallery. One read from the device.

    Called by the kernels, inside an operator: torch.compile could not trace it.
    """
    limits = torch.stack([limit for indices in (pair_query, pair_gallery) for limit in indices.aminmax()]).tolist()
    for (low, high), name, rows in ((limits[:2], "queries", queries), (limits[2:], "gallery", gallery)):
        require(low >= 0 and high < len(rows), "positives", (low, high), f"row of {name}: from 0 to {len(rows) - 1}")


def global_rows(rows: Tensor) -> int:
    """N, the rows of all processes together; every process brings the same number, (B, ...)."""
    return len(rows) * distributed.world_size()


def times_scale(x: Tensor, x_grad: Tensor, y_grad: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, y and scale, (1,), from W y and W^T x, which are overwritten; W: that of S = scale x y^T."""
    scale_grad = sum_of_products(x_grad, x)
    return x_grad.mul_(scale), y_grad.mul_(scale), scale_grad


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """sum_jd a_jd b_jd, as (1,), without an array of the size of a; its bits do not depend on the number of threads."""
    if len(a) <= ROWS_AT_ONCE:  # spares a small batch the operators that put the blocks together
        rows = (a * b).sum(1)
    else:
        blocks = zip(a.split(ROWS_AT_ONCE), b.split(ROWS_AT_ONCE), strict=True)
        rows = torch.cat([(p * q).sum(1) for p, q in blocks])
    return steady_sum(rows.double()).to(a.dtype).reshape(1)


def steady_sum(values: Tensor) -> Tensor:
    """Sum of (n,) to a scalar whose bits do not depend on the number of threads, as torch's do from 32,768 on."""
    if len(values) <= ROWS_AT_ONCE:
        return values.sum()
    return torch.stack([part.sum() for part in values.split(ROWS_AT_ONCE)]).sum()


def softplus(margin: Tensor) -> Tensor:
    """log(1 + exp(margin)); from 40 on it is the margin, to the last digit of float64."""
    return torch.nn.functional.softplus(margin, threshold=40)
