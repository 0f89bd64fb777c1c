"""The strength of a probe's penalty, chosen on rows held out: CLIP's search (Radford et al. 2021, appendix A.3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from modstruct.evaluation.classification.features import RowBlocks
from modstruct.evaluation.classification.logistic_regression import (
    FitConfig,
    LinearClassifier,
    classes_ahead,
    fit_logistic_regression,
)

STEPS_PER_DECADE = 8
STRENGTHS = 10.0 ** (np.arange(12 * STEPS_PER_DECADE + 1) / STEPS_PER_DECADE - 6)
"""From 1e-6 to 1e6 in 96 steps of the logarithm, ends included: 97 values."""
FIRST_STEP = 2 * STEPS_PER_DECADE
"""1e-6, 1e-4, 1e-2, 1, 1e2, 1e4 and 1e6 are tried first."""
TRIED = 15
"""Strengths at most: those 7, and 2 for each of the 4 times that the step is halved."""


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
    """Halve the interval around the peak until the step is an eighth of a decade.

    score: strength -> (accuracy, loss) on the rows held out, called once for a strength, from the strongest of the
    first seven to the weakest, then around the peak. Of strengths with one accuracy the one of the least loss wins, of
    those the strongest (with few rows held out many have the same accuracy; CLIP's text does not say which it takes).
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
    """Search with fits on each split, scored on all rows held out together.

    Returns the search, and with config.warm_starts the first split's classifier of the chosen strength, where the last
    fit begins; else None. Memory: with warm starts 15 classifiers a split, else one.
    """
    fitted: list[dict[float, LinearClassifier]] = [{} for _ in splits]

    def score(strength: float) -> tuple[float, float]:
        right, loss = 0, 0.0
        for split, known in zip(splits, fitted, strict=True):
            near = min(known, key=lambda other: abs(np.log(other / strength)), default=None)
            classifier = fit_logistic_regression(split.train, classes, strength, config, known.get(near))
            if config.warm_starts:
                known[strength] = classifier
            ahead, mean_loss = classes_ahead(classifier, split.held_out)
            right += int((ahead == 0).sum())
            loss += mean_loss * len(split.held_out)
        rows = sum(len(split.held_out) for split in splits)
        return right / rows, loss / rows

    sweep = search_strength(score, progress)
    return sweep, fitted[0].get(sweep.best)
