"""Probes: cross-validated cross-entropy of a label given features, row by row.

For a probe h not trained on a row, E CE(h(X), Y) >= H(Y | X), so H(Y) less its held-out cross-entropy is at most
I(X; Y), on average over rows. Penalty, kind of probe and features are chosen on rows of the training folds, never on
the rows that are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
"""Share of the training folds' rows on which penalty, probe and features are chosen."""


@dataclass(frozen=True)
class ProbeConfig:
    """The probes, and how they are fitted and chosen."""

    folds: int = 5
    rows: int = 50_000
    """Most rows used, drawn at random; 0 takes all. A probe on many rows is slow and hardly better."""
    strengths: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    """Penalties of logistic regression to choose from: lambda in sum_i CE_i + lambda / 2 |W|^2."""
    iterations: int = 150
    """Most L-BFGS steps of a logistic regression."""
    hidden: int = 256
    """Width of the hidden layer of the perceptron; 0 leaves it out."""
    epochs: int = 40
    """Most epochs of the perceptron: that with the least tuning loss is taken."""
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
    """-log p(y | x) of each row by probes not trained on it, (n,), nats; how often each probe was chosen, by name."""

    rows: np.ndarray
    chosen: dict[str, int]


@dataclass(frozen=True)
class Fold:
    """Rows of a fold, ascending. training: fitting and tuning together."""

    number: int
    training: np.ndarray
    held_out: np.ndarray
    fitting: np.ndarray
    tuning: np.ndarray


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
    it; in each fold the probe with the least loss on tuning rows answers. groups: (n,), rows of one value are always in
    the same fold. The label's shares are among the probes that may answer.
    Every probe's probabilities are mixed with the label's shares at a weight of 1 / (training rows), so that no single
    row has an unbounded loss. Raises ValueError for fewer groups than folds.
    """
    first = next(iter(features.values()))
    losses = {question: np.empty(len(first)) for question in questions}
    chosen: dict[str, dict[str, int]] = {question: {} for question in questions}
    for fold in _folds(groups, config):
        answers = {"shares": _shares(first.labels, fold, classes)}
        for name, rows in features.items():
            for kind, fit in (("linear", _linear), ("perceptron", _perceptron)):
                if kind == "linear" or config.hidden:
                    tuning_loss, held = fit(rows, fold, classes, config, device)
                    answers[f"{name}, {kind}"] = tuning_loss, _mixed(held, answers["shares"][1], len(fold.fitting))
        for question, names in questions.items():
            able = [a for a in answers if a == "shares" or a.rsplit(", ", 1)[0] in names]
            best = min(able, key=lambda answer: answers[answer][0])
            losses[question][fold.held_out] = answers[best][1]
            chosen[question][best] = chosen[question].get(best, 0) + 1
    return {question: Losses(losses[question], chosen[question]) for question in questions}


def _folds(groups: np.ndarray, config: ProbeConfig) -> Iterator[Fold]:
    known, numbers = np.unique(groups, return_inverse=True)
    require(
        len(known) >= config.folds, "information.folds", config.folds, f"at most {len(known)}, the images there are"
    )
    fold_of = (np.random.default_rng([config.seed, 0]).permutation(len(known)) % config.folds)[numbers]
    for fold in range(config.folds):
        training, held_out = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        tuned = np.random.default_rng([config.seed, 1, fold]).permutation(np.unique(groups[training]))
        tuning = np.isin(groups[training], tuned[: max(1, round(TUNING_SHARE * len(tuned)))])
        yield Fold(fold, training, held_out, training[~tuning], training[tuning])


def _shares(labels: np.ndarray, fold: Fold, classes: int) -> tuple[float, np.ndarray]:
    """The probe without features: tuning loss, and held-out losses."""

    def fitted(rows: np.ndarray) -> np.ndarray:
        return -np.log((np.bincount(labels[rows], minlength=classes) + 1) / (len(rows) + classes))

    return float(fitted(fold.fitting)[labels[fold.tuning]].mean()), fitted(fold.training)[labels[fold.held_out]]


def _mixed(losses: np.ndarray, by_shares: np.ndarray, rows: int) -> np.ndarray:
    return -np.logaddexp(np.log1p(-1 / (rows + 1)) - losses, -np.log(rows + 1) - by_shares)


def _linear(
    features: Features, fold: Fold, classes: int, config: ProbeConfig, device: torch.device
) -> tuple[float, np.ndarray]:
    """Logistic regression, its penalty chosen on the tuning rows, then fitted to all training rows."""
    fit_config = FitConfig(max_iterations=config.iterations)
    scaled = features.standardised_by(column_statistics(features.take(fold.fitting), device))
    blocks = RowBlocks(scaled.take(fold.fitting), device, width=classes)
    watched = RowBlocks(scaled.take(fold.tuning), device, width=classes)
    least, strength = float("inf"), config.strengths[0]
    classifier: LinearClassifier | None = None
    best: LinearClassifier | None = None
    for tried in sorted(config.strengths, reverse=True):
        classifier = fit_logistic_regression(blocks, classes, tried, fit_config, classifier)
        loss = float(_losses(_scores(classifier), watched).mean())
        if loss < least:
            least, strength, best = loss, tried, classifier
    blocks = RowBlocks(scaled.take(fold.training), device, width=classes)
    # The penalty is weighed against a sum over rows, of which there are now more.
    strength = strength * len(fold.training) / len(fold.fitting)
    classifier = fit_logistic_regression(blocks, classes, strength, fit_config, best)
    return least, _losses(_scores(classifier), RowBlocks(scaled.take(fold.held_out), device, width=classes))


def _scores(classifier: LinearClassifier) -> LogProbabilities:
    weight, bias = torch.from_numpy(classifier.weight).float(), torch.from_numpy(classifier.bias).float()
    return lambda rows: torch.addmm(bias.to(rows), rows, weight.to(rows).T).log_softmax(1)


def _perceptron(
    features: Features, fold: Fold, classes: int, config: ProbeConfig, device: torch.device
) -> tuple[float, np.ndarray]:
    """One hidden layer, trained by AdamW on the fitting rows, stopped where the tuning loss is least."""
    scaled = features.standardised_by(column_statistics(features.take(fold.fitting), device))
    watched = RowBlocks(scaled.take(fold.tuning), device, width=config.hidden)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed * 1_000 + fold.number)
        network = nn.Sequential(
            nn.Linear(scaled.dimension, config.hidden), nn.GELU(), nn.Dropout(0.2), nn.Linear(config.hidden, classes)
        ).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        order = np.random.default_rng([config.seed, 2, fold.number])
        best, kept, waited = float("inf"), network.state_dict(), 0
        for _ in range(config.epochs):
            network.train()
            for places in np.array_split(order.permutation(fold.fitting), -(-len(fold.fitting) // config.batch)):
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
    unseen = RowBlocks(scaled.take(fold.held_out), device, width=config.hidden)
    return best, _losses(lambda rows: network(rows).log_softmax(1), unseen)


@torch.no_grad()
def _losses(log_probabilities: LogProbabilities, blocks: RowBlocks) -> np.ndarray:
    found = np.empty(len(blocks))
    for place, rows, labels in blocks:
        found[place] = -log_probabilities(rows).gather(1, labels[:, None])[:, 0].double().cpu().numpy()
    return found
