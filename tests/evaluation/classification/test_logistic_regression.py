"""The objective agrees with autograd in float64, its optimum with scikit-learn's, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from probe_cases import clouds, features_of
from sklearn.linear_model import LogisticRegression

from modstruct.evaluation.classification import linear as features_module
from modstruct.evaluation.classification.linear import (
    FitConfig,
    LinearClassifier,
    RowBlocks,
    fit_logistic_regression,
    mean_objective,
)

CPU = torch.device("cpu")
EXACT = FitConfig(gradient_tolerance=1e-10, precision="float64", max_iterations=5000)


def blocks_of(rows, labels, dtype=torch.float64, classes=1, **options):
    return RowBlocks(features_of(rows, labels), CPU, dtype, classes, **options)


def sklearn_fit(rows, labels, strength):
    return LogisticRegression(C=1 / strength, tol=1e-10, max_iter=5000).fit(rows.astype(np.float64), labels)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("hold_bytes", [0, None])
def test_value_and_gradient_are_autograds(monkeypatch, dtype, tolerance, hold_bytes):
    monkeypatch.setattr(features_module, "BLOCK_BYTES", 8 * 16 * 7)  # blocks of a few rows, the last one shorter
    rows, labels = clouds(101, 16, 5, seed=0)
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 17))).requires_grad_()
    scores = torch.from_numpy(rows).double() @ weights[:, :-1].T + weights[:, -1]
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels))
    loss = loss + 0.3 / (2 * 101) * weights[:, :-1].square().sum()
    loss.backward()
    loss = loss.detach()
    objective = mean_objective(blocks_of(rows, labels, dtype, 5, hold_bytes=hold_bytes), 5, 0.3)
    for _ in range(2):  # the second time from memory
        value, gradient = objective(weights.detach().numpy().ravel())
        assert value == pytest.approx(float(loss), rel=tolerance)
        np.testing.assert_allclose(gradient, weights.grad.numpy().ravel(), rtol=0, atol=tolerance)


def test_scores_of_thousands_give_finite_values():
    rows, labels = clouds(40, 4, 3, seed=0)
    value, gradient = mean_objective(blocks_of(rows, labels, torch.float32), 3, 1.0)(
        np.full(15, 3.0) * np.arange(15) ** 3
    )
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("strength", [1e-2, 1.0, 100.0])
def test_optimum_is_scikit_learns(strength):
    rows, labels = clouds(300, 12, 4, seed=2, spread=2.0)
    ours, theirs = (
        fit_logistic_regression(blocks_of(rows, labels), 4, strength, EXACT),
        sklearn_fit(rows, labels, strength),
    )
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.bias - ours.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-6)


def test_of_two_classes_scikit_learns_c_is_two_by_the_strength():
    rows, labels = clouds(200, 6, 2, seed=3, spread=2.0)
    ours, theirs = fit_logistic_regression(blocks_of(rows, labels), 2, 0.5, EXACT), sklearn_fit(rows, labels, 0.25)
    np.testing.assert_allclose(ours.weight[1] - ours.weight[0], theirs.coef_[0], atol=1e-6)
    assert ours.bias[1] - ours.bias[0] == pytest.approx(theirs.intercept_[0], abs=1e-6)


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_default_settings_classify_as_scikit_learn_does(strength):
    """In float32 and with scikit-learn's tolerance, on rows that were not fitted."""
    (rows, labels), (others, truth) = clouds(600, 32, 8, seed=4, spread=2.5), clouds(800, 32, 8, seed=5, spread=2.5)
    ours = fit_logistic_regression(blocks_of(rows, labels, torch.float32), 8, strength, FitConfig())
    theirs = LogisticRegression(C=1 / strength, max_iter=1000).fit(rows, labels)
    ahead, loss = ours.ahead(blocks_of(others, truth, torch.float32))
    assert abs(np.mean(ahead == 0) - theirs.score(others, truth)) <= 0.005
    probability = theirs.predict_proba(others)[np.arange(800), truth]
    assert loss == pytest.approx(-np.log(probability).mean(), rel=0.02)


def test_a_row_twice_weighs_as_twice_the_penalty_on_one():
    rows, labels = clouds(120, 5, 3, seed=6, spread=2.0)
    once = fit_logistic_regression(blocks_of(rows, labels), 3, 0.7, EXACT)
    twice = fit_logistic_regression(blocks_of(np.tile(rows, (2, 1)), np.tile(labels, 2)), 3, 1.4, EXACT)
    np.testing.assert_allclose(twice.weight, once.weight, atol=1e-7)


def test_the_bias_is_not_penalised():
    """Under a crushing penalty the weights vanish and the bias alone gives the frequencies of the classes."""
    rows, _ = clouds(100, 4, 2, seed=7)
    labels = np.array([0] * 80 + [1] * 20)
    found = fit_logistic_regression(blocks_of(rows, labels), 2, 1e9, EXACT)
    assert np.abs(found.weight).max() < 1e-6
    assert found.bias[0] - found.bias[1] == pytest.approx(np.log(4), abs=1e-5)


def test_one_row_a_class_is_learnt():
    found = fit_logistic_regression(blocks_of(np.eye(5, dtype=np.float32), np.arange(5)), 5, 1.0, EXACT)
    ahead, _ = found.ahead(blocks_of(np.eye(5, dtype=np.float32), np.arange(5)))
    assert (ahead == 0).all()


def test_a_warm_start_needs_fewer_steps_to_the_same_optimum():
    rows, labels = clouds(300, 20, 5, seed=8, spread=2.0)
    blocks = blocks_of(rows, labels)
    near, cold = (fit_logistic_regression(blocks, 5, strength, EXACT) for strength in (0.12, 0.1))
    warm = fit_logistic_regression(blocks, 5, 0.1, EXACT, near)
    assert warm.iterations < cold.iterations
    np.testing.assert_allclose(warm.weight, cold.weight, atol=1e-6)


def test_the_end_of_a_fit_is_reported():
    rows, labels = clouds(300, 20, 5, seed=9, spread=2.0)
    short = fit_logistic_regression(blocks_of(rows, labels), 5, 1e-3, FitConfig(max_iterations=3, precision="float64"))
    assert (short.end, short.iterations) == ("iterations", 3)
    assert fit_logistic_regression(blocks_of(rows, labels), 5, 1.0, FitConfig(precision="float64")).end == "converged"
    assert fit_logistic_regression(blocks_of(rows, labels, torch.float32), 5, 1.0, EXACT).end == "stalled"


def test_a_tie_counts_against_the_classifier():
    same = LinearClassifier(np.zeros((3, 2)), np.array([0.0, 0.0, -1.0]))
    ahead, loss = same.ahead(blocks_of(np.ones((3, 2)), np.arange(3)))
    assert ahead.tolist() == [1, 1, 2]
    assert loss == pytest.approx(np.log(2 + np.exp(-1)) + 1 / 3)


def test_files_of_float16_give_what_their_values_give(tmp_path):
    rows, labels = clouds(200, 8, 4, seed=10)
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    found = fit_logistic_regression(blocks_of(mapped, labels, hold_bytes=0), 4, 1.0, EXACT)
    right = fit_logistic_regression(blocks_of(rows.astype(np.float16).astype(np.float64), labels), 4, 1.0, EXACT)
    np.testing.assert_allclose(found.weight, right.weight, atol=1e-9)


@pytest.mark.parametrize("strength", [0.0, -1.0, np.inf, np.nan])
def test_a_strength_without_a_minimum_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength = .*above 0"):
        fit_logistic_regression(blocks_of(np.eye(2), [0, 1]), 2, strength, FitConfig())
