"""Intervals cover at their stated rate, and batches are disjoint."""

from __future__ import annotations

import math

import numpy as np
import pytest
from structure_cases import structure_metrics

from modstruct.evaluation.structure.measure import StructureConfig, random_batches
from modstruct.evaluation.structure.metrics import FOLDS, separability_interval, separated

TRIALS = 100
LEAST = 0.95 - 4 * math.sqrt(0.05 * 0.95 / TRIALS)  # 4 standard deviations


def sphere(random, count, dimension=3):
    z = random.standard_normal((count, dimension))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


def test_the_intervals_of_uniformity_and_geometry_cover_what_they_estimate():
    """On the sphere in three dimensions a cosine c is uniform: E exp(-2 (2 - 2 c)) = exp(-4) sinh(4) / 4; cosines of
    independent rows in D dimensions have variance 1/D, their differences 2/D."""
    uniform = math.log(math.exp(-4) * math.sinh(4) / 4)
    truth = {"uniformity_image": uniform, "geometry_inter": 2 / 3, "geometry_intra": 2 / 3}
    config = StructureConfig(exact_rows=10, batch=16, batches=20, hubness_batch=10, separability_pairs=4)
    random, hits = np.random.default_rng(1), dict.fromkeys(truth, 0)
    for _ in range(TRIALS):
        found, _ = structure_metrics(sphere(random, 320), sphere(random, 320), config=config)
        for name, value in truth.items():
            hits[name] += found[name].low <= value <= found[name].high
    assert all(LEAST <= count / TRIALS < 1 for count in hits.values()), hits


def test_the_interval_of_separability_covers_a_half_without_any_difference():
    random, hits = np.random.default_rng(3), 0
    for _ in range(TRIALS):
        rows = sphere(random, 100, 8), sphere(random, 100, 8), np.repeat(np.arange(100)[:, None], 2, axis=1)
        low, high = separability_interval(np.concatenate([separated(*rows, fold) for fold in range(FOLDS)]))
        hits += low <= 0.5 <= high
    assert hits / TRIALS >= LEAST  # the interval is conservative


@pytest.mark.parametrize(("rows", "batch", "batches"), [(1000, 30, 20), (100, 50, 20), (105, 10, 10)])
def test_batches_are_disjoint_and_at_least_ten(rows, batch, batches):
    found = list(random_batches(rows, batch, batches, seed=0))
    together = np.concatenate(found)
    assert len(np.unique(together)) == len(together)
    assert together.max() < rows
    assert 10 <= len(found) <= batches
    assert {len(one) for one in found} == {min(batch, rows // len(found))}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batches": 3}, "structure.batches = 3: at least 10"),
        ({"batch": 1}, "batch"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        StructureConfig(**setting)
