"""What the pairwise terms on the GPU share: operands as kernels read them, panels of rows, products with weights.

Everything that only a GPU can do is in `on_device` and `add_product`; tests replace both, and the kernels, to run the
rest on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from modstruct.pairwise.operators import load_extension

PANEL_STEP = 256  # a multiple of both sides of a tile: what lies right of a panel begins with a tile of its own
FEWEST_PANEL_ROWS, MOST_PANEL_ROWS = 512, 4096
PANEL_BYTES_PER_COLUMN = 8  # times the dimension: a panel of weights is as large as two float32 copies of the columns


def kernels() -> ModuleType:
    """The module that holds the kernels."""
    return load_extension()


@contextmanager
def on_device(x: Tensor) -> Iterator[int]:
    """Kernels inside run on x's device; gives its current stream as a number."""
    with torch.cuda.device(x.device), torch.no_grad():
        yield torch.cuda.current_stream(x.device).cuda_stream


def add_product(out: Tensor, a: Tensor, b: Tensor, precision: str) -> None:
    """out += a b, summed in float32. out: float32; a, b: in the dtype of the precision."""
    if precision == "bf16":
        if _adds_to_float32(out.device):
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            out += torch.mm(a, b, out_dtype=torch.float32)
        return
    matmul = torch.backends.cuda.matmul
    before, wanted = matmul.fp32_precision, "tf32" if precision == "tf32" else "ieee"
    if before == wanted:  # left alone, it goes on following torch's common setting
        out.addmm_(a, b)
        return
    matmul.fp32_precision = wanted
    try:
        out.addmm_(a, b)
    finally:
        matmul.fp32_precision = before


@functools.cache
def _adds_to_float32(device: torch.device) -> bool:
    """Whether this torch adds a product of bfloat16 matrices to a float32 one; older ones want all three alike."""
    a, out = torch.zeros(16, 16, dtype=torch.bfloat16, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True)
class Operand:
    """Rows or columns as the kernels read them: rounded to the precision, rows padded with zeros."""

    padded: Tensor  # (n, D and padding)
    dimension: int
    precision: str

    @classmethod
    def of(cls, x: Tensor, precision: str) -> Operand:
        """x: (n, D), any strides; copied unless it is float32 and fits as it is."""
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        step = kernels().cuda_sizes()["depth_bytes"] // dtype.itemsize
        width = -(-x.shape[1] // step) * step
        values = _round_to_tf32(x.float()) if precision == "tf32" else x
        if values.dtype == dtype and width == x.shape[1] and values.is_contiguous() and values.data_ptr() % 16 == 0:
            return cls(values, width, precision)
        padded = x.new_empty((len(x), width), dtype=dtype)
        padded[:, : x.shape[1]] = values
        padded[:, x.shape[1] :] = 0
        return cls(padded, x.shape[1], precision)

    def __len__(self) -> int:
        return len(self.padded)

    @property
    def values(self) -> Tensor:
        """(n, D), a view."""
        return self.padded[:, : self.dimension]

    @property
    def row_bytes(self) -> int:
        return self.padded.shape[1] * self.padded.element_size()

    def address(self, row: int = 0) -> int:
        return self.padded.data_ptr() + row * self.row_bytes


def _round_to_tf32(x: Tensor) -> Tensor:
    """To the 10 bits behind the point that a tensor core reads of a float32, ties away from zero as cvt.rna.tf32."""
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x)


def address(vector: Tensor | None, start: int = 0) -> int:
    """Of element `start` of a contiguous vector; 0 where there is none."""
    return 0 if vector is None else vector.data_ptr() + start * vector.element_size()


def panel_rows(dimension: int, precision: str) -> int:
    """Rows in a panel. More make the products with its weights faster: each reads and writes all of y_grad."""
    rows = PANEL_BYTES_PER_COLUMN * dimension // (2 if precision == "bf16" else 4)
    return min(max(-(-rows // PANEL_STEP) * PANEL_STEP, FEWEST_PANEL_ROWS), MOST_PANEL_ROWS)


@dataclass(frozen=True)
class Panels:
    """The rows of one operand, a panel at a time, against all columns of another."""

    rows: Operand
    columns: Operand
    stream: int

    @property
    def height(self) -> int:
        return min(panel_rows(self.rows.dimension, self.rows.precision), len(self.rows))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First row and end of each panel."""
        for start in range(0, len(self.rows), self.height):
            yield start, min(start + self.height, len(self.rows))

    def arguments(self, start: int, stop: int, scale: Tensor | None = None, first: int = 0, left: int = 0) -> dict:
        """A panel as all kernels take it; columns from `left` on."""
        return {
            "rows": self.rows.address(start),
            "row_count": stop - start,
            "columns": self.columns.address(left),
            "column_count": len(self.columns) - left,
            "row_bytes": self.rows.row_bytes,
            "first": first + start,
            "scale": 0 if scale is None else scale.data_ptr(),
            "precision": self.rows.precision,
            "stream": self.stream,
        }

    def row_tiles(self) -> int:
        return -(-self.height // kernels().cuda_sizes()["tile_rows"])

    def column_tiles(self, width: str = "tile_columns") -> int:
        return -(-len(self.columns) // kernels().cuda_sizes()[width])

    def workspace(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.rows.padded.device)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.rows.padded.device)

    def weights(self) -> Tensor:
        """Memory for a panel's weights, (height, N and padding)."""
        step = kernels().cuda_sizes()["store_bytes"] // self.rows.padded.element_size()
        return self.workspace(self.height, -(-len(self.columns) // step) * step, dtype=self.rows.padded.dtype)

    def zero_grads(self, grads: str) -> tuple[Tensor, Tensor]:
        """Zeros (B, D) unless `grads` is "none", and (N, D) if it is "all"; else with no rows."""
        width = self.rows.dimension
        x_grad = self.zeros(0 if grads == "none" else len(self.rows), width)
        return x_grad, self.zeros(len(self.columns) if grads == "all" else 0, width)

    def add_grads(self, weights: Tensor, start: int, stop: int, x_grad: Tensor, y_grad: Tensor) -> None:
        """x_grad += W y and y_grad += W^T x of a panel's weights; a gradient without rows is not wanted."""
        panel = weights[: stop - start, : len(self.columns)]
        if len(x_grad) > 0:
            add_product(x_grad[start:stop], panel, self.columns.values, self.rows.precision)
        if len(y_grad) > 0:
            add_product(y_grad, panel.T, self.rows.values[start:stop], self.rows.precision)
