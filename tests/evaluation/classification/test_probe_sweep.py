"""The search is CLIP's, finds the peak of a constructed case, and its fits agree with scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probe_cases import clouds, features_of
from sklearn.linear_model import LogisticRegression

from modstruct.evaluation.classification.features import RowBlocks
from modstruct.evaluation.classification.logistic_regression import (
    STRENGTHS,
    TRIED,
    FitConfig,
    Split,
    fit_logistic_regression,
    search_strength,
    sweep_strength,
)

CPU = torch.device("cpu")
FIRST = [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6]


def test_the_grid_is_96_steps_from_1e_minus_6_to_1e6():
    np.testing.assert_allclose(STRENGTHS, np.logspace(-6, 6, 97))


@given(st.integers(0, 96))
def test_a_single_peak_is_found_wherever_it_lies(peak):
    asked = []

    def score(strength):
        asked.append(strength)
        return -abs(np.log10(strength) - np.log10(STRENGTHS[peak])), 0.0

    sweep = search_strength(score)
    assert sweep.best == STRENGTHS[peak]
    np.testing.assert_allclose(sorted(asked[:7]), FIRST)
    assert len(asked) == len(set(asked)) <= TRIED
    assert sweep.strengths == sorted(asked)
    assert sweep.accuracies == [-abs(np.log10(s) - np.log10(STRENGTHS[peak])) for s in sweep.strengths]


def test_of_equal_accuracies_the_least_loss_and_then_the_strongest_wins():
    assert search_strength(lambda s: (0.5, abs(np.log10(s) - 2.25))).best == pytest.approx(10**2.25)
    assert search_strength(lambda s: (0.5, 0.0)).best == 1e6


def misled(count, seed):
    """Three columns that tell three classes, forty of noise, and one of large noise."""
    random, labels = np.random.default_rng(seed), np.arange(count) % 3
    told = np.eye(3)[labels] + 0.3 * random.standard_normal((count, 3))
    noise = random.standard_normal((count, 41)) * np.append(np.ones(40), 30)
    return np.hstack([told, noise]).astype(np.float32), labels


def test_the_search_lands_between_too_weak_and_too_strong_where_scikit_learn_does():
    (rows, labels), (others, truth) = misled(120, seed=0), misled(3000, seed=1)
    config = FitConfig(precision="float64", gradient_tolerance=1e-7)
    blocks = (RowBlocks(features_of(*pair), CPU, torch.float64) for pair in ((rows, labels), (others, truth)))
    sweep, start = sweep_strength([Split(*blocks)], 3, config)
    assert start is None
    # Weaker ones have not converged in either after 1,000 steps.
    for strength, accuracy in [pair for pair in zip(sweep.strengths, sweep.accuracies, strict=True) if pair[0] > 1e-3]:
        peer = LogisticRegression(C=1 / strength, max_iter=1000, tol=1e-7).fit(rows.astype(np.float64), labels)
        assert accuracy == pytest.approx(peer.score(others, truth), abs=0.002)
    assert max(sweep.accuracies) == sweep.accuracies[sweep.strengths.index(sweep.best)]
    assert max(sweep.accuracies) > max(sweep.accuracies[0], sweep.accuracies[-1]) + 0.003
    assert 1e-5 < sweep.best < 1


def test_warm_starts_lead_to_the_same_choice_where_fits_converge():
    made = (clouds(150, 6, 3, seed, spread=2.0) for seed in (0, 1))
    split = Split(*(RowBlocks(features_of(*pair), CPU, torch.float64) for pair in made))
    found = []
    for warm in (False, True):
        config = FitConfig(precision="float64", gradient_tolerance=1e-9, max_iterations=5000, warm_starts=warm)
        found.append(sweep_strength([split], 3, config))
    np.testing.assert_allclose(found[1][0].losses, found[0][0].losses, rtol=1e-6)
    assert found[1][0].best == found[0][0].best
    alone = fit_logistic_regression(split.train, 3, found[1][0].best, config)
    np.testing.assert_allclose(found[1][1].weight, alone.weight, atol=1e-5)


def test_several_splits_are_scored_by_all_their_rows():
    rows, labels = clouds(60, 5, 3, seed=2, spread=2.0)
    blocks = [RowBlocks(features_of(rows[p], labels[p]), CPU) for p in (slice(0, 30), slice(30, 60))]
    sweep, _ = sweep_strength([Split(*blocks), Split(*blocks[::-1])], 3, FitConfig())
    assert all(round(60 * accuracy, 9) == round(60 * accuracy) for accuracy in sweep.accuracies)
    assert sweep.losses[-1] == pytest.approx(np.log(3), abs=0.01)
