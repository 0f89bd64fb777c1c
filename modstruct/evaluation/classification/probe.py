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
from modstruct.distributed.collect import on_each, share_out
from modstruct.errors import require
from modstruct.evaluation.classification.linear import (
    Features,
    FitConfig,
    RowBlocks,
    column_statistics,
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
    """Features of "train", "test" and perhaps "validation", whose labels number the classes that have a training row.

    names: of those classes. keys: of the rows but those of "test". used: for a result's settings.
    """

    config: ProbeConfig
    names: list[str]
    splits: dict[str, Features]
    keys: dict[str, list[str]]
    used: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, embedded: EmbeddedSet, config: ProbeConfig, default: str = BEFORE_PROJECTION) -> Probe:
        """Features of a set and of its splits "train" and "validation", checked against each other before any fit.

        Where the default features were not embedded "image" serves, and the log says so. Rows without a label are left
        out; so are classes without a training row, which no other set may have. Raises ValueError naming the set that
        is missing or does not fit. Reads all rows: call it through `on_each`.
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
        known = np.setdiff1d([] if train.labels is None else train.labels, -1).astype(np.int64)
        place = np.full(len(train.class_names) + 1, -1, dtype=np.int64)  # the last entry is for label -1
        place[known] = np.arange(len(known))
        found: dict[str, Features] = {}
        for role, one in sets.items():
            labels = _checked_labels(train, one, role, known)
            found[role] = select_features(one, features, place[labels], config.unit_norm)
            columns, expected = found[role].dimension, found["train"].dimension
            remedy = f"has {columns} columns of {features}, {train.name} has {expected}: embed both with one model"
            require(columns == expected, role, one.name, remedy)
        used = asdict(config) | {
            "features": features,
            "features_asked": config.features,
            "train": train.name,
            "validation": sets["validation"].name if "validation" in sets else None,
            "classes": len(known),
            "dimension": found["train"].dimension,
            "majority_share": float(np.mean(found["test"].labels == majority_label(found["train"].labels.tolist()))),
        }
        keys = {role: [sets[role].keys[row] for row in found[role].rows] for role in sets if role != "test"}
        return cls(config, [train.class_names[c] for c in known], found, keys, used)

    @property
    def top_k(self) -> list[int]:
        return [1, 5] if len(self.names) > 5 else [1]

    @property
    def rows(self) -> dict[str, int]:
        return {role: len(features) for role, features in self.splits.items()}

    def blocks(self, fitted: Sequence[Features], others: Features) -> tuple[RowBlocks, RowBlocks]:
        """Blocks of rows to fit on and of other rows; if standardised, both by the statistics of the first."""
        device, dtype = distributed.device(), self.config.fit.dtype
        if self.config.standardize:
            statistics = column_statistics(fitted, device)
            fitted, others = [f.standardised_by(statistics) for f in fitted], others.standardised_by(statistics)
        width = len(self.names)
        return RowBlocks(fitted, device, dtype, width), RowBlocks(others, device, dtype, width)

    def search(self, fitted: Features, held_out: Features) -> tuple[float, dict[float, tuple[float, float]]]:
        """`search_strength` with fits on some rows, scored on others, shared out over the processes."""
        blocks, watched = on_each(lambda: self.blocks([fitted], held_out))

        def score(strength: float) -> tuple[float, float]:
            ahead, loss = fit_logistic_regression(blocks, len(self.names), strength, self.config.fit).ahead(watched)
            return float(np.mean(ahead == 0)), loss

        return search_strength(lambda strengths: share_out(strengths, score, "penalties"))

    def classify(self, fitted: Sequence[Features], strength: float) -> tuple[np.ndarray, dict[str, Any]]:
        """`classes_ahead` of each test row by a fit on some rows, and how that fit ended."""
        blocks, test = self.blocks(fitted, self.splits["test"])
        found = fit_logistic_regression(blocks, len(self.names), strength, self.config.fit)
        return found.ahead(test)[0], {"iterations": found.iterations, "end": found.end}


def select_features(embedded: EmbeddedSet, features: str, labels: np.ndarray, unit: bool = False) -> Features:
    """The labelled rows of a set. labels: (n,) int64, one for each row; features: as in `ProbeConfig`."""
    names = [name.strip() for name in features.split("+")]
    require(len(set(names)) == len(names), "features", features, "name each embedding once")
    for name in names:
        rows = embedded.rows(name)
        remedy = f"{embedded.name} has {len(rows)} rows of {name} and {len(labels)} labels: name embeddings of images"
        require(len(rows) == len(labels), "features", features, remedy)
        check_rows(f"{embedded.name}'s {name}", rows)
    chosen = np.flatnonzero(labels >= 0)
    return Features(tuple(map(embedded.rows, names)), chosen, labels[chosen], unit)


def _checked_labels(train: EmbeddedSet, one: EmbeddedSet, role: str, known: np.ndarray) -> np.ndarray:
    """(n,), if the set is of the same model and classes as the training set. known: labels of the latter's rows."""
    labels = np.full(1, -1) if one.labels is None else one.labels
    require(labels.max() >= 0, role, one.name, "has no labelled image: probes take sets with classes")
    ours, theirs = (f"{m.get('name')!r} ({m.get('fingerprint')})" for m in (one.model, train.model))
    remedy = f"is of the model {ours}, {train.name} of {theirs}: embed both with one model"
    require(one.model.get("fingerprint") == train.model.get("fingerprint"), role, one.name, remedy)
    names, classes = one.class_names, train.class_names
    first = next((number for number, (a, b) in enumerate(zip_longest(names, classes)) if a != b), None)
    remedy = f"has {len(names)} classes and {train.name} {len(classes)}, and they differ from class {first} on"
    require(first is None, role, one.name, f"{remedy}: give sets of the same classes in the same order")
    require(len(known) >= 2, role, one.name, f"has images of {len(known)} of its classes: give images of at least two")
    lost = [classes[c] for c in np.setdiff1d(labels, [-1, *known])]
    remedy = f"of which {train.name} has none ({len(lost)} such classes): add some, or take the class out"
    require(not lost, role, one.name, f"has images of {lost[:1]}, {remedy}")
    return labels


def drawn_order(
    labels: np.ndarray, keys: Sequence[str], seed: int, draw: int = 0, classes: int = 0
) -> list[np.ndarray]:
    """Positions of each class's rows in random order, one array for each class up to the last, at least `classes`.

    labels: (n,) int64. keys: of the n rows. The order is that of a 64-bit hash of seed, draw and key, so it does not
    depend on the model, row numbers or unreadable rows, and comparisons are paired.
    """
    texts = (f"{seed}/{draw}/{key}".encode("utf-8", "surrogatepass") for key in keys)
    hashes = np.frombuffer(b"".join(hashlib.blake2b(t, digest_size=8).digest() for t in texts), dtype="<u8")
    order = np.lexsort((hashes, labels))
    return np.split(order, np.bincount(labels, minlength=classes)[:-1].cumsum())
