"""Classification from a few images of each class: several draws, and a probe fitted on each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from modstruct.errors import refuse, require, require_counts
from modstruct.evaluation.classification.features import ProbeInputs, drawn_order, paired_blocks, probe_inputs
from modstruct.evaluation.classification.linear_probe import Result, accuracy_metrics, described, hits
from modstruct.evaluation.classification.logistic_regression import (
    FitConfig,
    Split,
    classes_ahead,
    fit_logistic_regression,
    sweep_strength,
)
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet

CPU = torch.device("cpu")
HELD_OUT_SHOTS = 4
"""Most images of each class on which the strength is chosen, as in CoOp's linear probe (Zhou et al. 2022)."""
FOLDS = 4
STRENGTH_OF_ONE_SHOT = 1.0
"""Used by strength = shots where there is a single shot: scikit-learn's default."""


@dataclass(frozen=True)
class FewShotConfig:
    """Which images are drawn, and how the strength of the penalty is chosen. The test set takes no part in either."""

    features: str = "image_features"
    """Embeddings of the set, several joined by "+"."""
    unit_norm: bool = False
    """Divide each embedding's rows by their norm."""
    standardize: bool = False
    """Shift and scale columns to mean 0 and deviation 1 over the rows to fit on."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    draws: int = 5
    strength: Literal["held_out", "shots"] | float = "held_out"
    """held_out: CLIP's search on min(shots, 4) more images of each class, not trained on, from the validation set or
    else the training set. shots: the same search by 4-fold cross-validation within the shots (2-fold for 2 shots), and
    1 for one shot. Or a number, the same for all."""
    seed: int = 0
    fit: FitConfig = field(default_factory=lambda: FitConfig(precision="float64"))

    def __post_init__(self) -> None:
        require_counts("few_shot", self, ("draws",))
        rising = bool(self.shots) and all(a < b for a, b in zip((0, *self.shots), self.shots, strict=False))
        require(rising, "few_shot.shots", self.shots, "whole numbers from 1 on, rising")
        known = self.strength in ("held_out", "shots") if isinstance(self.strength, str) else self.strength > 0
        require(known, "few_shot.strength", self.strength, "held_out, shots or a number above 0")


def measure_few_shot(
    train: EmbeddedSet,
    test: EmbeddedSet,
    validation: EmbeddedSet | None = None,
    config: FewShotConfig | None = None,
    device: torch.device = CPU,
    progress: bool = False,
) -> Result:
    """Classify the test set from a few training images of each class, for each number of shots and each draw.

    Draws are the same for every model. Metrics, by number of shots: "shots_4": {"top_1": mean over draws, …,
    "top_1_deviation": standard deviation over draws (n - 1; absent for one draw)}. Curves: over shots, and of each
    draw. Outcomes: "shots_4/top_1", (rows,) float32, the share of draws in which the row was right; rows as in
    `measure_linear_probe`. There are no intervals: those over test rows would leave out the variation over draws.
    Raises ValueError as `probe_inputs` does, and for a class with fewer images than shots.
    """
    config = config or FewShotConfig()
    started = time.perf_counter()
    inputs = probe_inputs(train, test, validation, config.features, config.unit_norm)
    # All are drawn before the first fit, so that a class that is too small is named at once.
    drawn = [draw_episodes(inputs, config, draw) for draw in range(config.draws)]
    metrics: dict[str, dict] = {}
    curves: dict[str, list[float]] = {"shots": [float(shots) for shots in config.shots]}
    outcomes: dict[str, np.ndarray] = {}
    with tqdm(total=len(config.shots) * config.draws, desc="draws", disable=not progress, leave=False) as bar:
        for shots in config.shots:
            found = []
            for episodes in drawn:
                found.append(run_episode(inputs, episodes[shots], shots, config, device))
                bar.update()
            each = [accuracy_metrics(one.ahead, inputs.test.labels, inputs.classes) for one in found]
            metrics[f"shots_{shots}"] = over = metrics_over_draws(each)
            for name in each[0]:
                curves.setdefault(name, []).append(over[name]["value"])
                curves[f"shots_{shots}/{name}"] = [one[name]["value"] for one in each]
                if config.draws > 1:
                    curves.setdefault(f"{name}_deviation", []).append(over[f"{name}_deviation"]["value"])
            curves[f"shots_{shots}/strength"] = [one.strength for one in found]
            right = [hits(one.ahead, inputs.classes) for one in found]
            for name in right[0]:
                outcomes[f"shots_{shots}/{name}"] = np.stack([one[name] for one in right]).mean(0, dtype=np.float32)
    result = {
        "metric": "few_shot",
        "set": test.name,
        "figures": metrics,
        "curves": curves,
        "settings": asdict(config) | described(inputs, train, validation),
        "rows": inputs.rows,
        "source_fingerprint": test.source.get("fingerprint"),
        "seconds": time.perf_counter() - started,
    }
    return result, outcomes


def metrics_over_draws(each: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean of each metric over draws and, of several draws, its standard deviation (n - 1) as "…_deviation"."""
    metrics = {}
    for name, one in each[0].items():
        values = [metrics_of_draw[name]["value"] for metrics_of_draw in each]
        metrics[name] = one | {"value": float(np.mean(values))}
        if len(values) > 1:
            metrics[f"{name}_deviation"] = {"value": float(np.std(values, ddof=1)), "rows": len(values)}
    return metrics


@dataclass(frozen=True)
class Episode:
    """One draw's positions in the training set, and those held out in it or in the validation set."""

    shots: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """Of one draw: number of classes ahead of each test row's own, (n,), and the strength of the penalty."""

    ahead: np.ndarray
    strength: float


def draw_episodes(inputs: ProbeInputs, config: FewShotConfig, draw: int) -> dict[int, Episode]:
    """One draw's episodes by number of shots: the first images of each class in the draw's order.

    The images of fewer shots are among those of more shots. The held-out ones follow the shots in the same order, or
    are the first ones of the validation set. Raises ValueError for a class with fewer images.
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
    if strength == "shots" and shots == 1:
        strength = STRENGTH_OF_ONE_SHOT
    if isinstance(strength, str):
        if strength == "held_out":
            source = inputs.train if inputs.validation is None else inputs.validation
            pairs = [(chosen, source.take(episode.held_out))]
        else:
            fold = _folds(chosen.labels, min(shots, FOLDS))
            parts = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in np.unique(fold)]
            pairs = [(chosen.take(rest), chosen.take(held_out)) for rest, held_out in parts]
        sweep, start = sweep_strength([Split(*blocks(*pair)) for pair in pairs], classes, config.fit)
        strength = sweep.best
    fitted, test = blocks(chosen, inputs.test)
    classifier = fit_logistic_regression(fitted, classes, strength, config.fit, start)
    return Outcome(classes_ahead(classifier, test)[0], float(strength))


def _folds(labels: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each row, (n,): the rows of a class are dealt to the folds in turn."""
    order = np.argsort(labels, kind="stable")
    within = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = within % folds
    return fold


def _first_of_each(order: Sequence[np.ndarray], count: int, names: list[str], which: str, shots: int) -> np.ndarray:
    """(C, count): the first positions of each class."""
    for name, places in zip(names, order, strict=True):
        if len(places) < count:
            refuse(
                "few_shot.shots",
                shots,
                f"class {name!r} has {len(places)} images in the {which} set and {count} are needed (those on which "
                'the strength is chosen included): take fewer shots, or few_shot.strength = "shots" or a number',
            )
    return np.stack([places[:count] for places in order])
