"""Rows and embedded sets for the tests of probes."""

from __future__ import annotations

import numpy as np

from modstruct.evaluation.classification.linear import Features
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet

MODEL = {"name": "tiny", "fingerprint": "f0"}


def clouds(count, dimension, classes, seed, spread=1.0):
    """(n, D) float32 around the centres of the classes, always the same ones, and labels (n,), every class in turn."""
    centres = np.random.default_rng(0).standard_normal((classes, dimension))
    random = np.random.default_rng(seed + 1)
    labels = np.arange(count) % classes
    return (centres[labels] + spread * random.standard_normal((count, dimension))).astype(np.float32), labels


def features_of(rows, labels, **options):
    return Features((np.asarray(rows),), np.arange(len(rows)), np.asarray(labels, dtype=np.int64), **options)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def embedded(name, rows, labels, names=None, model=MODEL, keys=None, splits=None, **arrays):
    """A set whose image_features are `rows`, and whose image is `rows` at unit norm."""
    names = [f"class {c}" for c in range(int(np.max(labels)) + 1)] if names is None else names
    made = EmbeddedSet(
        name,
        model,
        {"image": unit(rows), "image_features": np.asarray(rows)} | arrays,
        labels=np.asarray(labels),
        class_names=names,
        keys=keys,
        source={"name": name, "fingerprint": "s0"},
    )
    made.splits = splits or {}
    return made
