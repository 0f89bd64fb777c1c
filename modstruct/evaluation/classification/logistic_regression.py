"""Multinomial logistic regression by L-BFGS over rows that may exceed memory, and the search of its penalty."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from modstruct.errors import require, require_counts
from modstruct.evaluation.classification.accuracy import classes_ahead
from modstruct.evaluation.classification.features import RowBlocks

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
