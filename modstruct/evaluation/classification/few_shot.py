"""Classification from a few images a class: several draws of them, and a probe fitted on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch

from modstruct.errors import refuse, require, require_counts
from modstruct.evaluation.classification.draws import drawn_order
from modstruct.evaluation.classification.features import paired_blocks
from modstruct.evaluation.classification.inputs import ProbeInputs
from modstruct.evaluation.classification.logistic_regression import (
    FitConfig,
    LinearClassifier,
    classes_ahead,
    fit_logistic_regression,
)
from modstruct.evaluation.classification.sweep import Split, sweep_strength

HELD_OUT_SHOTS = 4
"""Images a class, at most, on which the strength is chosen; CoOp's linear probe (Zhou et al. 2022) has as many."""
FOLDS = 4
STRENGTH_OF_ONE_SHOT = 1.0
"""Where it is to be chosen within the shots and there is one: scikit-learn's default."""


@dataclass(frozen=True)
class FewShotConfig:
    """Which images are drawn, and how the strength of the penalty is chosen. The test set takes no part in either."""

    features: str = "image_features"
    """Embeddings of the set, several joined by "+"."""
    unit_norm: bool = False
    """Divide each embedding's rows by their norm."""
    standardize: bool = False
    """Shift and scale columns to mean 0 and deviation 1 on the rows that are fitted."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    draws: int = 5
    strength: Literal["held_out", "shots"] | float = "held_out"
    """held_out: CLIP's search on min(shots, 4) more images a class, of the validation set where there is one, else of
    the training set, which are not learnt from. shots: the same search by 4-fold cross-validation within the shots
    (2-fold for 2 shots), and 1 for one shot. Or a number, the same for all."""
    seed: int = 0
    fit: FitConfig = field(default_factory=lambda: FitConfig(precision="float64"))

    def __post_init__(self) -> None:
        require_counts("few_shot", self, ("draws",))
        rising = bool(self.shots) and all(a < b for a, b in zip((0, *self.shots), self.shots, strict=False))
        require(rising, "few_shot.shots", self.shots, "whole numbers from 1 on, rising")
        known = self.strength in ("held_out", "shots") if isinstance(self.strength, str) else self.strength > 0
        require(known, "few_shot.strength", self.strength, "held_out, shots or a number above 0")


@dataclass(frozen=True)
class Episode:
    """One draw's places in the training set, and those held out in it or in the validation set."""

    shots: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """Of one draw: classes ahead of each test row's own, (n,), and the strength of the penalty."""

    ahead: np.ndarray
    strength: float


def draw_episodes(inputs: ProbeInputs, config: FewShotConfig, draw: int) -> dict[int, Episode]:
    """One draw's episodes by number of shots: the first images of each class in the draw's order.

    The images of fewer shots are among those of more. Those held out follow the shots in the same order, or are the
    first of the validation set's. Raises ValueError for a class with fewer images.
    """
    order = drawn_order(inputs.train.labels, inputs.train_keys, config.seed, draw)
    other = None
    if inputs.validation is not None and config.strength == "held_out":
        other = drawn_order(inputs.validation.labels, inputs.validation_keys, config.seed, draw)
        missing = np.setdiff1d(np.arange(inputs.classes), inputs.validation.labels)
        if len(missing):
            refuse("validation", inputs.names[missing[0]], "has no image in the validation set: add some, or give none")
    episodes = {}
    for shots in config.shots:
        held_out = min(shots, HELD_OUT_SHOTS) if config.strength == "held_out" else 0
        if other is None:
            chosen = _first_of_each(order, shots + held_out, inputs.names, "training", shots)
            episodes[shots] = Episode(np.sort(chosen[:, :shots].ravel()), np.sort(chosen[:, shots:].ravel()))
        else:
            chosen = _first_of_each(order, shots, inputs.names, "training", shots)
            after = _first_of_each(other, held_out, inputs.names, "validation", shots)
            episodes[shots] = Episode(np.sort(chosen.ravel()), np.sort(after.ravel()))
    return episodes


def run_episode(
    inputs: ProbeInputs, episode: Episode, shots: int, config: FewShotConfig, device: torch.device
) -> Outcome:
    """Choose the strength, fit on the shots alone, and classify the test set."""
    standardize, classes = config.standardize, inputs.classes
    blocks = partial(paired_blocks, standardize=standardize, width=classes, device=device, dtype=config.fit.dtype)
    chosen = inputs.train.take(episode.shots)
    strength, start = config.strength, None
    if strength == "held_out":
        source = inputs.train if inputs.validation is None else inputs.validation
        splits = [(chosen, source.take(episode.held_out))]
    elif strength == "shots":
        fold = _folds(chosen.labels, min(shots, FOLDS))
        splits = [
            (chosen.take(np.flatnonzero(fold != f)), chosen.take(np.flatnonzero(fold == f))) for f in np.unique(fold)
        ]
        if shots == 1:
            strength = STRENGTH_OF_ONE_SHOT
    if isinstance(strength, str):
        made = [Split(*blocks(*pair)) for pair in splits]
        sweep, start = sweep_strength(made, classes, config.fit)
        strength = sweep.best
    fitted, test = blocks(chosen, inputs.test)
    classifier: LinearClassifier = fit_logistic_regression(fitted, classes, strength, config.fit, start)
    return Outcome(classes_ahead(classifier, test)[0], float(strength))


def _folds(labels: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each row, (n,): the rows of a class go to the folds in turn."""
    order = np.argsort(labels, kind="stable")
    within = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = within % folds
    return fold


def _first_of_each(order: Sequence[np.ndarray], count: int, names: list[str], which: str, shots: int) -> np.ndarray:
    """(C, count): the first places of each class."""
    for name, places in zip(names, order, strict=True):
        if len(places) < count:
            refuse(
                "few_shot.shots",
                shots,
                f"class {name!r} has {len(places)} images in the {which} set and {count} are needed (those on which "
                'the strength is chosen included): take fewer shots, or few_shot.strength = "shots" or a number',
            )
    return np.stack([places[:count] for places in order])
