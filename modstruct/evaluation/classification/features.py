"""Labelled rows of embeddings that a linear classifier is fitted on: in memory or in a file, read in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modstruct.evaluation.retrieval.rows import BLOCK_BYTES

FLATTEST = 1e-6
"""Share of the largest deviation below which a column counts as constant and is not scaled."""
HELD_ON_CPU = 256 << 20
"""Bytes of prepared rows kept in host memory; beyond that, the page cache serves the file."""
HELD_SHARE_OF_DEVICE = 0.4
"""Of an accelerator's free memory that prepared rows may take; a fit has two sets of them, to fit on and held out."""


@dataclass(frozen=True)
class Features:
    """Labelled rows, in memory or memory-mapped; a selection costs 16 bytes a row.

    arrays: (N, D_1), (N, D_2), …, concatenated by columns. rows: (n,), the selected ones. labels: (n,) int64, class of
    each. unit: divide each array's rows by their norm (a zero row stays zero). shift, scale: (D,) float64,
    rows become (row - shift) scale.
    """

    arrays: tuple[np.ndarray, ...]
    rows: np.ndarray
    labels: np.ndarray
    unit: bool = False
    shift: np.ndarray | None = None
    scale: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dimension(self) -> int:
        return sum(array.shape[1] for array in self.arrays)

    def read(self, positions: np.ndarray | slice, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Prepared rows at positions (b,): (b, D)."""
        rows = self.rows[positions]
        contiguous = len(rows) > 0 and bool((np.diff(rows) == 1).all())
        chosen = slice(rows[0], rows[-1] + 1) if contiguous else rows
        # Copied to the device in the precision of the file, which moves fewer bytes.
        parts = [torch.from_numpy(np.array(a[chosen], order="C")).to(device).to(dtype) for a in self.arrays]
        if self.unit:
            parts = [part / part.norm(dim=1, keepdim=True).clamp(min=1e-12) for part in parts]
        prepared = torch.cat(parts, dim=1)
        if self.shift is None or self.scale is None:
            return prepared
        return (prepared - torch.from_numpy(self.shift).to(prepared)) * torch.from_numpy(self.scale).to(prepared)

    def take(self, positions: np.ndarray) -> Features:
        """The rows at positions (k,), in ascending order."""
        positions = np.sort(positions)
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def standardised_by(self, statistics: tuple[np.ndarray, np.ndarray]) -> Features:
        """Columns shifted and scaled by the `column_statistics` of these or of other rows."""
        shift, deviation = statistics
        flat = deviation <= FLATTEST * deviation.max()
        return replace(self, shift=shift, scale=1 / np.where(flat, 1.0, deviation))


class RowBlocks:
    """Features as blocks on a device, kept there if they are small enough, else read again in each pass.

    features: one or more of one dimension, whose rows follow each other. width: the most numbers that a reader computes
    for a row (scores, say); with the dimension it sets the rows of a block. hold_bytes: what may be kept, by default
    256 MiB on a CPU and 40 % of an accelerator's free memory.
    """

    def __init__(
        self,
        features: Features | Sequence[Features],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        width: int = 1,
        hold_bytes: float | None = None,
    ):
        self.features = [features] if isinstance(features, Features) else list(features)
        self.device, self.dtype, self.dimension = device, dtype, self.features[0].dimension
        step = max(1, BLOCK_BYTES // (dtype.itemsize * max(self.dimension, width)))
        self._blocks = [(f, slice(i, min(i + step, len(f)))) for f in self.features for i in range(0, len(f), step)]
        if hold_bytes is None:
            cuda = device.type == "cuda"
            hold_bytes = HELD_SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0] if cuda else HELD_ON_CPU
        self._holds = len(self) * self.dimension * dtype.itemsize <= hold_bytes
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.features))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (place, rows (b, D), labels (b,) int64) from the first row to the last."""
        first = 0
        for number, (features, part) in enumerate(self._blocks):
            block = self._held.get(number)
            if block is None:
                labels = torch.from_numpy(features.labels[part]).to(self.device)
                block = features.read(part, self.device, self.dtype), labels
            if self._holds:
                self._held[number] = block
            yield slice(first, first + len(block[1])), *block
            first += len(block[1])


def column_statistics(features: Features | Sequence[Features], device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each column, (D,) float64, in two passes."""
    blocks, none = RowBlocks(features, device), torch.zeros((), dtype=torch.float64)
    mean = sum((rows.double().sum(0) for _, rows, _ in blocks), none) / len(blocks)
    squares = sum(((rows.double() - mean).square().sum(0) for _, rows, _ in blocks), none)
    return mean.cpu().numpy(), (squares / len(blocks)).sqrt().cpu().numpy()
