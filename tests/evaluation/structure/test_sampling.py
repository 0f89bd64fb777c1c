"""Intervals cover at their stated rate, and batches are disjoint."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from modstruct.evaluation.structure.alignment import geometric_consistency, uniformity
from modstruct.evaluation.structure.sampling import (
    SamplingConfig,
    bootstrap_interval,
    mean_interval,
    random_batches,
    t_quantile,
)
from modstruct.evaluation.structure.shape import linear_separability

TRIALS = 300
AT_90 = (0.90 - 4 * math.sqrt(0.09 / TRIALS), 0.90 + 4 * math.sqrt(0.09 / TRIALS))  # 4 standard deviations: 0.83, 0.97


def sphere(random, count, dimension=3):
    z = random.standard_normal((count, dimension))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("degrees", [9, 31, 63])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
def test_quantiles_are_students(probability, degrees):
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-3)


def test_intervals_of_a_mean_cover_as_often_as_they_say():
    random = np.random.default_rng(0)
    for interval in (mean_interval, lambda values, c: bootstrap_interval(values, c, seed=0, resamples=300)):
        hits = 0
        for _ in range(TRIALS):
            low, high = interval(random.exponential(size=60), 0.90)
            hits += low <= 1 <= high
        assert AT_90[0] - 0.02 <= hits / TRIALS <= AT_90[1]  # slightly less for skewed values


def test_the_interval_of_uniformity_covers_the_value_of_the_sphere():
    """On the sphere in three dimensions a cosine c is uniform: E exp(-2 (2 - 2 c)) = exp(-4) sinh(4) / 4."""
    truth = math.log(math.exp(-4) * math.sinh(4) / 4)
    config = SamplingConfig(exact_rows=10, batch=32, batches=20, confidence=0.90)
    random = np.random.default_rng(1)
    hits = 0
    for _ in range(TRIALS):
        found = uniformity(sphere(random, 700), config)
        hits += found["low"] <= truth <= found["high"]
    assert AT_90[0] <= hits / TRIALS <= AT_90[1]


def test_the_interval_of_geometry_covers_its_expectation():
    """Independent rows in D dimensions: cosines have variance 1/D, their differences 2/D."""
    config = SamplingConfig(exact_rows=10, batch=32, batches=20, confidence=0.90)
    random = np.random.default_rng(2)
    hits = {"geometry_inter": 0, "geometry_intra": 0}
    pairs = np.repeat(np.arange(700)[:, None], 2, axis=1)
    for _ in range(TRIALS):
        for name, found in geometric_consistency(sphere(random, 700), sphere(random, 700), pairs, config).items():
            hits[name] += found["low"] <= 2 / 3 <= found["high"]
    for count in hits.values():
        assert AT_90[0] <= count / TRIALS <= AT_90[1]


def test_the_interval_of_separability_covers_a_half_without_any_difference():
    config = SamplingConfig(confidence=0.90)
    random = np.random.default_rng(3)
    pairs = np.repeat(np.arange(100)[:, None], 2, axis=1)
    hits = 0
    for _ in range(TRIALS):
        found = linear_separability(sphere(random, 100, 8), sphere(random, 100, 8), pairs, config)
        hits += found["low"] <= 0.5 <= found["high"]
    assert hits / TRIALS >= AT_90[0]  # the interval is conservative


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
        ({"batches": 3}, "sampling.batches = 3: at least 10"),
        ({"confidence": 1.0}, "confidence"),
        ({"batch": 1}, "batch"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**setting)
