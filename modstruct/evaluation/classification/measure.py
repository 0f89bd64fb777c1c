"""Linear probe and few-shot classification of an embedded set, as results with outcomes."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from modstruct.errors import require
from modstruct.evaluation.classification.accuracy import accuracy_metrics, hits, metrics_over_draws
from modstruct.evaluation.classification.adamw_probe import SgdConfig, fit_by_sgd
from modstruct.evaluation.classification.draws import drawn_order, hold_out
from modstruct.evaluation.classification.features import Features, RowBlocks, column_statistics, paired_blocks
from modstruct.evaluation.classification.few_shot import FewShotConfig, draw_episodes, run_episode
from modstruct.evaluation.classification.inputs import ProbeInputs, probe_inputs
from modstruct.evaluation.classification.logistic_regression import (
    FitConfig,
    LinearClassifier,
    classes_ahead,
    fit_logistic_regression,
)
from modstruct.evaluation.classification.sweep import Split, Sweep, sweep_strength
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.statistics import bootstrap_mean
from modstruct.tasks.majority import majority_label

CPU = torch.device("cpu")
Result = tuple[dict[str, Any], dict[str, np.ndarray]]


@dataclass(frozen=True)
class LinearProbeConfig:
    """Which features a probe sees, and how it is fitted."""

    features: str = "image_features"
    """Embeddings of the set, several joined by "+": "image" is the shared one, "image_features" before the projection
    (CLIP's choice), "image_independent" of the independent head."""
    unit_norm: bool = False
    """Divide each embedding's rows by their norm."""
    standardize: bool = False
    """Shift and scale columns to mean 0 and deviation 1 on the rows that are fitted. CLIP does neither."""
    method: Literal["lbfgs", "sgd"] = "lbfgs"
    """CLIP's logistic regression, or CyCLIP's training by AdamW."""
    strength: float | None = None
    """Of the penalty (lbfgs); by default chosen by CLIP's search on held-out rows."""
    validation_share: float = 0.2
    """Of each class of the training set that is held out for the search where there is no validation set."""
    seed: int = 0
    fit: FitConfig = field(default_factory=FitConfig)
    sgd: SgdConfig = field(default_factory=SgdConfig)

    def __post_init__(self) -> None:
        require(self.method in ("lbfgs", "sgd"), "linear_probe.method", self.method, "lbfgs or sgd")
        require(
            self.strength is None or self.strength > 0,
            "linear_probe.strength",
            self.strength,
            "above 0, or leave it out",
        )
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
    share of the training set; the last fit has both. sgd: fitted on the training set; the validation set is not used.
    train, test, validation: of one model and the same classes. Runs in one process, without others.
    Returns the result in the form of METRIC.json (all but "command"), and the outcomes "top_1" and "top_5", (rows,)
    float32, of the test set's labelled rows in their order. "low" and "high" of a
    figure are its 95 % interval over test rows. Raises ValueError as `probe_inputs` does.
    """
    config = config or LinearProbeConfig()
    begun = time.perf_counter()
    inputs = probe_inputs(train, test, validation, config.features, config.unit_norm)
    if config.method == "sgd":
        made, curves, used = _by_sgd(inputs, config, device, progress)
    else:
        made, curves, used = _by_lbfgs(inputs, config, device, progress)
    classifier, fitted_on, ahead = made
    figures, outcomes = accuracy_metrics(ahead, inputs.test.labels, inputs.classes), hits(ahead, inputs.classes)
    for name, hit in outcomes.items():
        figures[name]["low"], figures[name]["high"] = bootstrap_mean(hit, seed=config.seed)
    settings = asdict(config) | _described(inputs, train, validation)
    settings |= used | {"iterations": classifier.iterations, "end": classifier.end}
    rows = {"train": len(inputs.train), "test": len(inputs.test), "fitted": fitted_on}
    rows |= {"validation": len(inputs.validation)} if inputs.validation is not None else {}
    return _result("linear_probe", test, figures, curves, settings, rows, begun), outcomes


def measure_few_shot(
    train: EmbeddedSet,
    test: EmbeddedSet,
    validation: EmbeddedSet | None = None,
    config: FewShotConfig | None = None,
    device: torch.device = CPU,
    progress: bool = False,
) -> Result:
    """Classify the test set from a few training images a class, for each number of shots and each draw.

    Draws are the same for every model. Figures, by number of shots: "shots_4": {"top_1": mean over draws, …,
    "top_1_deviation": standard deviation over draws (n - 1; absent for one draw)}. Curves: over shots, and of each
    draw. Outcomes: "shots_4/top_1", (rows,) float32, the share of draws in which the row was right; rows as in
    `measure_linear_probe`. Figures have no interval: one over test rows would leave out what the draws vary.
    Raises ValueError as `probe_inputs` does, and for a class with fewer images than shots.
    """
    config = config or FewShotConfig()
    begun = time.perf_counter()
    inputs = probe_inputs(train, test, validation, config.features, config.unit_norm)
    # All are drawn before the first is fitted, so that a class that is too small is named at once.
    drawn = [draw_episodes(inputs, config, draw) for draw in range(config.draws)]
    figures: dict[str, dict] = {}
    curves: dict[str, list[float]] = {"shots": [float(shots) for shots in config.shots]}
    outcomes = {}
    with tqdm(total=len(config.shots) * config.draws, desc="draws", disable=not progress, leave=False) as bar:
        for shots in config.shots:
            found = []
            for episodes in drawn:
                found.append(run_episode(inputs, episodes[shots], shots, config, device))
                bar.update()
            each = [accuracy_metrics(one.ahead, inputs.test.labels, inputs.classes) for one in found]
            figures[f"shots_{shots}"] = over = metrics_over_draws(each)
            for name in each[0]:
                curves.setdefault(name, []).append(over[name]["value"])
                curves[f"shots_{shots}/{name}"] = [one[name]["value"] for one in each]
                if config.draws > 1:
                    curves.setdefault(f"{name}_deviation", []).append(over[f"{name}_deviation"]["value"])
            curves[f"shots_{shots}/strength"] = [one.strength for one in found]
            for name in hits(found[0].ahead, inputs.classes):
                outcomes[f"shots_{shots}/{name}"] = np.mean(
                    [hits(one.ahead, inputs.classes)[name] for one in found], axis=0, dtype=np.float32
                )
    settings = asdict(config) | _described(inputs, train, validation)
    rows = {"train": len(inputs.train), "test": len(inputs.test)}
    rows |= {"validation": len(inputs.validation)} if inputs.validation is not None else {}
    return _result("few_shot", test, figures, curves, settings, rows, begun), outcomes


Made = tuple[LinearClassifier, int, np.ndarray]


def _by_lbfgs(
    inputs: ProbeInputs, config: LinearProbeConfig, device: torch.device, progress: bool
) -> tuple[Made, dict[str, list[float]], dict[str, Any]]:
    whole = inputs.train if inputs.validation is None else inputs.train.stacked(inputs.validation)
    strength, start, curves, used = config.strength, None, {}, {}
    if strength is None:
        fitted, held_out = inputs.train, inputs.validation
        if held_out is None:
            kept, out = hold_out(
                drawn_order(inputs.train.labels, inputs.train_keys, config.seed), config.validation_share
            )
            fitted, held_out = inputs.train.take(kept), inputs.train.take(out)
        sweep, start = _searched(fitted, held_out, inputs.classes, config, device, progress)
        strength, curves = sweep.best, _curves(sweep)
        used = {"fitted_in_search": len(fitted), "held_out_in_search": len(held_out)}
    fitted, test = paired_blocks(whole, inputs.test, config.standardize, inputs.classes, device, config.fit.dtype)
    classifier = fit_logistic_regression(fitted, inputs.classes, strength, config.fit, start)
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
    """Apart, so that the rows that it holds are let go before the last fit."""
    split = Split(*paired_blocks(fitted, held_out, config.standardize, classes, device, config.fit.dtype))
    return sweep_strength([split], classes, config.fit, progress)


def _by_sgd(
    inputs: ProbeInputs, config: LinearProbeConfig, device: torch.device, progress: bool
) -> tuple[Made, dict[str, list[float]], dict[str, Any]]:
    train, test = inputs.train, inputs.test
    if config.standardize:
        statistics = column_statistics(train, device)
        train, test = train.standardised_by(statistics), test.standardised_by(statistics)
    classifier, losses = fit_by_sgd(train, inputs.classes, config.sgd, config.seed, device, progress)
    ahead, _ = classes_ahead(classifier, RowBlocks(test, device, width=inputs.classes))
    return (classifier, len(train), ahead), {"train_loss": losses}, {}


def _curves(sweep: Sweep) -> dict[str, list[float]]:
    return {
        "strength": sweep.strengths,
        "held_out_accuracy": sweep.accuracies,
        "held_out_loss": sweep.losses,
    }


def _described(inputs: ProbeInputs, train: EmbeddedSet, validation: EmbeddedSet | None) -> dict[str, Any]:
    """What was classified from what, and how well the most frequent training class would do on the test set."""
    majority = majority_label(inputs.train.labels.tolist())
    return {
        "train": train.name,
        "validation": None if validation is None else validation.name,
        "classes": inputs.classes,
        "dimension": inputs.train.dimension,
        "majority_share": float(np.mean(inputs.test.labels == majority)),
    }


def _result(
    metric: str,
    test: EmbeddedSet,
    figures: dict,
    curves: dict[str, list[float]],
    settings: dict[str, Any],
    rows: dict[str, int],
    begun: float,
) -> dict[str, Any]:
    return {
        "metric": metric,
        "set": test.name,
        "figures": figures,
        "curves": curves,
        "settings": settings,
        "rows": rows,
        "source_fingerprint": (test.manifest.get("source") or {}).get("fingerprint"),
        "seconds": time.perf_counter() - begun,
    }
