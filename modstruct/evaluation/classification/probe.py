"""What probes of an embedded set share: its labelled splits, checked against each other, and how rows are drawn."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np

from modstruct import distributed
from modstruct.distributed.collect import share_out
from modstruct.errors import require
from modstruct.evaluation.classification.features import Features, RowBlocks, paired_blocks
from modstruct.evaluation.classification.logistic_regression import (
    FitConfig,
    LinearClassifier,
    fit_logistic_regression,
    search_strength,
)
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.rows import check_rows
from modstruct.evaluation.statistics import majority_label

log = logging.getLogger(__name__)
BEFORE_PROJECTION = "image_features"


@dataclass(frozen=True)
class ProbeConfig:
    """Which features a probe sees, and how it is fitted."""

    section: ClassVar[str] = "linear_probe"
    features: str = BEFORE_PROJECTION
    """Embeddings of the set, several joined by "+": "image" is the shared one, "image_features" before the projection
    (CLIP's choice; linear_probe_adamw then takes CyCLIP's, "image_projected"), "image_independent" of the independent
    head."""
    unit_norm: bool = False
    """Divide each embedding's rows by their norm."""
    standardize: bool = False
    """Shift and scale columns to mean 0 and deviation 1 over the rows to fit on. CLIP does neither."""
    strength: float | None = None
    """Weight of the penalty of the logistic regression; by default chosen by CLIP's search on held-out rows."""
    seed: int = 0
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        positive = self.strength is None or self.strength > 0
        require(positive, f"{self.section}.strength", self.strength, "above 0, or leave it out")


@dataclass(frozen=True)
class Probe:
    """Features whose labels number the classes that have a training row, and the keys of their images.

    names: of those classes. keys: of the rows of "train" and "validation". used: features, sets and sizes, for a
    result's settings.
    """

    config: ProbeConfig
    names: list[str]
    train: Features
    test: Features
    validation: Features | None
    keys: dict[str, list[str]]
    used: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, embedded: EmbeddedSet, config: ProbeConfig, default: str = BEFORE_PROJECTION) -> Probe:
        """Features of a set and of its splits "train" and "validation", checked against each other before any fit.

        Where the default features were not embedded "image" serves, and the log says so. Rows without a label are left
        out; so are classes without a training row, which no other set may have.
        Raises ValueError naming the set: no training split, no labels, other classes, a class without a training row,
        fewer than two classes, another model; an array that is missing, named twice, of another size, or not finite.
        """
        remedy = "the training split is not embedded (embed --all_splits true)"
        require("train" in embedded.splits, "train", None, remedy)
        sets = {"train": embedded.splits["train"], "test": embedded} | embedded.splits
        train, features = sets["train"], config.features
        if features == default and features not in train.arrays:
            features = "image"
            if distributed.is_main():
                remedy = "embed --embedding.arrays '[all]'"
                log.warning("%s: probed on image, since %s is not embedded (%s)", embedded.name, default, remedy)
        for role, one in sets.items():
            _check_against(train, one, role)
        labels = {role: np.asarray(one.labels, dtype=np.int64) for role, one in sets.items()}
        known = np.unique(labels["train"][labels["train"] >= 0])
        remedy = f"has images of {len(known)} of its classes: give images of at least two"
        require(len(known) >= 2, "train", train.name, remedy)
        place = np.full(len(train.class_names) + 1, -1, dtype=np.int64)  # the last entry is for label -1
        place[known] = np.arange(len(known))
        found: dict[str, Features] = {}
        for role, one in sets.items():
            lost = [train.class_names[c] for c in np.setdiff1d(labels[role][labels[role] >= 0], known)]
            remedy = f"of which {train.name} has none ({len(lost)} such classes): add some, or take the class out"
            require(not lost, role, one.name, f"has images of {lost[:1]}, {remedy}")
            found[role] = select_features(one, features, place[labels[role]], config.unit_norm)
            columns, expected = found[role].dimension, found["train"].dimension
            remedy = f"has {columns} columns of {features}, {train.name} has {expected}: embed both with one model"
            require(columns == expected, role, one.name, remedy)
        majority = majority_label(found["train"].labels.tolist())
        used = asdict(config) | {
            "features": features,
            "features_asked": config.features,
            "train": train.name,
            "validation": sets["validation"].name if "validation" in sets else None,
            "classes": len(known),
            "dimension": found["train"].dimension,
            "majority_share": float(np.mean(found["test"].labels == majority)),
        }
        keys = {role: [sets[role].keys[row] for row in found[role].rows] for role in sets if role != "test"}
        names = [train.class_names[c] for c in known]
        return cls(config, names, found["train"], found["test"], found.get("validation"), keys, used)

    @property
    def top_k(self) -> list[int]:
        return [k for k in (1, 5) if k == 1 or k < len(self.names)]

    @property
    def rows(self) -> dict[str, int]:
        """Labelled rows of each set."""
        sets = {"train": self.train, "test": self.test, "validation": self.validation}
        return {role: len(features) for role, features in sets.items() if features is not None}

    def blocks(self, fitted: Sequence[Features], others: Features) -> tuple[RowBlocks, RowBlocks]:
        config = self.config
        device, dtype = distributed.device(), config.fit.dtype
        return paired_blocks(fitted, others, config.standardize, len(self.names), device, dtype)

    def search(self, fitted: Features, held_out: Features) -> tuple[float, dict[float, tuple[float, float]]]:
        """`search_strength` with fits on some rows, scored on others, shared out over the processes."""
        blocks, watched = self.blocks([fitted], held_out)

        def score(strength: float) -> tuple[float, float]:
            ahead, loss = fit_logistic_regression(blocks, len(self.names), strength, self.config.fit).ahead(watched)
            return float(np.mean(ahead == 0)), loss

        return search_strength(lambda strengths: share_out(strengths, score, "penalties"))

    def classify(self, fitted: Sequence[Features], strength: float) -> tuple[np.ndarray, LinearClassifier]:
        """`classes_ahead` of each test row by a fit on some rows, and that fit."""
        blocks, test = self.blocks(fitted, self.test)
        classifier = fit_logistic_regression(blocks, len(self.names), strength, self.config.fit)
        return classifier.ahead(test)[0], classifier


