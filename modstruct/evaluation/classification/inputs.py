"""The sets of a probe, checked against each other before anything is fitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from modstruct.errors import refuse, require
from modstruct.evaluation.classification.features import Features, select_features
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet


@dataclass(frozen=True)
class ProbeInputs:
    """Features whose labels count the classes that have a training row. names: of those classes, ascending by row."""

    names: list[str]
    train: Features
    test: Features
    validation: Features | None
    train_keys: list[str]
    validation_keys: list[str]

    @property
    def classes(self) -> int:
        return len(self.names)


def probe_inputs(
    train: EmbeddedSet, test: EmbeddedSet, validation: EmbeddedSet | None, features: str, unit: bool
) -> ProbeInputs:
    """Select the features of all sets.

    Rows without a label are left out; so are classes without a training row, which none of the other sets may have.
    Raises ValueError naming the set: no labels, other classes, a class that only one has, fewer than two classes,
    another model, another dimension, rows that are not finite.
    """
    sets = {"train": train, "test": test} | ({"validation": validation} if validation is not None else {})
    for role, embedded in sets.items():
        _check_against(train, embedded, role)
    labels = {role: np.asarray(embedded.labels) for role, embedded in sets.items()}
    known = np.unique(labels["train"][labels["train"] >= 0])
    if len(known) < 2:
        refuse("train", train.name, f"has images of {len(known)} of its classes: give images of at least two")
    place = np.full(len(train.class_names) + 1, -1, dtype=np.int64)  # the last entry is for label -1
    place[known] = np.arange(len(known))
    selected = {}
    for role, embedded in sets.items():
        lost = np.setdiff1d(labels[role][labels[role] >= 0], known)
        if len(lost):
            refuse(
                role,
                embedded.name,
                f"has images of {train.class_names[lost[0]]!r}, of which {train.name} has none to learn from "
                f"({len(lost)} such classes): add some, or take the class out of {embedded.name}",
            )
        selected[role] = select_features(embedded, features, place[labels[role]], unit)
        require(
            selected[role].dimension == selected["train"].dimension,
            role,
            embedded.name,
            f"has {selected[role].dimension} columns of {features}, {train.name} has {selected['train'].dimension}: "
            "embed both with one model",
        )
    keys = {role: embedded.keys for role, embedded in sets.items() if role != "test"}
    return ProbeInputs(
        [train.class_names[c] for c in known],
        selected["train"],
        selected["test"],
        selected.get("validation"),
        _labelled(keys["train"], labels["train"]),
        _labelled(keys["validation"], labels["validation"]) if validation is not None else [],
    )


def _check_against(train: EmbeddedSet, embedded: EmbeddedSet, role: str) -> None:
    if embedded.labels is None or not np.any(embedded.labels >= 0):
        refuse(role, embedded.name, "has no labelled image: probes take sets with classes")
    if embedded.model.get("fingerprint") != train.model.get("fingerprint"):
        refuse(
            role,
            embedded.name,
            f"is of the model {embedded.model.get('name')!r} ({embedded.model.get('fingerprint')}), {train.name} of "
            f"{train.model.get('name')!r} ({train.model.get('fingerprint')}): embed both with one model",
        )
    if embedded.class_names != train.class_names:
        pairs = zip(embedded.class_names, train.class_names, strict=False)
        shorter = min(len(embedded.class_names), len(train.class_names))
        first = next((number for number, (a, b) in enumerate(pairs) if a != b), shorter)
        refuse(
            role,
            embedded.name,
            f"has {len(embedded.class_names)} classes and {train.name} {len(train.class_names)}, and they differ from "
            f"class {first} on: give sets of the same classes in the same order",
        )


def _labelled(keys: list[str], labels: np.ndarray) -> list[str]:
    return [keys[row] for row in np.flatnonzero(labels >= 0)]
