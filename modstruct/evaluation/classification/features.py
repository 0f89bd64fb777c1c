"""What probes see: labelled rows of embedded sets, checked against each other, drawn class by class, read in blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from modstruct.errors import refuse, require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.rows import BLOCK_BYTES, check_rows

FLATTEST = 1e-6
"""Share of the largest deviation below which a column counts as constant and is not scaled."""
HELD_ON_CPU = 256 << 20
"""Bytes of prepared rows kept in host memory; beyond that, the page cache serves the file."""
HELD_SHARE_OF_DEVICE = 0.4
"""Of an accelerator's free memory that prepared rows may take; a fit has two sets of them, to fit on and held out."""


@dataclass(frozen=True)
class Piece:
    """Rows of one set: arrays (m, D_1), (m, D_2), … that are concatenated by columns, and the selected rows, (n,)."""

    arrays: tuple[np.ndarray, ...]
    rows: np.ndarray

    def read(self, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """The rows at positions (b,) of `rows`, of each array."""
        rows = self.rows[positions]
        contiguous = len(rows) and rows[-1] - rows[0] == len(rows) - 1 and np.all(np.diff(rows) == 1)
        chosen = slice(rows[0], rows[-1] + 1) if contiguous else rows
        return tuple(np.array(array[chosen], order="C") for array in self.arrays)


@dataclass(frozen=True)
class Features:
    """Labelled rows, in memory or memory-mapped; a selection costs 16 bytes a row.

    pieces: concatenated by rows. labels: (n,) int64, class of each row. unit: divide each array's rows by their norm
    (a zero row stays zero). shift, scale: (D,) float64, rows become (row - shift) scale; None leaves them as they are.
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
        """Prepared rows at ascending positions (b,): (b, D)."""
        ends = np.cumsum([len(piece.rows) for piece in self.pieces])
        bounds = np.searchsorted(positions, [0, *ends])
        found = []
        for number, piece in enumerate(self.pieces):
            mine = positions[bounds[number] : bounds[number + 1]]
            if len(mine):
                parts = piece.read(mine - (ends[number] - len(piece.rows)))
                # Copied to the device in the precision of the file, which moves fewer bytes.
                found.append(self._prepared([torch.from_numpy(p).to(device).to(dtype) for p in parts]))
        return torch.cat(found) if found else torch.empty(0, self.dimension, device=device, dtype=dtype)

    def _prepared(self, parts: list[Tensor]) -> Tensor:
        if self.unit:
            parts = [part / part.norm(dim=1, keepdim=True).clamp(min=1e-12) for part in parts]
        rows = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self.shift is not None and self.scale is not None:
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
        """These rows and then those of `below`, which must be of the same arrays and prepared in the same way."""
        labels = np.concatenate([self.labels, below.labels])
        return replace(self, pieces=(*self.pieces, *below.pieces), labels=labels)

    def standardised_by(self, statistics: tuple[np.ndarray, np.ndarray]) -> Features:
        """Columns shifted and scaled by the `column_statistics` of these or of other rows."""
        shift, deviation = statistics
        flat = deviation <= FLATTEST * deviation.max()
        return replace(self, shift=shift, scale=1 / np.where(flat, 1.0, deviation))


def select_features(embedded: EmbeddedSet, arrays: str, labels: np.ndarray, unit: bool = False) -> Features:
    """The labelled rows of a set.

    arrays: an image embedding of the set, such as "image_features" (before the projection), "image" (shared) or
    "image_independent", or several joined by "+", concatenated. labels: (n,) int64, one for each row of the set; rows
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
    """Features as blocks on a device, kept there if they are small enough, else read again in each pass.

    dtype: of the blocks. width: the most numbers that a reader computes for a row (scores, say); with the dimension it
    sets the rows of a block. hold_bytes: what may be kept, by default 256 MiB on a CPU and 40 % of an accelerator's
    free memory.
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
        limit: float = HELD_ON_CPU if hold_bytes is None else hold_bytes
        if hold_bytes is None and device.type == "cuda":
            limit = HELD_SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]
        self._holds = len(features) * features.dimension * dtype.itemsize <= limit
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
    count = 0
    mean = squares = torch.zeros(features.dimension, dtype=torch.float64, device=device)
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
    """Blocks of rows to fit on and of other rows; standardize: both by the statistics of the first."""
    if standardize:
        statistics = column_statistics(fitted, device)
        fitted, others = fitted.standardised_by(statistics), others.standardised_by(statistics)
    return RowBlocks(fitted, device, dtype, width), RowBlocks(others, device, dtype, width)


@dataclass(frozen=True)
class ProbeInputs:
    """Features whose labels number the classes that have a training row. names: of those classes."""

    names: list[str]
    train: Features
    test: Features
    validation: Features | None
    train_keys: list[str]
    validation_keys: list[str]

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def rows(self) -> dict[str, int]:
        """Labelled rows of each set."""
        rows = {"train": len(self.train), "test": len(self.test)}
        return rows if self.validation is None else rows | {"validation": len(self.validation)}


def probe_inputs(
    train: EmbeddedSet, test: EmbeddedSet, validation: EmbeddedSet | None, features: str, unit: bool
) -> ProbeInputs:
    """Select the features of all sets, checked against each other before anything is fitted.

    Rows without a label are left out; so are classes without a training row, which no other set may have. Raises
    ValueError naming the set: no labels, other classes, a class without a training row, fewer than two classes, another
    model, another dimension, rows that are not finite.
    """
    sets = {"train": train, "test": test} | ({"validation": validation} if validation is not None else {})
    for role, embedded in sets.items():
        _check_against(train, embedded, role)
    labels = {role: np.asarray(embedded.labels) for role, embedded in sets.items()}
    known = np.unique(labels["train"][labels["train"] >= 0])
    if len(known) < 2:
        refuse("train", train.name, f"has images of {len(known)} of its classes: give images of at least two")
    place = np.full(len(train.class_names) + 1, -1, dtype=np.int64)  # the last entry is for label -1
    place[known] = np.arange(len(known))
    selected = {}
    for role, embedded in sets.items():
        lost = np.setdiff1d(labels[role][labels[role] >= 0], known)
        if len(lost):
            refuse(
                role,
                embedded.name,
                f"has images of {train.class_names[lost[0]]!r}, of which {train.name} has none to learn from "
                f"({len(lost)} such classes): add some, or take the class out of {embedded.name}",
            )
        selected[role] = select_features(embedded, features, place[labels[role]], unit)
        require(
            selected[role].dimension == selected["train"].dimension,
            role,
            embedded.name,
            f"has {selected[role].dimension} columns of {features}, {train.name} has {selected['train'].dimension}: "
            "embed both with one model",
        )
    keys = {role: embedded.keys for role, embedded in sets.items() if role != "test"}
    return ProbeInputs(
        [train.class_names[c] for c in known],
        selected["train"],
        selected["test"],
        selected.get("validation"),
        _labelled(keys["train"], labels["train"]),
        _labelled(keys["validation"], labels["validation"]) if validation is not None else [],
    )


def _check_against(train: EmbeddedSet, embedded: EmbeddedSet, role: str) -> None:
    if embedded.labels is None or not np.any(embedded.labels >= 0):
        refuse(role, embedded.name, "has no labelled image: probes take sets with classes")
    if embedded.model.get("fingerprint") != train.model.get("fingerprint"):
        refuse(
            role,
            embedded.name,
            f"is of the model {embedded.model.get('name')!r} ({embedded.model.get('fingerprint')}), {train.name} of "
            f"{train.model.get('name')!r} ({train.model.get('fingerprint')}): embed both with one model",
        )
    if embedded.class_names != train.class_names:
        pairs = zip(embedded.class_names, train.class_names, strict=False)
        shorter = min(len(embedded.class_names), len(train.class_names))
        first = next((number for number, (a, b) in enumerate(pairs) if a != b), shorter)
        refuse(
            role,
            embedded.name,
            f"has {len(embedded.class_names)} classes and {train.name} {len(train.class_names)}, and they differ from "
            f"class {first} on: give sets of the same classes in the same order",
        )


def _labelled(keys: list[str], labels: np.ndarray) -> list[str]:
    return [keys[row] for row in np.flatnonzero(labels >= 0)]


def drawn_order(labels: np.ndarray, keys: Sequence[str], seed: int, draw: int = 0) -> list[np.ndarray]:
    """Positions of each class's rows in random order, one array for each class that occurs, ascending by class.

    labels: (n,) int64. keys: of the n rows. The order is that of a 64-bit hash of seed, draw and key, so it does not
    depend on the model, row numbers or unreadable rows, and comparisons are paired; the first k of a class are among
    its first k + 1. Rows with the same key follow each other.
    """
    prefix = hashlib.blake2b(f"{seed}/{draw}/".encode(), digest_size=8)
    hashes = np.empty(len(labels), dtype=np.uint64)
    for place, key in enumerate(keys):
        hashed = prefix.copy()
        hashed.update(key.encode("utf-8", "surrogatepass"))
        hashes[place] = int.from_bytes(hashed.digest(), "little")
    order = np.lexsort((hashes, labels))
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def hold_out(order: Sequence[np.ndarray], share: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions to fit on and positions held out, both ascending.

    The share of each class, rounded, is held out, at least one row of a class of two or more and never all of them; a
    single row is fitted on. Raises ValueError if nothing can be held out.
    """
    counts = [min(max(1, round(share * len(places))), len(places) - 1) for places in order]
    require(any(counts), "validation", None, "every class has a single row, none can be held out: fix `strength`")
    held_out = np.concatenate([places[:count] for places, count in zip(order, counts, strict=True)])
    kept = np.concatenate([places[count:] for places, count in zip(order, counts, strict=True)])
    return np.sort(kept), np.sort(held_out)
