"""Probes: cross-validated cross-entropy of a label given features, row by row.

A probe h that never saw a row has E CE(h(X), Y) >= H(Y | X), so H(Y) less its held-out cross-entropy is at most
I(X; Y), on average over rows. All that is chosen (penalty, kind of probe, features) is chosen on rows of the training
folds, never on the rows that are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from modstruct.errors import require, require_counts
from modstruct.evaluation.classification.features import Features, RowBlocks, column_statistics
from modstruct.evaluation.classification.logistic_regression import FitConfig, LinearClassifier, fit_logistic_regression

LogProbabilities = Callable[[Tensor], Tensor]
"""Rows (b, D) -> log probabilities (b, C), float32."""
TUNING_SHARE = 0.2
"""Of the rows of the training folds, held out of them to choose with."""


@dataclass(frozen=True)
class ProbeConfig:
    """The probes, and how they are fitted and chosen. rows: 0 takes all."""

    folds: int = 5
    rows: int = 50_000
    """Rows used at most, drawn at random: a probe of many rows is slow, and few know nearly what many know."""
    strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    """Penalties of logistic regression to choose among, lambda in sum_i CE_i + lambda / 2 |W|^2, of unit deviations."""
    iterations: int = 150
    """Most L-BFGS steps of a logistic regression."""
    hidden: int = 256
    """Width of the hidden layer of the perceptron; 0 leaves it out."""
    epochs: int = 40
    """Of the perceptron, at most: the epoch that is best on the tuning rows is taken."""
    learning_rate: float = 1e-3
    batch: int = 256
    weight_decay: float = 0.1
    words: int = 1_000
    """Words and neighbouring words in the bag of words of captions; 0 leaves it out."""
    samples: int = 1_000
    """Resamples of an interval."""
    level: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.folds >= 2, "information.folds", self.folds, "at least 2")
        require_counts("information", self, ("iterations", "epochs", "batch"))
        for field in ("rows", "hidden", "words"):
            require(getattr(self, field) >= 0, f"information.{field}", getattr(self, field), "at least 0")
        strengths = bool(self.strengths) and all(0 < strength < float("inf") for strength in self.strengths)
        require(strengths, "information.strengths", self.strengths, "one or more, above 0 and finite")


@dataclass(frozen=True)
class Losses:
    """-log p(y | x) of each row by probes that did not see it, (n,), nats; and what was chosen how often, by name."""

    rows: np.ndarray
    chosen: dict[str, int]


def held_out_losses(
    features: Mapping[str, Features],
    questions: Mapping[str, Sequence[str]],
    groups: np.ndarray,
    classes: int,
    config: ProbeConfig,
    device: torch.device,
) -> dict[str, Losses]:
    """Losses of each question by cross-validation.

    features: by name, of the same n rows with labels 0 … classes - 1. questions: by name, the features that may answer
    it; in each fold the probe with the least loss on tuning rows answers. groups: (n,), rows of one value are never
    parted by a fold. The label's shares are among the probes that may answer.
    Every probe's probabilities are mixed with the label's shares at a weight of 1 / (training rows), so that no single
    row has an unbounded loss. Raises ValueError for fewer groups than folds.
    """
    first = next(iter(features.values()))
    losses = {question: np.empty(len(first)) for question in questions}
    chosen: dict[str, dict[str, int]] = {question: {} for question in questions}
    for fold, (training, held_out) in enumerate(_folds(groups, config)):
        tuned = np.random.default_rng([config.seed, 1, fold]).permutation(np.unique(groups[training]))
        tuning = np.isin(groups[training], tuned[: max(1, round(TUNING_SHARE * len(tuned)))])
        fitting, tuning = training[~tuning], training[tuning]
        answers = {"shares": _shares(first.labels, fitting, tuning, training, held_out, classes)}
        for name, rows in features.items():
            for kind, fit in (("linear", _linear), ("perceptron", _perceptron)):
                if kind == "linear" or config.hidden:
                    tuning_loss, held = fit(rows, fitting, tuning, training, held_out, classes, config, device, fold)
                    answers[f"{name}, {kind}"] = tuning_loss, _mixed(held, answers["shares"][1], len(fitting))
        for question, names in questions.items():
            able = [a for a in answers if a == "shares" or a.rsplit(", ", 1)[0] in names]
            best = min(able, key=lambda answer: answers[answer][0])
            losses[question][held_out] = answers[best][1]
            chosen[question][best] = chosen[question].get(best, 0) + 1
    return {question: Losses(losses[question], chosen[question]) for question in questions}


def _folds(groups: np.ndarray, config: ProbeConfig) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, held-out rows) of each fold, ascending."""
    known, numbers = np.unique(groups, return_inverse=True)
    require(
        len(known) >= config.folds, "information.folds", config.folds, f"at most {len(known)}, the images there are"
    )
    fold_of = np.random.default_rng([config.seed, 0]).permutation(len(known)) % config.folds
    fold = fold_of[numbers]
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(config.folds)]


