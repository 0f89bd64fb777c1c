"""The search is CLIP's, finds the peak of a constructed case, and its fits agree with scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from probe_cases import features_of
from sklearn.linear_model import LogisticRegression

from modstruct.evaluation.classification.linear import STRENGTHS, FitConfig, search_strength
from modstruct.evaluation.classification.probe import Probe, ProbeConfig

FIRST = [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6]


def test_the_grid_is_96_steps_from_1e_minus_6_to_1e6():
    np.testing.assert_allclose(STRENGTHS, np.logspace(-6, 6, 97))


@given(st.integers(0, 96))
def test_a_single_peak_is_found_wherever_it_lies(peak):
    asked = []

    def score(strengths):
        asked.append(strengths)
        return [(-abs(np.log10(strength) - np.log10(STRENGTHS[peak])), 0.0) for strength in strengths]

    best, tried = search_strength(score)
    assert best == STRENGTHS[peak]
    np.testing.assert_allclose(asked[0], FIRST)
    together = [strength for strengths in asked for strength in strengths]
    assert len(together) == len(set(together)) <= 15
    assert len(asked) == 5
    assert list(tried) == sorted(together)
    assert tried == dict(zip(tried, score(list(tried)), strict=True))


def test_of_equal_accuracies_the_least_loss_and_then_the_strongest_wins():
    assert search_strength(lambda tried: [(0.5, abs(np.log10(s) - 2.25)) for s in tried])[0] == pytest.approx(10**2.25)
    assert search_strength(lambda tried: [(0.5, 0.0) for _ in tried])[0] == 1e6


def misled(count, seed):
    """Three columns that tell three classes, forty of noise, and one of large noise."""
    random, labels = np.random.default_rng(seed), np.arange(count) % 3
    told = np.eye(3)[labels] + 0.3 * random.standard_normal((count, 3))
    noise = random.standard_normal((count, 41)) * np.append(np.ones(40), 30)
    return np.hstack([told, noise]).astype(np.float32), labels


def test_the_search_lands_between_too_weak_and_too_strong_where_scikit_learn_does():
    (rows, labels), (others, truth) = misled(120, seed=0), misled(3000, seed=1)
    config = ProbeConfig(fit=FitConfig(precision="float64", gradient_tolerance=1e-7))
    fitted, held_out = features_of(rows, labels), features_of(others, truth)
    best, tried = Probe(config, list("abc"), {"train": fitted, "test": held_out}, {}).search(fitted, held_out)
    # Weaker ones have not converged in either after 1,000 steps.
    for strength, (accuracy, _) in [pair for pair in tried.items() if pair[0] > 1e-3]:
        peer = LogisticRegression(C=1 / strength, max_iter=1000, tol=1e-7).fit(rows.astype(np.float64), labels)
        assert accuracy == pytest.approx(peer.score(others, truth), abs=0.002)
    accuracies = [accuracy for accuracy, _ in tried.values()]
    assert max(accuracies) == tried[best][0]
    assert max(accuracies) > max(accuracies[0], accuracies[-1]) + 0.003
    assert 1e-5 < best < 1
    assert tried[1e6][1] == pytest.approx(np.log(3), abs=0.01)
