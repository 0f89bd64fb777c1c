"""Multinomial logistic regression by L-BFGS over rows that may exceed memory, and the search of its penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from modstruct.errors import require, require_counts
from modstruct.evaluation.classification.accuracy import classes_ahead
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


CORRECTIONS = 10
"""Pairs of steps and gradients that L-BFGS keeps, as in scikit-learn."""
STEPS_PER_DECADE = 8
STRENGTHS = 10.0 ** (np.arange(12 * STEPS_PER_DECADE + 1) / STEPS_PER_DECADE - 6)


@dataclass(frozen=True)
class FitConfig:
    """When a fit ends, and in which precision rows are read."""

    max_iterations: int = 1000
    """As in CLIP."""
    gradient_tolerance: float = 1e-4
    """Largest entry of the gradient of the mean loss at which a fit has converged: scikit-learn's `tol`."""
    precision: Literal["float32", "float64"] = "float32"
    """Of rows, scores and a block's sums; sums over blocks and the weights are float64."""

    def __post_init__(self) -> None:
        require_counts("fit", self, ("max_iterations",))
        require(self.gradient_tolerance > 0, "fit.gradient_tolerance", self.gradient_tolerance, "above 0")

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


@dataclass(frozen=True)
class LinearClassifier:
    """Scores x W^T + b of each class. weight: (C, D), bias: (C,), float64. iterations: of the fit.

    end: "converged" by the gradient's tolerance, "stalled" if the objective falls no further at the precision of the
    blocks, "iterations" if they ran out, or "epochs" of the AdamW probe.
    """

    weight: np.ndarray
    bias: np.ndarray
    iterations: int = 0
    end: str = "converged"

    def scores(self, blocks: RowBlocks) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (place, scores (b, C), labels (b,)) of each block, in its precision."""
        weight, bias = (torch.from_numpy(v).to(blocks.device, blocks.dtype) for v in (self.weight, self.bias))
        for place, rows, labels in blocks:
            yield place, torch.addmm(bias, rows, weight.T), labels

    def ahead(self, blocks: RowBlocks) -> tuple[np.ndarray, float]:
        """`classes_ahead` of each row, (n,) int64, and the mean cross-entropy."""
        ahead, loss = np.empty(len(blocks), dtype=np.int64), 0.0
        for place, scores, labels in self.scores(blocks):
            ahead[place] = classes_ahead(scores, labels).cpu().numpy()
            own = scores.gather(1, labels[:, None])
            loss += float((scores.logsumexp(1, keepdim=True) - own).sum(dtype=torch.float64))
        return ahead, loss / len(blocks)


def fit_logistic_regression(
    blocks: RowBlocks, classes: int, strength: float, config: FitConfig, start: LinearClassifier | None = None
) -> LinearClassifier:
    """The minimum of sum_i CE_i + strength / 2 |W|^2 over the weights; the bias is not penalised.

    strength: lambda in CLIP's appendix, equal to scikit-learn's `LogisticRegression(C=1 / strength)`. Two classes still
    have a row of weights each, where scikit-learn has one for both: its C is then 2 / strength. start: initial weights,
    by default zero. The sum divided by the number of rows is minimised, by scipy's L-BFGS-B with the stopping rules of
    scikit-learn, which itself needs all rows in memory and knows no GPU. Memory: 40 times the C (D + 1) weights of 8
    bytes, two blocks, and what RowBlocks holds. Raises ValueError for a strength that is not above 0: without a
    penalty, separable classes have no minimum.
    """
    require(0 < strength < float("inf"), "strength", strength, "above 0 and finite")
    shape = (classes, blocks.dimension + 1)
    first = np.zeros(shape) if start is None else np.column_stack([start.weight, start.bias])
    most, tolerance = config.max_iterations, config.gradient_tolerance
    limits = {"maxiter": most, "maxfun": 50 * most, "maxls": 50}
    options = limits | {"maxcor": CORRECTIONS, "gtol": tolerance, "ftol": 64 * np.finfo(np.float64).eps}
    objective = mean_objective(blocks, classes, strength)
    found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    ended = "iterations" if found.status == 1 else "stalled"
    end = "converged" if np.abs(found.jac).max() <= tolerance else ended
    weights = found.x.reshape(shape)
    return LinearClassifier(weights[:, :-1].copy(), weights[:, -1].copy(), int(found.nit), end)


def mean_objective(
    blocks: RowBlocks, classes: int, strength: float
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """(1/n) (sum_i CE_i + strength / 2 |W|^2) and its gradient, of weights (C (D + 1),) float64, class by class, bias
    last. Scores are in the blocks' precision, sums over blocks in float64. Cost: 4 n C D operations."""

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(classes, blocks.dimension + 1).to(blocks.device)
        weight, bias = weights[:, :-1].to(blocks.dtype), weights[:, -1].to(blocks.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=blocks.device)
        gradient = torch.zeros_like(weights)
        for _, rows, labels in blocks:
            scores = torch.addmm(bias, rows, weight.T)  # (b, C)
            normaliser = scores.logsumexp(1, keepdim=True)
            loss += (normaliser - scores.gather(1, labels[:, None])).sum(dtype=torch.float64)
            residual = scores.sub_(normaliser).exp_()
            residual[torch.arange(len(labels)), labels] -= 1
            gradient[:, :-1] += residual.T @ rows
            gradient[:, -1] += residual.sum(0, dtype=torch.float64)
        gradient[:, :-1] += strength * weights[:, :-1]
        value = (loss + strength / 2 * weights[:, :-1].square().sum()) / len(blocks)
        return float(value), (gradient / len(blocks)).flatten().cpu().numpy()

    return value_and_gradient


def search_strength(
    score: Callable[[Sequence[float]], list[tuple[float, float]]],
) -> tuple[float, dict[float, tuple[float, float]]]:
    """CLIP's search of the strength (Radford et al. 2021, A.3): halve the interval around the peak, down to 1/8 decade.

    score: strengths -> (accuracy, loss) of each on held-out rows, called for seven that are two decades apart, then
    four times for those around the peak. Returns the chosen strength, and the scores by strength, ascending. Of equal
    accuracies (CLIP's text does not say) the one with the least loss wins, and of those the strongest.
    """
    tried: dict[float, tuple[float, float]] = {}
    step = 2 * STEPS_PER_DECADE
    places = list(range(0, len(STRENGTHS), step))
    while step:
        strengths = [float(s) for s in STRENGTHS[places] if s not in tried]
        tried |= zip(strengths, score(strengths), strict=True)
        best = max(tried, key=lambda strength: (tried[strength][0], -tried[strength][1], strength))
        step, peak = step // 2, int(np.searchsorted(STRENGTHS, best))
        places = [place for place in (peak - step, peak + step) if 0 <= place < len(STRENGTHS)]
    return best, dict(sorted(tried.items()))