def _shares(labels, fitting, tuning, training, held_out, classes: int) -> tuple[float, np.ndarray]:
    """The probe that looks at nothing: tuning loss, and held-out losses."""

    def fitted(rows: np.ndarray) -> np.ndarray:
        return -np.log((np.bincount(labels[rows], minlength=classes) + 1) / (len(rows) + classes))

    return float(fitted(fitting)[labels[tuning]].mean()), fitted(training)[labels[held_out]]


def _mixed(losses: np.ndarray, by_shares: np.ndarray, rows: int) -> np.ndarray:
    return -np.logaddexp(np.log1p(-1 / (rows + 1)) - losses, -np.log(rows + 1) - by_shares)


def _linear(features, fitting, tuning, training, held_out, classes, config: ProbeConfig, device, fold):
    """Logistic regression, its penalty chosen on the tuning rows; then fitted to all training rows."""
    fit_config = FitConfig(max_iterations=config.iterations)
    scaled = features.standardised_by(column_statistics(features.take(fitting), device))
    blocks = RowBlocks(scaled.take(fitting), device, width=classes)
    watched = RowBlocks(scaled.take(tuning), device, width=classes)
    best, classifier = (float("inf"), config.strengths[0], None), None
    for strength in sorted(config.strengths, reverse=True):
        classifier = fit_logistic_regression(blocks, classes, strength, fit_config, classifier)
        loss = float(_losses(_scores(classifier), watched).mean())
        if loss < best[0]:
            best = loss, strength, classifier
    blocks = RowBlocks(scaled.take(training), device, width=classes)
    # The penalty is weighed against a sum over rows, of which there are now more.
    strength = best[1] * len(training) / len(fitting)
    classifier = fit_logistic_regression(blocks, classes, strength, fit_config, best[2])
    return best[0], _losses(_scores(classifier), RowBlocks(scaled.take(held_out), device, width=classes))


def _scores(classifier: LinearClassifier) -> LogProbabilities:
    weight, bias = torch.from_numpy(classifier.weight).float(), torch.from_numpy(classifier.bias).float()
    return lambda rows: torch.addmm(bias.to(rows), rows, weight.to(rows).T).log_softmax(1)


def _perceptron(features, fitting, tuning, training, held_out, classes, config: ProbeConfig, device, fold):
    """One hidden layer, trained by AdamW on the fitting rows, stopped where the tuning rows are told best."""
    scaled = features.standardised_by(column_statistics(features.take(fitting), device))
    watched = RowBlocks(scaled.take(tuning), device, width=config.hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed * 1_000 + fold)
        network = nn.Sequential(
            nn.Linear(scaled.dimension, config.hidden), nn.GELU(), nn.Dropout(0.2), nn.Linear(config.hidden, classes)
        ).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        order = np.random.default_rng([config.seed, 2, fold])
        best, kept, waited = float("inf"), network.state_dict(), 0
        for _ in range(config.epochs):
            network.train()
            for places in np.array_split(order.permutation(fitting), -(-len(fitting) // config.batch)):
                places = np.sort(places)
                labels = torch.from_numpy(features.labels[places]).to(device)
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(scaled.read(places, device)), labels).backward()
                optimizer.step()
            network.eval()
            loss = float(_losses(lambda rows: network(rows).log_softmax(1), watched).mean())
            waited = 0 if loss < best else waited + 1
            if loss < best:
                best, kept = loss, {name: value.clone() for name, value in network.state_dict().items()}
            if waited == 5:
                break
    network.load_state_dict(kept)
    unseen = RowBlocks(scaled.take(held_out), device, width=config.hidden)
    return best, _losses(lambda rows: network(rows).log_softmax(1), unseen)


@torch.no_grad()
def _losses(log_probabilities: LogProbabilities, blocks: RowBlocks) -> np.ndarray:
    found = np.empty(len(blocks))
    for place, rows, labels in blocks:
        found[place] = -log_probabilities(rows).gather(1, labels[:, None])[:, 0].double().cpu().numpy()
    return found
