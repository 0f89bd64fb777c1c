"""Chance is the exact hypergeometric metric, and what random rows and random rankings reach."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modstruct.evaluation.retrieval.measure import measure_retrieval
from modstruct.evaluation.retrieval.metrics import ranked_queries, ranking_metrics, recall_metrics

TOLERANCE = {"median_rank": 1, "mean_log_rank": 0.06}  # about 4 standard deviations


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_chance_is_the_exact_hypergeometric_metric(data):
    size = data.draw(st.integers(1, 300))
    positives = np.array(data.draw(st.lists(st.integers(1, size), min_size=1, max_size=20)))
    k = data.draw(st.integers(1, size + 20))
    exact = [1 - comb(size - int(p), min(k, size)) / comb(size, min(k, size)) for p in positives]
    found = recall_metrics(np.ones(len(positives)), positives, size, [k])[f"recall_at_{k}"]
    assert found == {"value": 1, "chance": pytest.approx(np.mean(exact), abs=1e-12)}


@pytest.mark.parametrize(("size", "positives", "half"), [(100, 1, 50), (101, 1, 51), (1, 1, 1), (10, 10, 1), (7, 2, 2)])
def test_chance_of_the_median_rank_is_the_least_that_half_of_random_rankings_reach(size, positives, half):
    pairs, none = np.stack([np.zeros(positives), np.arange(positives)], axis=1).astype(int), np.zeros(positives, int)
    metrics = ranking_metrics(ranked_queries(pairs, none, none, size), [1])
    assert metrics["median_rank"] == {"value": 1, "chance": half}


def test_chance_of_the_mean_log_rank_of_one_positive_is_the_mean_logarithm_of_all_places():
    ranked = ranked_queries(np.zeros((1, 2), int), np.array([6]), np.array([0]), 500)
    found = ranking_metrics(ranked, [1])["mean_log_rank"]
    assert found == {"value": np.log(7), "chance": pytest.approx(np.log(np.arange(1, 501)).mean())}


def test_random_embeddings_score_near_chance():
    random = np.random.default_rng(3)
    image, text = (random.normal(size=(2000, 16)).astype(np.float32) for _ in range(2))
    pairs = np.stack([np.arange(2000), np.arange(2000)], axis=1)
    for direction in measure_retrieval(image, text, pairs, [100]).values():
        assert direction["recall_at_100"]["value"] == pytest.approx(0.05, abs=0.025)  # 5 standard deviations


@pytest.mark.parametrize("positives", [1, 3, 40])
def test_chance_is_what_random_rankings_give(positives):
    random = np.random.default_rng(positives)
    ahead, queries, size = [], 4000, 40
    for _ in range(queries):
        place = np.sort(random.permutation(size)[:positives])
        ahead.append(place - np.arange(positives))
    pairs = np.stack([np.repeat(np.arange(queries), positives), np.arange(queries * positives)], axis=1)
    ahead = np.concatenate(ahead)
    for name, metric in ranking_metrics(ranked_queries(pairs, ahead, np.zeros_like(ahead), size), [1, 5]).items():
        assert metric["value"] == pytest.approx(metric["chance"], abs=TOLERANCE.get(name, 0.025)), name