def select_features(embedded: EmbeddedSet, features: str, labels: np.ndarray, unit: bool = False) -> Features:
    """The labelled rows of a set. labels: (n,) int64, one for each row; features, unit, errors: as `Probe.of`."""
    names = [name.strip() for name in features.split("+")]
    require(len(set(names)) == len(names), "features", features, "name each embedding once")
    for name in names:
        rows = embedded.rows(name)
        remedy = f"{embedded.name} has {len(rows)} rows of {name} and {len(labels)} labels: name embeddings of images"
        require(len(rows) == len(labels), "features", features, remedy)
        check_rows(f"{embedded.name}'s {name}", rows)
    chosen = np.flatnonzero(labels >= 0)
    return Features(tuple(map(embedded.rows, names)), chosen, labels[chosen], unit)


def _check_against(train: EmbeddedSet, embedded: EmbeddedSet, role: str) -> None:
    labelled = embedded.labels is not None and bool(np.any(embedded.labels >= 0))
    require(labelled, role, embedded.name, "has no labelled image: probes take sets with classes")
    ours, theirs = (f"{m.get('name')!r} ({m.get('fingerprint')})" for m in (embedded.model, train.model))
    remedy = f"is of the model {ours}, {train.name} of {theirs}: embed both with one model"
    require(embedded.model.get("fingerprint") == train.model.get("fingerprint"), role, embedded.name, remedy)
    names, known = embedded.class_names, train.class_names
    first = next((number for number, (a, b) in enumerate(zip_longest(names, known)) if a != b), None)
    remedy = f"has {len(names)} classes and {train.name} {len(known)}, and they differ from class {first} on"
    require(first is None, role, embedded.name, f"{remedy}: give sets of the same classes in the same order")


def drawn_order(labels: np.ndarray, keys: Sequence[str], seed: int, draw: int = 0) -> list[np.ndarray]:
    """Positions of each class's rows in random order, one array for each class that occurs, ascending by class.

    labels: (n,) int64. keys: of the n rows. The order is that of a 64-bit hash of seed, draw and key, so it does not
    depend on the model, row numbers or unreadable rows, and comparisons are paired; the first k of a class are among
    its first k + 1. Rows with the same key follow each other.
    """
    prefix = hashlib.blake2b(f"{seed}/{draw}/".encode(), digest_size=8)
    hashes = np.empty(len(labels), dtype=np.uint64)
    for place, key in enumerate(keys):
        hashed = prefix.copy()
        hashed.update(key.encode("utf-8", "surrogatepass"))
        hashes[place] = int.from_bytes(hashed.digest(), "little")
    order = np.lexsort((hashes, labels))
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
