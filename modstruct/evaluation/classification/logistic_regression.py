"""Multinomial logistic regression by L-BFGS, over rows that may be larger than memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from modstruct.errors import require, require_counts
from modstruct.evaluation.classification.features import RowBlocks

CORRECTIONS = 10
"""Pairs of steps and gradients that L-BFGS remembers: scikit-learn's number."""
RELATIVE_TOLERANCE = 64 * float(np.finfo(np.float64).eps)
"""Of the objective from one step to the next: scikit-learn's."""
LINE_SEARCH_STEPS = 50


@dataclass(frozen=True)
class FitConfig:
    """When a fit ends, and in which precision rows are read."""

    max_iterations: int = 1000
    """Of a fit at most; CLIP's number."""
    gradient_tolerance: float = 1e-4
    """Largest entry of the gradient of the mean loss at which a fit has converged: scikit-learn's `tol`."""
    precision: Literal["float32", "float64"] = "float32"
    """Of rows, scores and a block's sums; sums over blocks and the weights are float64."""
    warm_starts: bool = False
    """Begin each fit of a search where that of the nearest strength ended, and the last fit where the chosen one did.
    It takes fewer steps to an optimum, but a fit that the tolerance or the iterations end early (a weak penalty on
    classes that can be separated) then depends on those before it, where CLIP's begin at zero each."""

    def __post_init__(self) -> None:
        require_counts("fit", self, ("max_iterations",))
        require(self.gradient_tolerance > 0, "fit.gradient_tolerance", self.gradient_tolerance, "above 0")
        require(self.precision in ("float32", "float64"), "fit.precision", self.precision, "float32 or float64")

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.precision)


@dataclass(frozen=True)
class LinearClassifier:
    """Scores x W^T + b of each class. weight: (C, D), bias: (C,), float64. iterations: of the fit.

    end: "converged" by the gradient's tolerance, "stalled" where the objective falls no further in the digits that the
    blocks leave, "iterations" where they ran out, or "epochs" of the SGD protocol.
    """

    weight: np.ndarray
    bias: np.ndarray
    iterations: int = 0
    end: str = "converged"


def fit_logistic_regression(
    blocks: RowBlocks, classes: int, strength: float, config: FitConfig, start: LinearClassifier | None = None
) -> LinearClassifier:
    """The minimum of sum_i CE_i + strength / 2 |W|^2 over the weights; the bias is not penalised.

    blocks: rows with labels 0 … classes - 1. strength: the penalty's weight, the lambda of CLIP's appendix; as
    scikit-learn's `LogisticRegression(C=1 / strength)`, which has C sum_i CE_i + 1/2 |W|^2. With two classes there is
    still a row of weights for each, where scikit-learn has one for both: its C is then 2 / strength. start: where to
    begin, by default at zero.
    What is minimised is that sum divided by the number of rows, with scipy's L-BFGS-B (no bounds) and the stopping
    rules of scikit-learn, whose `lbfgs` is the same routine. Its line search meets the strong Wolfe conditions.
    Memory:
    40 times the C (D + 1) weights of 8 bytes, two blocks, and what RowBlocks holds. Raises ValueError for a strength
    that is not above 0: without a penalty classes that can be separated have no minimum.
    """
    require(0 < strength < float("inf"), "strength", strength, "above 0 and finite")
    dimension = blocks.features.dimension
    first = np.zeros((classes, dimension + 1)) if start is None else np.column_stack([start.weight, start.bias])
    found = minimize(
        mean_objective(blocks, classes, strength),
        first.ravel(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": config.max_iterations,
            "maxfun": config.max_iterations * LINE_SEARCH_STEPS,
            "maxls": LINE_SEARCH_STEPS,
            "maxcor": CORRECTIONS,
            "gtol": config.gradient_tolerance,
            "ftol": RELATIVE_TOLERANCE,
        },
    )
    weights = found.x.reshape(classes, dimension + 1)
    end = "iterations" if found.status == 1 else "stalled"
    if np.abs(found.jac).max() <= config.gradient_tolerance:
        end = "converged"
    return LinearClassifier(weights[:, :-1].copy(), weights[:, -1].copy(), int(found.nit), end)


def mean_objective(
    blocks: RowBlocks, classes: int, strength: float
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The function of weights (C (D + 1),) float64, class by class with the bias last, to value and gradient.

    (1/n) (sum_i CE_i + strength / 2 |W|^2), read block by block: scores in the blocks' precision, sums over blocks in
    float64. Cost: 4 n C D operations.
    """
    count, dimension = len(blocks), blocks.features.dimension

    def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(classes, dimension + 1).to(blocks.device)
        weight, bias = weights[:, :-1].to(blocks.dtype), weights[:, -1].to(blocks.dtype)
        loss = torch.zeros((), dtype=torch.float64, device=blocks.device)
        gradient = torch.zeros_like(weights)
        for _, rows, labels in blocks:
            scores = torch.addmm(bias, rows, weight.T)  # (b, C)
            normaliser = scores.logsumexp(1, keepdim=True)
            own = labels[:, None]
            loss += (normaliser - scores.gather(1, own)).sum(dtype=torch.float64)
            residual = scores.sub_(normaliser).exp_()
            residual.scatter_add_(1, own, residual.new_full((1, 1), -1.0).expand(own.shape))
            gradient[:, :-1] += residual.T @ rows
            gradient[:, -1] += residual.sum(0, dtype=torch.float64)
        penalised = weights[:, :-1]
        gradient[:, :-1] += strength * penalised
        value = (loss + strength / 2 * penalised.square().sum()) / count
        return float(value), (gradient / count).flatten().cpu().numpy()

    return value_and_gradient


def classes_ahead(classifier: LinearClassifier, blocks: RowBlocks) -> tuple[np.ndarray, float]:
    """For each row, how many other classes score at least as high as its own, (n,) int64, and the mean loss.

    A row is right when the number is 0: a tie counts against the classifier.
    """
    weight, bias = (torch.from_numpy(v).to(blocks.device, blocks.dtype) for v in (classifier.weight, classifier.bias))
    ahead, loss = torch.empty(len(blocks), dtype=torch.int64), 0.0
    for place, rows, labels in blocks:
        scores = torch.addmm(bias, rows, weight.T)
        own: Tensor = scores.gather(1, labels[:, None])
        ahead[place] = (~(scores < own)).sum(1).sub_(1).cpu()
        loss += float((scores.logsumexp(1, keepdim=True) - own).sum(dtype=torch.float64))
    return ahead.numpy(), loss / len(blocks)
