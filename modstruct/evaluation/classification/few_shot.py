"""Classification from a few images of each class: several draws, and a logistic regression fitted on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from modstruct.distributed.collect import share_out
from modstruct.errors import refuse, require, require_counts
from modstruct.evaluation.classification.accuracy import accuracies, in_top
from modstruct.evaluation.classification.logistic_regression import FitConfig
from modstruct.evaluation.classification.probe import Probe, ProbeConfig, drawn_order
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Curve, Result, Value
from modstruct.evaluation.statistics import t_interval

HELD_OUT_SHOTS = 4
"""Most images of each class on which the strength is chosen, as in CoOp's linear probe (Zhou et al. 2022)."""


@dataclass(frozen=True)
class FewShotConfig(ProbeConfig):
    """Which images are drawn. If no strength is given it is chosen, for each draw, on min(shots, 4) more images of each
    class, from the validation set or else the training set; the test set takes no part."""

    section = "few_shot"
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    draws: int = 5
    fit: FitConfig = field(default_factory=lambda: FitConfig(precision="float64"))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts("few_shot", self, ("draws",))
        rising = bool(self.shots) and all(a < b for a, b in zip((0, *self.shots), self.shots, strict=False))
        require(rising, "few_shot.shots", self.shots, "whole numbers from 1 on, rising")


DEFAULT = FewShotConfig()


def measure(embedded: EmbeddedSet, config: FewShotConfig = DEFAULT) -> Result:
    """Classify the set from a few images of each class of its training split, for each number of shots and each draw.

    Draws are the same for every model. Values are means over draws with their standard deviation (n - 1), without
    intervals: those over test rows would leave out the variation over draws; the curves' bands are Student's over
    draws. Outcomes: "shots_4/top_1", (rows,) float32, the share of draws in which the row was right; rows as in
    `linear_probe.measure`. Raises ValueError as `Probe.of` does, and for a class with fewer images than shots.
    """
    probe, draws = Probe.of(embedded, config), config.draws
    # All are drawn before the first fit, so that a class that is too small is named at once.
    drawn = [draw_episodes(probe, config, draw) for draw in range(draws)]
    work = [(shots, draw) for shots in config.shots for draw in range(draws)]
    found = share_out(work, lambda item: run_episode(probe, *drawn[item[1]][item[0]]), "draws")
    values: dict[str, Value] = {}
    outcomes: dict[str, np.ndarray] = {}
    by_draw: dict[str, list[float]] = {}
    for number, shots in enumerate(config.shots):
        ahead, strengths = zip(*found[number * draws : (number + 1) * draws], strict=True)
        each = [accuracies(a, probe.test.labels, len(probe.names), probe.top_k, intervals=False) for a in ahead]
        by_draw[f"shots_{shots}/strength"] = list(strengths)
        for name, first in each[0].items():
            numbers = by_draw[f"shots_{shots}/{name}"] = [one[name].value for one in each]
            deviation = float(np.std(numbers, ddof=1)) if draws > 1 else None
            values[f"shots_{shots}/{name}"] = replace(first, value=float(np.mean(numbers)), deviation=deviation)
        for name, right in in_top(np.stack(ahead), probe.top_k).items():
            outcomes[f"shots_{shots}/{name}"] = right.mean(0, dtype=np.float32)
    shown = [count for count in (1, 4, 16) if count in config.shots] or config.shots[:1]
    return Result(
        "few_shot",
        embedded.name,
        values,
        "Few-shot classification",
        "Accuracy of a logistic regression trained on frozen image features with only a few labelled images of each "
        f"class: mean and standard deviation over {draws} draws of them, which are the same for every run.",
        {f"shots_{shots}": f"{shots} shot{'s' * (shots > 1)}" for shots in config.shots},
        tuple(f"shots_{shots}/top_1" for shots in shown),
        {name: _over_shots(name, config.shots, values, by_draw) for name in each[0]},
        probe.used | {"by_draw": by_draw},
        probe.rows,
        embedded.source.get("fingerprint"),
        outcomes=outcomes,
    )


def _over_shots(name: str, shots: Sequence[int], values: dict[str, Value], by_draw: dict[str, list[float]]) -> Curve:
    """An accuracy by the number of shots, its band over draws."""
    found = [values[f"shots_{count}/{name}"] for count in shots]
    draws = np.array([by_draw[f"shots_{count}/{name}"] for count in shots])
    bands = np.clip([t_interval(of_shots) for of_shots in draws], 0, 1) if draws.shape[1] > 1 else None
    return Curve(
        [float(count) for count in shots],
        [value.value for value in found],
        x_label="images of each class",
        y_label=found[0].label,
        unit="share",
        low=None if bands is None else bands[:, 0].tolist(),
        high=None if bands is None else bands[:, 1].tolist(),
        chance=[value.chance or 0.0 for value in found],
        logarithmic=True,
    )


def draw_episodes(probe: Probe, config: FewShotConfig, draw: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """One draw by number of shots: positions in the training set, and held-out ones in it or in the validation set.

    The first images of each class in the draw's order, so that those of fewer shots are among those of more shots. The
    held-out ones follow the shots in the same order, or are the first ones of the validation set. Raises ValueError for
    a class with fewer images.
    """
    order = drawn_order(probe.train.labels, probe.keys["train"], config.seed, draw)
    other = None
    if probe.validation is not None and config.strength is None:
        missing = np.setdiff1d(np.arange(len(probe.names)), probe.validation.labels)
        if len(missing):
            refuse("validation", probe.names[missing[0]], "has no image in the validation set: add some, or give none")
        other = drawn_order(probe.validation.labels, probe.keys["validation"], config.seed, draw)
    episodes = {}
    for shots in config.shots:
        held_out = min(shots, HELD_OUT_SHOTS) if config.strength is None else 0
        chosen = _first_of_each(order, shots + (held_out if other is None else 0), probe.names, "training", shots)
        after = chosen[:, shots:]
        if other is not None:
            after = _first_of_each(other, held_out, probe.names, "validation", shots)
        episodes[shots] = np.sort(chosen[:, :shots].ravel()), np.sort(after.ravel())
    return episodes


def run_episode(probe: Probe, shots: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, float]:
    """Choose the strength, fit on the shots alone, and classify the test set: classes ahead (n,), and the strength."""
    chosen, strength = probe.train.take(shots), probe.config.strength
    if strength is None:
        watched = (probe.train if probe.validation is None else probe.validation).take(held_out)
        strength, _ = probe.search(chosen, watched)
    return probe.classify([chosen], strength)[0], strength


def _first_of_each(order: Sequence[np.ndarray], count: int, names: list[str], which: str, shots: int) -> np.ndarray:
    """(C, count): the first positions of each class."""
    for name, places in zip(names, order, strict=True):
        if len(places) < count:
            refuse(
                "few_shot.shots",
                shots,
                f"class {name!r} has {len(places)} images in the {which} set and {count} are needed (those on which "
                "the strength is chosen included): take fewer shots, or give few_shot.strength a number",
            )
    return np.stack([places[:count] for places in order])
