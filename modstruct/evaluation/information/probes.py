"""Probes: cross-validated cross-entropy of a label given features, row by row.

For a probe h not trained on a row, E CE(h(X), Y) >= H(Y | X), so H(Y) less its held-out cross-entropy is at most
I(X; Y), on average over rows. Penalty, kind of probe and features are chosen on rows of the training folds, never on
the rows that are evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from modstruct import distributed
from modstruct.errors import require, require_counts
from modstruct.evaluation.classification import linear

Answer = tuple[float, np.ndarray]
"""A probe's loss on the tuning rows, and its losses on the held-out ones, in nats."""
TUNING_SHARE = 0.2
"""Share of the training folds' rows on which penalty, probe and features are chosen."""
PATIENCE = 5
"""Epochs without a lower tuning loss after which the perceptron's training ends."""


@dataclass(frozen=True)
class ProbeConfig:
    """What is measured, and how the probes are fitted and chosen."""

    labels: list[str] = field(default_factory=list)
    """Fields of the metadata, of numbers or texts; by default the set's classes, of built-in scenes all factors."""
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
        for name in ("rows", "hidden", "words"):
            require(getattr(self, name) >= 0, f"information.{name}", getattr(self, name), "at least 0")
        strengths = bool(self.strengths) and all(0 < strength < float("inf") for strength in self.strengths)
        require(strengths, "information.strengths", self.strengths, "one or more, above 0 and finite")


@dataclass(frozen=True)
class Fold:
    """Rows of a fold, ascending. training: fitting and tuning together."""

    number: int
    training: np.ndarray
    held_out: np.ndarray
    fitting: np.ndarray
    tuning: np.ndarray


@dataclass(frozen=True)
class Probed:
    """What is probed of a label. features: by name, of n rows of the set with a label; groups: (n,), rows that belong
    together."""

    features: dict[str, linear.Features]
    rows: np.ndarray
    groups: np.ndarray
    classes: int
    folds: list[Fold]

    @property
    def labels(self) -> np.ndarray:
        return next(iter(self.features.values())).labels


def drawn(rows: np.ndarray, config: ProbeConfig) -> np.ndarray:
    """At most config.rows of these rows, drawn at random, in their order."""
    if not config.rows or len(rows) <= config.rows:
        return rows
    return rows[np.sort(np.random.default_rng([config.seed, 3]).choice(len(rows), config.rows, replace=False))]


def folds_of(groups: np.ndarray, config: ProbeConfig) -> list[Fold]:
    """groups: (n,), rows of one value are always in the same fold. Raises ValueError for fewer groups than folds."""
    known, numbers = np.unique(groups, return_inverse=True)
    remedy = f"at most {len(known)}, the images there are"
    require(len(known) >= config.folds, "information.folds", config.folds, remedy)
    fold_of = (np.random.default_rng([config.seed, 0]).permutation(len(known)) % config.folds)[numbers]
    folds = []
    for fold in range(config.folds):
        training, held_out = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        tuned = np.random.default_rng([config.seed, 1, fold]).permutation(np.unique(groups[training]))
        tuning = np.isin(groups[training], tuned[: max(1, round(TUNING_SHARE * len(tuned)))])
        folds.append(Fold(fold, training, held_out, training[~tuning], training[tuning]))
    return folds


def shares(labels: np.ndarray, fold: Fold, classes: int) -> Answer:
    """The probe without features: the label's shares."""

    def fitted(rows: np.ndarray) -> np.ndarray:
        return -np.log((np.bincount(labels[rows], minlength=classes) + 1) / (len(rows) + classes))

    return float(fitted(fold.fitting)[labels[fold.tuning]].mean()), fitted(fold.training)[labels[fold.held_out]]


def probed(features: linear.Features, fold: Fold, classes: int, config: ProbeConfig) -> dict[str, Answer]:
    """Each kind of probe, of features with labels 0 … classes - 1, fitted on the fitting rows, which memory holds.

    Its probabilities are mixed with the label's shares at a weight of 1 / (fitting rows), so that no single row has an
    unbounded loss.
    """
    blocks, rows = _scaled_blocks(features, fold, classes, config), len(fold.fitting)
    fitting, tuning, held_out = blocks(fold.fitting), blocks(fold.tuning), blocks(fold.held_out)
    least, fitted = _linear(fitting, tuning, blocks(fold.training), classes, config)
    answers = {"linear": (least, _losses(fitted.scores(held_out), held_out))}
    if config.hidden:
        least, network = _perceptron(fitting, tuning, fold.number, classes, config)
        answers["perceptron"] = least, _losses(_scores(network, held_out), held_out)
    _, by_shares = shares(features.labels, fold, classes)
    mixed = np.log1p(-1 / (rows + 1)), -np.log(rows + 1) - by_shares
    return {kind: (loss, -np.logaddexp(mixed[0] - losses, mixed[1])) for kind, (loss, losses) in answers.items()}


