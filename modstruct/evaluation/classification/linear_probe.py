"""Linear probes of an embedded set: CLIP's logistic regression, CyCLIP's training by AdamW, and few shots, several
draws of a few images of each class with a logistic regression fitted on each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from modstruct import distributed
from modstruct.distributed.collect import on_each, on_main, share_out
from modstruct.errors import refuse, require, require_counts
from modstruct.evaluation.classification.accuracy import accuracies, in_top
from modstruct.evaluation.classification.linear import Features, FitConfig, LinearClassifier
from modstruct.evaluation.classification.probe import BEFORE_PROJECTION, Probe, ProbeConfig, drawn_order
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Curve, Result, Value
from modstruct.evaluation.statistics import wilson

PROJECTED = "image_projected"


@dataclass(frozen=True)
class AdamWProbeConfig:
    """CyCLIP's values. The protocol takes the projected image features before normalisation."""

    epochs: int = 32
    learning_rate: float = 0.005
    """At the first step; decays to zero by half a cosine, without warm-up."""
    weight_decay: float = 0.01
    """Of the weights, not of the bias."""
    batch: int = 128

    def __post_init__(self) -> None:
        require_counts("adamw", self, ("epochs", "batch"))
        require(self.learning_rate > 0, "adamw.learning_rate", self.learning_rate, "above 0")
        require(self.weight_decay >= 0, "adamw.weight_decay", self.weight_decay, "at least 0")


