"""The way to the compiled kernels: finds modstruct._C and hands it checked tensors."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from modstruct.config import require


def load_extension() -> ModuleType:
    """modstruct._C, imported at first use. Raises RuntimeError with the remedy where it is missing or broken."""
    try:
        from modstruct import _C
    except ImportError as error:
        raise RuntimeError(
            f"modstruct._C, the compiled part, cannot be imported ({error}): run `pip install -e .` in the checkout"
        ) from error
    return _C


def check_matrix(name: str, matrix: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError, naming the argument, unless `matrix` is what a kernel takes: 2-D, not empty, without gaps."""
    require(matrix.dim() == 2, name, tuple(matrix.shape), "must be 2-D, (rows, dimension)")
    require(matrix.numel() > 0, name, tuple(matrix.shape), "must hold at least one row and one dimension")
    require(matrix.dtype == dtype, name, matrix.dtype, f"must be {dtype}")
    require(matrix.device == device, name, matrix.device, f"must lie on {device}")
    require(matrix.is_contiguous(), name, matrix.stride(), "must be contiguous: call .contiguous() first")


def gaussian_potential_sums_cpu(
    rows: Tensor, columns: Tensor, t: float, with_pull: bool, instruction_set: str | None = None
) -> tuple[Tensor, Tensor]:
    """Row sums of Gaussian potentials and their pull, by the CPU kernel (csrc/pairwise.h has the formulas).

    rows: (n, D), columns: (N, D), float32, contiguous, on the CPU. t: positive. with_pull: compute the pull too.
    instruction_set: one of `load_extension().features()["cpu_here"]`; by default the fastest.
    Returns sums (n,) and pull (n, D), or (0, D) without it. Runs on torch.get_num_threads() threads, whose number
    changes no bit of the result, and lets other Python threads run meanwhile.
    """
    extension = load_extension()
    cpu = torch.device("cpu")
    check_matrix("rows", rows, torch.float32, cpu)
    check_matrix("columns", columns, torch.float32, cpu)
    require(rows.shape[1] == columns.shape[1], "columns", tuple(columns.shape), f"must be (N, {rows.shape[1]})")
    sums = rows.new_empty(rows.shape[0])
    pull = rows.new_empty(rows.shape if with_pull else (0, rows.shape[1]))
    extension.gaussian_potential_sums(
        rows=rows.data_ptr(),
        row_count=rows.shape[0],
        columns=columns.data_ptr(),
        column_count=columns.shape[0],
        dimension=rows.shape[1],
        t=t,
        sums=sums.data_ptr(),
        pull=pull.data_ptr() if with_pull else 0,
        threads=torch.get_num_threads(),
        instruction_set=instruction_set or extension.features()["cpu_here"][-1],
    )
    return sums, pull
