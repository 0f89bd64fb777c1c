"""Classification from a few images of each class: several draws, and a logistic regression fitted on each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from modstruct.distributed.collect import on_each, share_out
from modstruct.errors import require, require_counts
from modstruct.evaluation.classification.accuracy import accuracies, in_top
from modstruct.evaluation.classification.logistic_regression import FitConfig
from modstruct.evaluation.classification.probe import Probe, ProbeConfig, drawn_order
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Curve, Result, Value

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

    Values are means over draws with their standard deviation (n - 1), without intervals: those over test rows would
    leave out the variation over draws; the curves' bands are Student's over draws. Outcomes: "shots_4/top_1", (rows,)
    float32, the share of draws in which the row was right. Raises ValueError as `Probe.of` does, and for a class with
    fewer images than shots.
    """
    draws = config.draws
    probe = on_each(lambda: Probe.of(embedded, config))
    truth = probe.splits["test"].labels
    # All are drawn before the first fit, so that a class that is too small is named at once.
    drawn = [draw_episodes(probe, config, draw) for draw in range(draws)]
    work = [episodes[shots] for shots in config.shots for episodes in drawn]
    found = share_out(work, lambda episode: run_episode(probe, *episode), "draws")
    values: dict[str, Value] = {}
    outcomes: dict[str, np.ndarray] = {}
    by_draw: dict[str, list[float]] = {}
    for number, shots in enumerate(config.shots):
        group, of_shots = f"shots_{shots}", found[number * draws : (number + 1) * draws]
        each = [accuracies(a, truth, len(probe.names), probe.top_k, intervals=False) for a, _ in of_shots]
        by_draw[f"{group}/strength"] = [strength for _, strength in of_shots]
        for name, first in each[0].items():
            numbers = by_draw[f"{group}/{name}"] = [one[name].value for one in each]
            deviation = float(np.std(numbers, ddof=1)) if draws > 1 else None
            about = f"{first.about} Trained on {shots} of each class: mean over draws of them."
            mean = float(np.mean(numbers))
            values[f"{group}/{name}"] = replace(first, value=mean, deviation=deviation, about=about)
        for name, right in in_top(np.stack([ahead for ahead, _ in of_shots]), probe.top_k).items():
            outcomes[f"{group}/{name}"] = right.mean(0, dtype=np.float32)
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
        {name: _over_shots(name, config, values) for name in each[0]},
        probe.used | {"by_draw": by_draw},
        probe.rows,
        embedded.source.get("fingerprint"),
        outcomes=outcomes,
    )


def _over_shots(name: str, config: FewShotConfig, values: dict[str, Value]) -> Curve:
    """An accuracy by the number of shots, its band over draws."""
    found = [values[f"shots_{shots}/{name}"] for shots in config.shots]
    y, label = np.array([value.value for value in found]), found[0].label
    band = {}
    if config.draws > 1:
        half = stats.t.ppf(0.975, config.draws - 1) * np.array([value.deviation for value in found])
        low, high = np.clip([y - half / config.draws**0.5, y + half / config.draws**0.5], 0, 1).tolist()
        band = {"low": low, "high": high}
    title, chance = f"Few-shot accuracy, {label}", [value.chance or 0.0 for value in found]
    curve = Curve([float(shots) for shots in config.shots], y.tolist(), title, "images of each class", label, "share")
    return replace(curve, chance=chance, logarithmic=True, **band)


def draw_episodes(probe: Probe, config: FewShotConfig, draw: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """One draw by number of shots: positions in the training set, and held-out ones in it or in the validation set.

    The first images of each class in the draw's order, so that fewer shots are among more; the held-out ones follow
    them, or are the first ones of the validation set. Raises ValueError for a class with fewer images.
    """
    order = {
        role: drawn_order(probe.splits[role].labels, keys, config.seed, draw, len(probe.names))
        for role, keys in probe.keys.items()
    }

    def first(role: str, start: int, stop: int, shots: int) -> np.ndarray:
        for name, places in zip(probe.names, order[role], strict=True):
            found = f"class {name!r} has {len(places)} images in the {role} set and {stop} are needed"
            remedy = "(to choose the strength included): take fewer shots, or give few_shot.strength a number"
            require(len(places) >= stop, "few_shot.shots", shots, f"{found} {remedy}")
        return np.sort(np.concatenate([places[start:stop] for places in order[role]]))

    episodes = {}
    for shots in config.shots:
        held_out = min(shots, HELD_OUT_SHOTS) if config.strength is None else 0
        after = ("train", shots, shots + held_out) if "validation" not in order else ("validation", 0, held_out)
        episodes[shots] = first("train", 0, shots, shots), first(*after, shots)
    return episodes


def run_episode(probe: Probe, shots: np.ndarray, held_out: np.ndarray) -> tuple[np.ndarray, float]:
    """Choose the strength, fit on the shots alone, and classify the test set: classes ahead (n,), and the strength."""
    chosen, strength = probe.splits["train"].take(shots), probe.config.strength
    if strength is None:
        strength, _ = probe.search(chosen, probe.splits.get("validation", probe.splits["train"]).take(held_out))
    return probe.classify([chosen], strength)[0], strength