@dataclass(frozen=True)
class LinearProbeConfig(ProbeConfig):
    """Which features a probe sees, and how it is fitted."""

    validation_share: float = 0.2
    """Share of each class of the training set that is held out for the search if there is no validation set."""
    adamw: AdamWProbeConfig = field(default_factory=AdamWProbeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        between = 0 < self.validation_share < 1
        require(between, "linear_probe.validation_share", self.validation_share, "between 0 and 1")


DEFAULT = LinearProbeConfig()


def measure(embedded: EmbeddedSet, config: LinearProbeConfig = DEFAULT) -> Result:
    """Fit a logistic regression on the training split's features and classify the set (Radford et al. 2021, A.3).

    The strength of the penalty is searched with fits on the training split, scored on the validation split or on a part
    of the training split; the last fit has both. Outcomes: "top_1" and "top_5", (rows,), of the set's labelled rows in
    their order, and "group", the image of each, where some are copies.
    """
    probe, strength = on_each(lambda: Probe.of(embedded, config)), config.strength
    whole = [features for role, features in probe.splits.items() if role != "test"]
    used: dict[str, Any] = {}
    curves: dict[str, Curve] = {}
    if strength is None:
        fitted, held_out = probe.splits["train"], probe.splits.get("validation")
        if held_out is None:
            order = drawn_order(fitted.labels, probe.keys["train"], config.seed)
            fitted, held_out = map(fitted.take, hold_out(order, config.validation_share))
        strength, tried = probe.search(fitted, held_out)
        used = {"fitted_in_search": len(fitted), "held_out_in_search": len(held_out)}
        curves = _search_curves(strength, tried, len(held_out), len(probe.names))

    ahead, fit = on_main(lambda: probe.classify(whole, strength))
    about = "Accuracy of a logistic regression trained on frozen image features and tested on held-out images."
    made = Result("linear_probe", embedded.name, {}, "Linear probe", about, curves=curves)
    used |= {"strength": strength, "c": 1 / strength} | fit
    return _completed(made, embedded, probe, ahead, used, sum(map(len, whole)))


def measure_adamw(embedded: EmbeddedSet, config: LinearProbeConfig = DEFAULT) -> Result:
    """The same by CyCLIP's protocol (Goel et al. 2022, its public code): AdamW on the training split in small batches,
    on the projected features before normalisation where config.features names no others, in float32."""
    features = PROJECTED if config.features == BEFORE_PROJECTION else config.features
    chosen = replace(config, features=features, fit=FitConfig())
    probe = on_each(lambda: Probe.of(embedded, chosen, PROJECTED))

    def fit() -> tuple[np.ndarray, list[float], int]:
        train, test = probe.blocks([probe.splits["train"]], probe.splits["test"])
        fitted, losses = fit_by_adamw(train.features[0], len(probe.names), config.adamw, config.seed, train.device)
        return fitted.ahead(test)[0], losses, fitted.iterations

    ahead, losses, iterations = on_main(fit)
    epochs = np.arange(1.0, len(losses) + 1).tolist()
    curves = {"train_loss": Curve(epochs, losses, "Training", "epoch", "mean cross-entropy", "nats")}
    about = (
        "Accuracy of a linear classifier trained on frozen image features by CyCLIP's protocol: "
        f"{config.adamw.epochs} epochs of AdamW on the projected features before normalisation."
    )
    made = Result("linear_probe_adamw", embedded.name, {}, "Linear probe by AdamW", about, curves=curves)
    return _completed(made, embedded, probe, ahead, {"iterations": iterations, "end": "epochs"}, probe.rows["train"])


def _completed(
    made: Result, embedded: EmbeddedSet, probe: Probe, ahead: np.ndarray, used: dict[str, Any], fitted: int
) -> Result:
    """fitted: number of rows that the classifier was fitted on."""
    test = probe.splits["test"]
    copies = embedded.groups(test.rows)
    return replace(
        made,
        values=accuracies(ahead, test.labels, len(probe.names), probe.top_k, copies),
        headlines=("top_1",),
        settings=probe.used | used,
        rows=probe.rows | {"fitted": fitted},
        fingerprint=embedded.source.get("fingerprint"),
        outcomes=in_top(ahead, probe.top_k) | ({} if copies is None else {"group": copies}),
    )


def _search_curves(chosen: float, tried: dict[float, tuple[float, float]], rows: int, classes: int) -> dict[str, Curve]:
    found, losses = map(list, zip(*tried.values(), strict=True))
    low, high = map(list, zip(*(wilson(accuracy, rows) for accuracy in found), strict=True))
    even = np.ones(len(tried)) / classes
    title, axis = "Search of the penalty on held-out rows", "penalty λ"
    accuracy = Curve(
        [*tried], found, f"{title}: accuracy", axis, "top-1", "share", low, high, even.tolist(), True, chosen
    )
    loss = Curve([*tried], losses, f"{title}: loss", axis, "cross-entropy", "nats", logarithmic=True, chosen=chosen)
    return {"held_out_accuracy": accuracy, "held_out_loss": replace(loss, chance=(-np.log(even)).tolist())}


def hold_out(order: Sequence[np.ndarray], part: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions to fit on and positions held out, both ascending: the part of each class, rounded, at least one row of
    a class of two or more and never all of them. Raises ValueError if nothing can be held out."""
    counts = [min(max(1, round(part * len(places))), len(places) - 1) for places in order]
    require(any(counts), "validation", None, "every class has a single row, none can be held out: fix `strength`")
    held_out, kept = zip(*((places[:n], places[n:]) for places, n in zip(order, counts, strict=True)), strict=True)
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held_out))


def fit_by_adamw(
    features: Features, classes: int, config: AdamWProbeConfig, seed: int, device: torch.device
) -> tuple[LinearClassifier, list[float]]:
    """A classifier after config.epochs passes over the rows, and the mean loss of each pass.

    seed: of the initial weights, as torch's Linear draws them, and of the order of rows in each pass.
    """
    count, losses = len(features), []
    labels = torch.from_numpy(features.labels).to(device)
    steps = config.epochs * math.ceil(count / config.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        linear = torch.nn.Linear(features.dimension, classes).to(device)
        groups: list[dict[str, Any]] = [{"params": [linear.weight]}, {"params": [linear.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
        for _ in tqdm(range(config.epochs), desc="probe", unit="epoch", disable=not distributed.is_main(), leave=False):
            total = torch.zeros((), device=device, dtype=torch.float64)
            for places in torch.randperm(count).split(config.batch):
                places = places.sort().values
                optimizer.zero_grad()
                loss = cross_entropy(linear(features.read(places.numpy(), device)), labels[places.to(device)])
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach().double() * len(places)
            losses.append(float(total) / count)
    weight, bias = (parameter.detach().double().cpu().numpy() for parameter in linear.parameters())
    return LinearClassifier(weight, bias, steps, "epochs"), losses


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


def measure_few_shot(embedded: EmbeddedSet, config: FewShotConfig) -> Result:
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
            values[f"{group}/{name}"] = replace(first, value=float(np.mean(numbers)), deviation=deviation)
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
            if len(places) < stop:
                found = f"class {name!r} has {len(places)} images in the {role} set and {stop} are needed"
                remedies = ["take fewer shots"] * (shots > 1) + ["give the class more images"]
                if start or role == "validation":
                    found += " (to choose the strength included)"
                    remedies.append("give few_shot.strength a number")
                refuse("few_shot.shots", shots, f"{found}: {', or '.join(remedies)}")
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
