"""What a probe sees of an embedded set: labelled rows of one or several embeddings side by side, read in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.rows import BLOCK_BYTES, check_rows

FLATTEST = 1e-6
"""Share of the largest deviation below which a column is constant and is not stretched."""
HELD_ON_CPU = 256 << 20
"""Bytes of finished rows that stay in the main memory; beyond, the operating system's page cache serves the file."""
HELD_SHARE_OF_DEVICE = 0.4
"""Of an accelerator's free memory that finished rows may take; a fit has two sets of them, to fit on and held out."""


@dataclass(frozen=True)
class Piece:
    """Rows of one set: arrays (m, D_1), (m, D_2), … whose columns stand side by side, and the rows taken, (n,)."""

    arrays: tuple[np.ndarray, ...]
    rows: np.ndarray

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """The rows at positions (b,) of `rows`, of each array."""
        rows = self.rows[positions]
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and np.all(np.diff(rows) == 1):
            rows = slice(rows[0], rows[-1] + 1)  # read in one go
        return tuple(np.array(array[rows], order="C") for array in self.arrays)


@dataclass(frozen=True)
class Features:
    """Labelled rows, in memory or memory-mapped; a selection costs 16 bytes a row.

    pieces: stacked below one another. labels: (n,) int64, class of each row. unit: each array's rows are divided by
    their norm (a zero row stays zero). shift, scale: (D,) float64, rows become (row - shift) scale; None leaves them.
    """

    pieces: tuple[Piece, ...]
    labels: np.ndarray
    unit: bool = False
    shift: np.ndarray | None = None
    scale: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def dimension(self) -> int:
        return sum(array.shape[1] for array in self.pieces[0].arrays)

    def read(
        self, positions: np.ndarray, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Rows at ascending positions (b,), finished, (b, D)."""
        ends = np.cumsum([len(piece.rows) for piece in self.pieces])
        bounds = np.searchsorted(positions, [0, *ends])
        found = []
        for number, piece in enumerate(self.pieces):
            mine = positions[bounds[number] : bounds[number + 1]]
            if len(mine):
                parts = piece.read(mine - (ends[number] - len(piece.rows)))
                # In the precision of the file to the device, which is the shorter way.
                found.append(self._finished([torch.from_numpy(p).to(device).to(dtype) for p in parts]))
        return torch.cat(found) if found else torch.empty(0, self.dimension, device=device, dtype=dtype)

    def _finished(self, parts: list[Tensor]) -> Tensor:
        if self.unit:
            parts = [part / part.norm(dim=1, keepdim=True).clamp(min=1e-12) for part in parts]
        rows = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self.shift is not None:
            rows = (rows - torch.from_numpy(self.shift).to(rows)) * torch.from_numpy(self.scale).to(rows)
        return rows

    def take(self, positions: np.ndarray) -> Features:
        """The rows at positions (k,), in ascending order."""
        positions = np.sort(positions)
        pieces, first = [], 0
        for piece in self.pieces:
            mine = positions[(positions >= first) & (positions < first + len(piece.rows))] - first
            pieces.append(replace(piece, rows=piece.rows[mine]))
            first += len(piece.rows)
        return replace(self, pieces=tuple(pieces), labels=self.labels[positions])

    def stacked(self, below: Features) -> Features:
        """These rows and those of `below`, which must be of the same arrays and finished in the same way."""
        labels = np.concatenate([self.labels, below.labels])
        return replace(self, pieces=(*self.pieces, *below.pieces), labels=labels)

    def standardised_by(self, statistics: tuple[np.ndarray, np.ndarray]) -> Features:
        """Columns shifted and scaled by what `column_statistics` found, of these or of other rows."""
        shift, deviation = statistics
        flat = deviation <= FLATTEST * deviation.max()
        return replace(self, shift=shift, scale=1 / np.where(flat, 1.0, deviation))


def select_features(embedded: EmbeddedSet, arrays: str, labels: np.ndarray, unit: bool = False) -> Features:
    """The labelled rows of a set.

    arrays: an image embedding of the set, such as "image_features" (before the projection), "image" (shared) or
    "image_independent", or several joined by "+", side by side. labels: (n,) int64, one for each row of the set; rows
    with -1 are left out. unit: divide each array's rows by their norm.
    Raises ValueError, naming set and array, for an array that is missing, named twice, of another number of rows, or
    not finite.
    """
    names = [name.strip() for name in arrays.split("+")]
    require(len(set(names)) == len(names), "features", arrays, "name each embedding once")
    found = tuple(embedded.rows(name) for name in names)
    for name, rows in zip(names, found, strict=True):
        require(
            len(rows) == len(labels),
            "features",
            arrays,
            f"{embedded.name} has {len(rows)} rows of {name} and {len(labels)} labels: name embeddings of images",
        )
        check_rows(f"{embedded.name}'s {name}", rows)
    rows = np.flatnonzero(labels >= 0)
    return Features((Piece(found, rows),), np.asarray(labels, dtype=np.int64)[rows], unit)


class RowBlocks:
    """Features as blocks on a device, kept there where they are small enough, else read anew each time.

    dtype: of the blocks. width: the most numbers that a reader makes of a row (scores, say); with the dimension it
    sets how many rows a block has. hold_bytes: what may be kept, by default 256 MiB on a CPU and 40 % of an
    accelerator's free memory.
    """

    def __init__(
        self,
        features: Features,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        width: int = 1,
        hold_bytes: int | None = None,
    ):
        self.features, self.device, self.dtype = features, device, dtype
        self._at_once = max(1, BLOCK_BYTES // (dtype.itemsize * max(features.dimension, width)))
        if hold_bytes is None:
            on_gpu = device.type == "cuda"
            hold_bytes = HELD_SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0] if on_gpu else HELD_ON_CPU
        self._holds = len(features) * features.dimension * dtype.itemsize <= hold_bytes
        self._held: list[tuple[slice, Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self.features)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (place, rows (b, D), labels (b,) int64) from the first row to the last."""
        if self._held:
            yield from self._held
            return
        read = []
        for start in range(0, len(self), self._at_once):
            place = slice(start, min(start + self._at_once, len(self)))
            rows = self.features.read(np.arange(place.start, place.stop), self.device, self.dtype)
            block = place, rows, torch.from_numpy(self.features.labels[place]).to(self.device)
            if self._holds:
                read.append(block)
            yield block
        self._held = read


def column_statistics(features: Features, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each column, (D,) float64, in one pass (Chan, Golub & LeVeque 1983)."""
    count, mean, squares = 0, 0.0, 0.0
    for _, rows, _ in RowBlocks(features, device, hold_bytes=0):
        rows = rows.double()
        added, block_mean = len(rows), rows.mean(0)
        apart = block_mean - mean
        squares = squares + (rows - block_mean).square().sum(0) + apart.square() * (count * added / (count + added))
        count += added
        mean = mean + apart * (added / count)
    return mean.cpu().numpy(), (squares / count).sqrt().cpu().numpy()


def paired_blocks(
    fitted: Features, others: Features, standardize: bool, width: int, device: torch.device, dtype: torch.dtype
) -> tuple[RowBlocks, RowBlocks]:
    """Blocks of rows to fit on and of others, both standardised by the first where that is wanted."""
    pair = fitted, others
    if standardize:
        statistics = column_statistics(fitted, device)
        pair = tuple(features.standardised_by(statistics) for features in pair)
    return tuple(RowBlocks(features, device, dtype, width) for features in pair)
