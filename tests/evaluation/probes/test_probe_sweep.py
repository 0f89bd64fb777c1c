"""The search is CLIP's, finds the peak of a constructed case, and its fits agree with scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probe_cases import clouds, features_of
from sklearn.linear_model import LogisticRegression

from modstruct.evaluation.probes.features import RowBlocks
from modstruct.evaluation.probes.logistic_regression import FitConfig
from modstruct.evaluation.probes.sweep import STRENGTHS, TRIED, Split, search_strength, sweep_strength

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


def test_the_search_lands_on_the_best_of_the_grid_for_fitted_probes():
    """Few rows of many noisy columns: the best is neither the weakest nor the strongest, and it is scikit-learn's."""
    (rows, labels), (others, truth) = clouds(90, 60, 3, seed=0, spread=6.0), clouds(3000, 60, 3, seed=1, spread=6.0)
    config = FitConfig(precision="float64", gradient_tolerance=1e-7)
    split = Split(
        *(
            RowBlocks(features_of(*pair), torch.device("cpu"), torch.float64)
            for pair in ((rows, labels), (others, truth))
        )
    )
    sweep, start = sweep_strength([split], 3, config)
    by_strength = dict(zip(sweep.strengths, sweep.accuracies, strict=True))
    for strength in (sweep.best, 1e-2, 1e4):
        near = min(by_strength, key=lambda s: abs(np.log(s / strength)))
        peer = LogisticRegression(C=1 / near, max_iter=1000, tol=1e-7).fit(rows, labels).score(others, truth)
        assert by_strength[near] == pytest.approx(peer, abs=0.004)
    assert by_strength[sweep.best] == max(sweep.accuracies) > max(sweep.accuracies[0], sweep.accuracies[-1]) + 0.01
    assert start.weight.shape == (3, 60)


def test_several_splits_are_scored_by_all_their_rows():
    rows, labels = clouds(60, 5, 3, seed=2, spread=2.0)
    blocks = [RowBlocks(features_of(rows[p], labels[p]), torch.device("cpu")) for p in (slice(0, 30), slice(30, 60))]
    sweep, _ = sweep_strength([Split(*blocks), Split(*blocks[::-1])], 3, FitConfig())
    assert all(round(60 * accuracy, 9) == round(60 * accuracy) for accuracy in sweep.accuracies)
    assert sweep.losses[-1] == pytest.approx(np.log(3), abs=0.01)
