"""Linear probes of an embedded set: CLIP's logistic regression, and CyCLIP's training by AdamW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from modstruct import distributed
from modstruct.distributed.collect import on_main
from modstruct.errors import require, require_counts
from modstruct.evaluation.classification.accuracy import accuracies, in_top
from modstruct.evaluation.classification.features import HELD_ON_CPU, Features
from modstruct.evaluation.classification.logistic_regression import FitConfig, LinearClassifier
from modstruct.evaluation.classification.probe import BEFORE_PROJECTION, Probe, ProbeConfig, drawn_order
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Curve, Result, Unit
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
        part = self.validation_share
        require(0 < part < 1, "linear_probe.validation_share", part, "between 0 and 1")


DEFAULT = LinearProbeConfig()


def measure(embedded: EmbeddedSet, config: LinearProbeConfig = DEFAULT) -> Result:
    """Fit a logistic regression on the training split's features and classify the set (Radford et al. 2021, A.3).

    The strength of the penalty is searched with fits on the training split, scored on the validation split or on a part
    of the training split; the last fit has both. Outcomes: "top_1" and "top_5", (rows,), of the set's labelled rows in
    their order, and "group", the image of each, where some are copies. Raises ValueError as `Probe.of` does.
    """
    probe, strength = Probe.of(embedded, config), config.strength
    whole = [probe.train] if probe.validation is None else [probe.train, probe.validation]
    used: dict[str, Any] = {}
    curves: dict[str, Curve] = {}
    if strength is None:
        fitted, held_out = probe.train, probe.validation
        if held_out is None:
            order = drawn_order(fitted.labels, probe.keys["train"], config.seed)
            kept, out = hold_out(order, config.validation_share)
            fitted, held_out = fitted.take(kept), fitted.take(out)
        strength, tried = probe.search(fitted, held_out)
        used = {"fitted_in_search": len(fitted), "held_out_in_search": len(held_out)}
        curves = _search_curves(strength, tried, len(held_out), len(probe.names))

    def classify() -> tuple[np.ndarray, dict[str, Any]]:
        ahead, classifier = probe.classify(whole, strength)
        return ahead, {"iterations": classifier.iterations, "end": classifier.end}

    ahead, fit = on_main(classify)
    used |= {"strength": strength, "c": 1 / strength} | fit
    about = "Accuracy of a logistic regression trained on frozen image features and tested on held-out images."
    names = "linear_probe", "Linear probe", about
    return _result(embedded, probe, names, ahead, curves, used, sum(map(len, whole)))


def measure_adamw(embedded: EmbeddedSet, config: LinearProbeConfig = DEFAULT) -> Result:
    """The same by CyCLIP's protocol (Goel et al. 2022, its public code): AdamW on the training split in small batches.

    On the projected features before normalisation where config.features names no others, in float32; the validation
    split is not used.
    """
    features = PROJECTED if config.features == BEFORE_PROJECTION else config.features
    probe = Probe.of(embedded, replace(config, features=features, fit=FitConfig()), PROJECTED)

    def fit() -> tuple[np.ndarray, list[float], int]:
        (train, test), classes = probe.blocks([probe.train], probe.test), len(probe.names)
        fitted, losses = fit_by_adamw(train.features[0], classes, config.adamw, config.seed, distributed.device())
        return fitted.ahead(test)[0], losses, fitted.iterations

    ahead, losses, iterations = on_main(fit)
    epochs = np.arange(1.0, len(losses) + 1).tolist()
    curves = {"train_loss": Curve(epochs, losses, "Training", "epoch", "mean cross-entropy", "nats")}
    about = (
        "Accuracy of a linear classifier trained on frozen image features by CyCLIP's protocol: "
        f"{config.adamw.epochs} epochs of AdamW on the projected features before normalisation."
    )
    names = "linear_probe_adamw", "Linear probe by AdamW", about
    return _result(embedded, probe, names, ahead, curves, {"iterations": iterations, "end": "epochs"}, len(probe.train))


def _result(
    embedded: EmbeddedSet,
    probe: Probe,
    names: tuple[str, str, str],
    ahead: np.ndarray,
    curves: dict[str, Curve],
    used: dict[str, Any],
    fitted: int,
) -> Result:
    """names: metric, title, about. fitted: rows that the classifier was fitted on."""
    metric, title, about = names
    copies = embedded.groups(probe.test.rows)
    return Result(
        metric,
        embedded.name,
        accuracies(ahead, probe.test.labels, len(probe.names), probe.top_k, copies),
        title,
        about,
        headlines=("top_1",),
        curves=curves,
        settings=probe.used | used,
        rows=probe.rows | {"fitted": fitted},
        fingerprint=embedded.source.get("fingerprint"),
        outcomes=in_top(ahead, probe.top_k) | ({} if copies is None else {"group": copies}),
    )


def _search_curves(chosen: float, tried: dict[float, tuple[float, float]], rows: int, classes: int) -> dict[str, Curve]:
    def curve(y: Sequence[float], label: str, unit: Unit, chance: float) -> Curve:
        y_label, at_chance = f"{label} on held-out rows", [chance] * len(y)
        axis: dict[str, Any] = {"x_label": "penalty λ", "logarithmic": True, "chosen": chosen}
        return Curve(list(tried), list(y), y_label=y_label, unit=unit, chance=at_chance, **axis)

    found, losses = zip(*tried.values(), strict=True)
    low, high = zip(*(wilson(accuracy, rows) for accuracy in found), strict=True)
    accuracy = curve(found, "top-1", "share", 1 / classes)
    return {
        "held_out_accuracy": replace(accuracy, low=list(low), high=list(high)),
        "held_out_loss": curve(losses, "cross-entropy", "nats", math.log(classes)),
    }


def hold_out(order: Sequence[np.ndarray], part: float) -> tuple[np.ndarray, np.ndarray]:
    """Positions to fit on and positions held out, both ascending.

    The part of each class, rounded, is held out, at least one row of a class of two or more and never all of them; a
    single row is fitted on. Raises ValueError if nothing can be held out.
    """
    counts = [min(max(1, round(part * len(places))), len(places) - 1) for places in order]
    require(any(counts), "validation", None, "every class has a single row, none can be held out: fix `strength`")
    held_out, kept = zip(*((places[:n], places[n:]) for places, n in zip(order, counts, strict=True)), strict=True)
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held_out))


def fit_by_adamw(
    features: Features, classes: int, config: AdamWProbeConfig, seed: int, device: torch.device
) -> tuple[LinearClassifier, list[float]]:
    """A classifier after config.epochs passes over the rows, and the mean loss of each pass.

    features: labels 0 … classes - 1. seed: of the initial weights (uniform within 1 / sqrt(D), as in torch's Linear)
    and of the order of rows in each pass. Up to 256 MiB of rows stay in memory, else each batch is read from the file.
    """
    count, dimension = len(features), features.dimension
    generator, bound = torch.Generator().manual_seed(seed), dimension**-0.5
    weight, bias = (
        torch.empty(shape).uniform_(-bound, bound, generator=generator).to(device).requires_grad_()
        for shape in ((classes, dimension), (classes,))
    )
    groups = [{"params": [weight], "weight_decay": config.weight_decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    steps = config.epochs * math.ceil(count / config.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    labels = torch.from_numpy(features.labels).to(device)
    held = features.read(np.arange(count), device) if 4 * count * dimension <= HELD_ON_CPU else None
    losses = []
    for _ in tqdm(range(config.epochs), desc="probe", unit="epoch", disable=not distributed.is_main(), leave=False):
        total = torch.zeros((), device=device, dtype=torch.float64)
        for places in torch.randperm(count, generator=generator).split(config.batch):
            places = places.sort().values
            rows = held[places.to(device)] if held is not None else features.read(places.numpy(), device)
            optimizer.zero_grad()
            loss = cross_entropy(torch.addmm(bias, rows, weight.T), labels[places.to(device)])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach().double() * len(places)
        losses.append(float(total) / count)
    found_weight, found_bias = (parameter.detach().double().cpu().numpy() for parameter in (weight, bias))
    return LinearClassifier(found_weight, found_bias, steps, "epochs"), losses
