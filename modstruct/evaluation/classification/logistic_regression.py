"""Multinomial logistic regression by L-BFGS over rows that may exceed memory, and the search of its penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from modstruct.errors import require, require_counts
from modstruct.evaluation.classification.features import RowBlocks

CORRECTIONS = 10
"""Pairs of steps and gradients that L-BFGS keeps, as in scikit-learn."""
RELATIVE_TOLERANCE = 64 * float(np.finfo(np.float64).eps)
"""Of the objective from one step to the next, as in scikit-learn."""
LINE_SEARCH_STEPS = 50
STEPS_PER_DECADE = 8
STRENGTHS = 10.0 ** (np.arange(12 * STEPS_PER_DECADE + 1) / STEPS_PER_DECADE - 6)
"""From 1e-6 to 1e6 in 96 steps of the logarithm, ends included: 97 values."""
FIRST_STEP = 2 * STEPS_PER_DECADE
"""Of the grid: 1e-6, 1e-4, 1e-2, 1, 1e2, 1e4 and 1e6 are tried first."""
TRIED = 15
"""Most strengths: those 7, and 2 for each of the 4 times that the step is halved."""


@dataclass(frozen=True)
class FitConfig:
    """When a fit ends, and in which precision rows are read."""

    max_iterations: int = 1000
    """Most iterations of a fit, as in CLIP."""
    gradient_tolerance: float = 1e-4
    """Largest entry of the gradient of the mean loss at which a fit has converged: scikit-learn's `tol`."""
    precision: Literal["float32", "float64"] = "float32"
    """Of rows, scores and a block's sums; sums over blocks and the weights are float64."""
    warm_starts: bool = False
    """Start each fit of a search from that of the nearest strength, and the last fit from the chosen one. This takes
    fewer steps to an optimum, but a fit that the tolerance or the iterations end early (a weak penalty on separable
    classes) then depends on those before it, whereas CLIP's start at zero."""

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

    end: "converged" by the gradient's tolerance, "stalled" if the objective falls no further at the precision of the
    blocks, "iterations" if they ran out, or "epochs" of the AdamW probe.
    """

    weight: np.ndarray
    bias: np.ndarray
    iterations: int = 0
    end: str = "converged"


def fit_logistic_regression(
    blocks: RowBlocks, classes: int, strength: float, config: FitConfig, start: LinearClassifier | None = None
) -> LinearClassifier:
    """The minimum of sum_i CE_i + strength / 2 |W|^2 over the weights; the bias is not penalised.

    blocks: rows with labels 0 … classes - 1. strength: the penalty's weight, lambda in CLIP's appendix, equal to
    scikit-learn's `LogisticRegression(C=1 / strength)`, which has C sum_i CE_i + 1/2 |W|^2. Two classes still have a
    row of weights each, where scikit-learn has one for both: its C is then 2 / strength. start: initial weights, by
    default zero.
    The sum divided by the number of rows is minimised, by scipy's L-BFGS-B (no bounds) with the stopping rules of
    scikit-learn, whose `lbfgs` is the same routine. Its line search meets the strong Wolfe conditions.
    Memory: 40 times the C (D + 1) weights of 8 bytes, two blocks, and what RowBlocks holds. Raises ValueError for a
    strength that is not above 0: without a penalty, separable classes have no minimum.
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

    A row is classified correctly where the number is 0: a tie counts against the classifier.
    """
    weight, bias = (torch.from_numpy(v).to(blocks.device, blocks.dtype) for v in (classifier.weight, classifier.bias))
    ahead, loss = torch.empty(len(blocks), dtype=torch.int64), 0.0
    for place, rows, labels in blocks:
        scores = torch.addmm(bias, rows, weight.T)
        own: Tensor = scores.gather(1, labels[:, None])
        ahead[place] = (~(scores < own)).sum(1).sub_(1).cpu()
        loss += float((scores.logsumexp(1, keepdim=True) - own).sum(dtype=torch.float64))
    return ahead.numpy(), loss / len(blocks)


@dataclass(frozen=True)
class Sweep:
    """What a search tried, ascending by strength, and the strength that it chose."""

    best: float
    strengths: list[float]
    accuracies: list[float]
    losses: list[float]


@dataclass(frozen=True)
class Split:
    """Rows to fit on and rows to choose the strength on, of the same classes."""

    train: RowBlocks
    held_out: RowBlocks


def search_strength(score: Callable[[float], tuple[float, float]], progress: bool = False) -> Sweep:
    """CLIP's search of the strength (Radford et al. 2021, A.3): halve the interval around the peak, down to 1/8 decade.

    score: strength -> (accuracy, loss) on the held-out rows, called once for a strength, from the strongest of the
    first seven to the weakest, then around the peak. Of equal accuracies the one with the least loss wins, and of those
    the strongest (with few held-out rows many tie; CLIP's text does not say which it takes).
    """
    tried: dict[int, tuple[float, float]] = {}
    with tqdm(total=TRIED, desc="strengths", disable=not progress, leave=False) as bar:

        def try_all(places: Sequence[int]) -> int:
            for place in places:
                if 0 <= place < len(STRENGTHS) and place not in tried:
                    tried[place] = score(float(STRENGTHS[place]))
                    bar.update()
            return max(tried, key=lambda place: (tried[place][0], -tried[place][1], place))

        peak = try_all(range(len(STRENGTHS) - 1, -1, -FIRST_STEP))
        step = FIRST_STEP // 2
        while step:
            peak = try_all((peak + step, peak - step))
            step //= 2
    ascending = sorted(tried)
    return Sweep(
        float(STRENGTHS[peak]),
        [float(STRENGTHS[place]) for place in ascending],
        [tried[place][0] for place in ascending],
        [tried[place][1] for place in ascending],
    )


def sweep_strength(
    splits: Sequence[Split], classes: int, config: FitConfig, progress: bool = False
) -> tuple[Sweep, LinearClassifier | None]:
    """Search with fits on each split, scored on the held-out rows of all splits.

    Returns the search, and with config.warm_starts the first split's classifier of the chosen strength, from which the
    last fit starts; else None. Memory: with warm starts 15 classifiers a split, else one.
    """
    fitted: list[dict[float, LinearClassifier]] = [{} for _ in splits]

    def score(strength: float) -> tuple[float, float]:
        right, loss = 0, 0.0
        for split, known in zip(splits, fitted, strict=True):
            near = known[min(known, key=lambda other: abs(np.log(other / strength)))] if known else None
            classifier = fit_logistic_regression(split.train, classes, strength, config, near)
            if config.warm_starts:
                known[strength] = classifier
            ahead, mean_loss = classes_ahead(classifier, split.held_out)
            right += int((ahead == 0).sum())
            loss += mean_loss * len(split.held_out)
        rows = sum(len(split.held_out) for split in splits)
        return right / rows, loss / rows

    sweep = search_strength(score, progress)
    return sweep, fitted[0].get(sweep.best)
