"""Linear probe of an embedded set: CLIP's logistic regression, or CyCLIP's training by AdamW."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from modstruct.errors import require
from modstruct.evaluation.classification.adamw_probe import AdamWProbeConfig, fit_by_adamw
from modstruct.evaluation.classification.features import (
    Features,
    ProbeInputs,
    RowBlocks,
    column_statistics,
    drawn_order,
    hold_out,
    paired_blocks,
    probe_inputs,
)
from modstruct.evaluation.classification.logistic_regression import (
    FitConfig,
    LinearClassifier,
    Split,
    Sweep,
    classes_ahead,
    fit_logistic_regression,
    sweep_strength,
)
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.statistics import bootstrap_mean, majority_label

CPU = torch.device("cpu")
TOP_K = (1, 5)
Result = tuple[dict[str, Any], dict[str, np.ndarray]]
"""Content of METRIC.json but for "command", and outcomes of each row of the test set."""
Fitted = tuple[tuple[LinearClassifier, int, np.ndarray], dict[str, list[float]], dict[str, Any]]
"""(Classifier, rows it was fitted on, classes ahead of each test row's own), curves, settings."""


@dataclass(frozen=True)
class LinearProbeConfig:
    """Which features a probe sees, and how it is fitted."""

    features: str = "image_features"
    """Embeddings of the set, several joined by "+": "image" is the shared one, "image_features" before the projection
    (CLIP's choice), "image_independent" of the independent head."""
    unit_norm: bool = False
    """Divide each embedding's rows by their norm."""
    standardize: bool = False
    """Shift and scale columns to mean 0 and deviation 1 over the rows to fit on. CLIP does neither."""
    method: Literal["lbfgs", "adamw"] = "lbfgs"
    """CLIP's logistic regression, or CyCLIP's training by AdamW."""
    strength: float | None = None
    """Weight of the penalty (lbfgs); by default chosen by CLIP's search on held-out rows."""
    validation_share: float = 0.2
    """Share of each class of the training set that is held out for the search if there is no validation set."""
    seed: int = 0
    fit: FitConfig = field(default_factory=FitConfig)
    adamw: AdamWProbeConfig = field(default_factory=AdamWProbeConfig)

    def __post_init__(self) -> None:
        require(self.method in ("lbfgs", "adamw"), "linear_probe.method", self.method, "lbfgs or adamw")
        positive = self.strength is None or self.strength > 0
        require(positive, "linear_probe.strength", self.strength, "above 0, or leave it out")
        share = self.validation_share
        require(0 < share < 1, "linear_probe.validation_share", share, "between 0 and 1")


def measure_linear_probe(
    train: EmbeddedSet,
    test: EmbeddedSet,
    validation: EmbeddedSet | None = None,
    config: LinearProbeConfig | None = None,
    device: torch.device = CPU,
    progress: bool = False,
) -> Result:
    """Fit a linear classifier on the training set's features and classify the test set (Radford et al. 2021, A.3).

    lbfgs: the strength of the penalty is searched with fits on the training set, scored on the validation set or on a
    share of the training set; the last fit has both. adamw: fitted on the training set; the validation set is not used.
    train, test, validation: of one model and the same classes. Runs on one process.
    Outcomes: "top_1" and "top_5", (rows,) float32, of the test set's labelled rows in their order, and "group", the
    image of each, where some are copies. "low" and "high" of a metric are its 95 % interval over test images. Raises
    ValueError as `probe_inputs` does.
    """
    config = config or LinearProbeConfig()
    started = time.perf_counter()
    inputs = probe_inputs(train, test, validation, config.features, config.unit_norm)
    fit = _by_adamw if config.method == "adamw" else _by_lbfgs
    (classifier, fitted_on, ahead), curves, used = fit(inputs, config, device, progress)
    metrics, outcomes = accuracy_metrics(ahead, inputs.test.labels, inputs.classes), hits(ahead, inputs.classes)
    copies = test.groups(inputs.test.pieces[0].rows)
    for name, hit in outcomes.items():
        metrics[name]["low"], metrics[name]["high"] = bootstrap_mean(hit, seed=config.seed, groups=copies)
    if copies is not None:
        outcomes["group"] = copies
    settings = asdict(config) | described(inputs, train, validation)
    settings |= used | {"iterations": classifier.iterations, "end": classifier.end}
    result = {
        "metric": "linear_probe",
        "set": test.name,
        "figures": metrics,
        "curves": curves,
        "settings": settings,
        "rows": inputs.rows | {"fitted": fitted_on},
        "source_fingerprint": test.source.get("fingerprint"),
        "seconds": time.perf_counter() - started,
    }
    return result, outcomes


def accuracy_metrics(ahead: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 accuracy and top-1 accuracy averaged over classes, each beside that of a uniform guess.

    ahead: (n,), other classes that score at least as high. labels: (n,). A k that is not below the number of classes
    is left out; classes without a row do not enter the average.
    Returns {"top_1": {"value": …, "chance": …, "rows": n}, …, "mean_per_class": {…, "rows": classes that occur}}.
    """
    metrics = {
        name: {"value": float(np.mean(hit, dtype=np.float64)), "chance": k / classes, "rows": len(labels)}
        for k, (name, hit) in zip(TOP_K, hits(ahead, classes).items(), strict=False)
    }
    _, place = np.unique(labels, return_inverse=True)
    per_class = np.bincount(place, weights=ahead == 0) / np.bincount(place)
    average = {"value": float(per_class.mean()), "chance": 1 / classes, "rows": len(per_class)}
    return metrics | {"mean_per_class": average}


def hits(ahead: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Whether each row's class is among the best k, (n,) float32, for the k of TOP_K below the number of classes."""
    return {f"top_{k}": (ahead < k).astype(np.float32) for k in TOP_K if k == 1 or k < classes}


def described(inputs: ProbeInputs, train: EmbeddedSet, validation: EmbeddedSet | None) -> dict[str, Any]:
    """Sets, sizes, and the share of the test set that is of the most frequent training class."""
    majority = majority_label(inputs.train.labels.tolist())
    return {
        "train": train.name,
        "validation": None if validation is None else validation.name,
        "classes": inputs.classes,
        "dimension": inputs.train.dimension,
        "majority_share": float(np.mean(inputs.test.labels == majority)),
    }


def _by_lbfgs(inputs: ProbeInputs, config: LinearProbeConfig, device: torch.device, progress: bool) -> Fitted:
    whole = inputs.train if inputs.validation is None else inputs.train.stacked(inputs.validation)
    curves: dict[str, list[float]] = {}
    used: dict[str, Any] = {}
    strength, start = config.strength, None
    if strength is None:
        fitted, held_out = inputs.train, inputs.validation
        if held_out is None:
            order = drawn_order(inputs.train.labels, inputs.train_keys, config.seed)
            kept, out = hold_out(order, config.validation_share)
            fitted, held_out = inputs.train.take(kept), inputs.train.take(out)
        sweep, start = _searched(fitted, held_out, inputs.classes, config, device, progress)
        strength = sweep.best
        curves = {
            "strength": sweep.strengths,
            "held_out_accuracy": sweep.accuracies,
            "held_out_loss": sweep.losses,
        }
        used = {"fitted_in_search": len(fitted), "held_out_in_search": len(held_out)}
    blocks, test = paired_blocks(whole, inputs.test, config.standardize, inputs.classes, device, config.fit.dtype)
    classifier = fit_logistic_regression(blocks, inputs.classes, strength, config.fit, start)
    ahead, _ = classes_ahead(classifier, test)
    return (classifier, len(whole), ahead), curves, used | {"strength": strength, "c": 1 / strength}


def _searched(
    fitted: Features,
    held_out: Features,
    classes: int,
    config: LinearProbeConfig,
    device: torch.device,
    progress: bool,
) -> tuple[Sweep, LinearClassifier | None]:
    """A function of its own, so that the rows it holds are released before the last fit."""
    split = Split(*paired_blocks(fitted, held_out, config.standardize, classes, device, config.fit.dtype))
    return sweep_strength([split], classes, config.fit, progress)


def _by_adamw(inputs: ProbeInputs, config: LinearProbeConfig, device: torch.device, progress: bool) -> Fitted:
    train, test = inputs.train, inputs.test
    if config.standardize:
        statistics = column_statistics(train, device)
        train, test = train.standardised_by(statistics), test.standardised_by(statistics)
    classifier, losses = fit_by_adamw(train, inputs.classes, config.adamw, config.seed, device, progress)
    ahead, _ = classes_ahead(classifier, RowBlocks(test, device, width=inputs.classes))
    return (classifier, len(train), ahead), {"train_loss": losses}, {}