def linear_right(features: linear.Features, fold: Fold, classes: int, config: ProbeConfig) -> np.ndarray:
    """Whether the linear one of these probes is right, (h,) bool, of the held-out rows; a tie counts against it."""
    blocks = _scaled_blocks(features, fold, classes, config)
    _, fitted = _linear(blocks(fold.fitting), blocks(fold.tuning), blocks(fold.training), classes, config)
    return fitted.ahead(blocks(fold.held_out))[0] == 0


def _scaled_blocks(
    features: linear.Features, fold: Fold, classes: int, config: ProbeConfig
) -> Callable[[np.ndarray], linear.RowBlocks]:
    """What reads rows at some places, with columns of unit deviation over the fitting rows."""
    device, width = distributed.device(), max(classes, config.hidden)
    scaled = features.standardised_by(linear.column_statistics(features.take(fold.fitting), device))
    return lambda places: linear.RowBlocks(scaled.take(places), device, width=width)


def _linear(
    fitting: linear.RowBlocks, tuning: linear.RowBlocks, training: linear.RowBlocks, classes: int, config: ProbeConfig
) -> tuple[float, linear.LinearClassifier]:
    """A logistic regression on the training rows, with the penalty that has the least tuning loss, and that loss."""
    fit = linear.FitConfig(max_iterations=config.iterations)
    tried: dict[float, tuple[float, linear.LinearClassifier]] = {}
    last: linear.LinearClassifier | None = None
    for strength in sorted(config.strengths, reverse=True):
        last = linear.fit_logistic_regression(fitting, classes, strength, fit, last)
        tried[strength] = float(_losses(last.scores(tuning), tuning).mean()), last
    strength = min(tried, key=lambda strength: tried[strength][0])
    least, start = tried[strength]
    # The penalty is weighed against a sum over rows, of which there are now more.
    strength *= len(training) / len(fitting)
    return least, linear.fit_logistic_regression(training, classes, strength, fit, start)


def _perceptron(
    fitting: linear.RowBlocks, tuning: linear.RowBlocks, fold: int, classes: int, config: ProbeConfig
) -> tuple[float, nn.Module]:
    """One hidden layer, trained by AdamW on the fitting rows, stopped where the tuning loss is least."""
    device = distributed.device()
    rows, labels = (torch.cat(parts) for parts in zip(*((some, own) for _, some, own in fitting), strict=True))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed * 1_000 + fold)
        network = nn.Sequential(
            nn.Linear(rows.shape[1], config.hidden), nn.GELU(), nn.Dropout(0.2), nn.Linear(config.hidden, classes)
        ).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        order = np.random.default_rng([config.seed, 2, fold])
        best, kept, waited = float("inf"), network.state_dict(), 0
        for _ in range(config.epochs):
            network.train()
            for places in np.array_split(order.permutation(len(rows)), -(-len(rows) // config.batch)):
                chosen = torch.from_numpy(np.sort(places)).to(device)
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(rows[chosen]), labels[chosen]).backward()
                optimizer.step()
            network.eval()
            loss = float(_losses(_scores(network, tuning), tuning).mean())
            waited += 1
            if loss < best:
                best, kept, waited = loss, copy.deepcopy(network.state_dict()), 0
            if waited == PATIENCE:
                break
    network.load_state_dict(kept)
    return best, network


Scores = Iterator[tuple[slice, Tensor, Tensor]]
"""Place, scores (b, C) and labels (b,) of each block."""


def _scores(network: nn.Module, blocks: linear.RowBlocks) -> Scores:
    return ((place, network(rows), labels) for place, rows, labels in blocks)


@torch.no_grad()
def _losses(scores: Scores, blocks: linear.RowBlocks) -> np.ndarray:
    """-log p(y | x) of each row, (n,) float64."""
    found = np.empty(len(blocks))
    for place, of_classes, labels in scores:
        found[place] = nn.functional.cross_entropy(of_classes, labels, reduction="none").double().cpu().numpy()
    return found
