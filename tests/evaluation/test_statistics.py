"""Intervals cover as often as they say, p-values of no difference are uniform; both within binomial tolerance."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from modstruct.evaluation.statistics import (
    bootstrap_mean,
    holm,
    mean_interval,
    median_interval,
    paired_difference,
    sign_flip,
    t_interval,
    wilson,
)

TRIALS = 600
SAMPLES = 600


def band(share: float, trials: int = TRIALS) -> float:
    """Deviations within which a share of so many trials lies 999 times of 1,000."""
    return 3.29 * math.sqrt(share * (1 - share) / trials)


def clustered(random, share, clusters):
    """0/1 outcomes of clusters of 1 to 5 rows, whose rows resemble each other (intra-class correlation 1/3)."""
    own = random.beta(2 * share, 2 * (1 - share), clusters)
    groups = np.repeat(np.arange(clusters), random.integers(1, 6, clusters))
    return (random.random(len(groups)) < own[groups]).astype(float), groups


# Each gives (outcomes, groups, true mean) of one trial.
OUTCOMES = {
    "normal, 20 rows": lambda r: (r.normal(3, 2, 20), None, 3.0),
    "normal, 300 rows": lambda r: (r.normal(3, 2, 300), None, 3.0),
    "skewed, 200 rows": lambda r: (r.exponential(size=200), None, 1.0),
    "whole numbers, 300 rows": lambda r: (r.poisson(2, 300), None, 2.0),
    "0 and 1 in groups, 30 groups": lambda r: (*clustered(r, 0.3, 30), 0.3),
    "0 and 1 in groups, 300 groups": lambda r: (*clustered(r, 0.9, 300), 0.9),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_the_interval_of_a_mean_covers_it_as_often_as_it_says(name):
    random = np.random.default_rng(7)
    hits = 0
    for trial in range(TRIALS):
        outcomes, groups, truth = OUTCOMES[name](random)
        low, high = bootstrap_mean(outcomes, samples=SAMPLES, seed=trial, groups=groups)
        hits += low <= truth <= high
    assert abs(hits / TRIALS - 0.95) < band(0.95)


@pytest.mark.parametrize(("rows", "low", "high"), [(25, 0.02, 0.98), (2000, 0.02, 0.98), (400, 0.97, 1.0)])
def test_intervals_of_0_and_1_cover_as_often_as_they_say_on_average_over_shares(rows, low, high):
    random = np.random.default_rng(8)
    hits, trials = 0, 2 * TRIALS
    for _ in range(trials):
        share = random.uniform(low, high)
        bottom, top = bootstrap_mean(random.random(rows) < share)
        hits += bottom <= share <= top
    assert abs(hits / trials - 0.95) < band(0.95, trials)


def test_another_level_is_covered_as_often_as_it_says():
    random = np.random.default_rng(9)
    hits = 0
    for trial in range(TRIALS):
        low, high = bootstrap_mean(random.normal(size=40), samples=SAMPLES, level=0.8, seed=trial)
        hits += low <= 0 <= high
    assert abs(hits / TRIALS - 0.8) < band(0.8)


def test_groups_widen_the_interval_as_their_rows_resemble_each_other():
    outcomes = np.random.default_rng(1).normal(size=200)
    alike = np.repeat(outcomes, 10)
    low, high = bootstrap_mean(alike, groups=np.repeat(np.arange(200), 10))
    own_low, own_high = bootstrap_mean(outcomes)
    assert (low, high) == pytest.approx((own_low, own_high))
    blind_low, blind_high = bootstrap_mean(alike)
    assert (high - low) / (blind_high - blind_low) == pytest.approx(math.sqrt(10), rel=0.1)


def test_outcomes_that_are_all_equal_get_an_interval_of_the_width_that_their_number_allows():
    low, high = bootstrap_mean(np.ones(50))
    assert (low, high) == (pytest.approx(50 / (50 + 3.8414588)), 1.0)
    assert bootstrap_mean(np.ones(50), groups=np.arange(50) // 5) == wilson(1.0, 10)
    assert bootstrap_mean(np.zeros(50)) == (0.0, pytest.approx(1 - low))


def test_resamples_that_are_counted_agree_with_those_drawn_row_by_row():
    outcomes = np.random.default_rng(2).integers(0, 6, 400).astype(float)
    barely_distinct = outcomes + np.arange(400) * 1e-9
    assert bootstrap_mean(outcomes, samples=20_000) == pytest.approx(
        bootstrap_mean(barely_distinct, samples=20_000), abs=0.01
    )


def test_millions_of_rows_take_little_memory():
    outcomes = np.random.default_rng(3).normal(size=1_000_000).astype(np.float32)
    tracemalloc.start()
    low, high = bootstrap_mean(outcomes, samples=100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6  # 100 resamples at once would take 800 MB
    assert high - low == pytest.approx(2 * 1.96 / 1000, rel=0.3)


def test_one_seed_gives_one_interval():
    outcomes = np.random.default_rng(4).normal(size=100)
    assert bootstrap_mean(outcomes, seed=5) == bootstrap_mean(outcomes, seed=5) != bootstrap_mean(outcomes, seed=6)


@pytest.mark.parametrize("grouped", [False, True])
def test_p_values_are_uniform_where_there_is_no_difference(grouped):
    random = np.random.default_rng(10)
    found = []
    for trial in range(TRIALS):
        sizes = random.integers(1, 6, 40) if grouped else np.ones(40, dtype=int)
        groups = np.repeat(np.arange(40), sizes)
        own = random.normal(size=(2, 40))  # what the rows of a group have in common
        a, b = own[:, groups] + random.normal(size=(2, len(groups)))
        found.append(paired_difference(a, b, samples=SAMPLES, seed=trial, groups=groups if grouped else None).p)
    assert stats.kstest(found, "uniform").pvalue > 0.001


def test_the_interval_of_a_difference_of_0_and_1_covers_it_as_often_as_it_says():
    random = np.random.default_rng(11)
    hits = 0
    for trial in range(TRIALS):
        level = random.random(300)  # difficulty of rows, the same for both models
        a, b = random.random(300) < level, random.random(300) < level**1.2
        result = paired_difference(a, b, samples=SAMPLES, seed=trial)
        hits += result.low <= 1 / 2 - 1 / 2.2 <= result.high
    assert abs(hits / TRIALS - 0.95) < band(0.95)


def test_a_paired_difference_of_0_and_1_is_mcnemars_exact_test():
    a = np.array([1] * 14 + [0] * 4 + [1] * 50 + [0] * 30)
    b = np.array([0] * 14 + [1] * 4 + [1] * 50 + [0] * 30)
    result = paired_difference(a, b, samples=50_000)
    assert result.difference == pytest.approx(10 / 98)
    assert result.low < result.difference < result.high
    assert result.p == pytest.approx(stats.binomtest(4, 18).pvalue, abs=0.003)


def test_models_that_never_differ_get_the_width_that_the_number_of_rows_allows():
    same = np.arange(100) % 2
    result = paired_difference(same, same)
    assert result.difference == 0
    assert result.p == 1
    assert -result.low == result.high == pytest.approx(3.8414588 / (100 + 3.8414588))


@pytest.mark.parametrize("grouped", [False, True])
def test_the_interval_of_a_median_covers_it_as_often_as_it_says(grouped):
    random = np.random.default_rng(12)
    hits = 0
    for trial in range(TRIALS):
        values = random.exponential(size=101)
        # Of groups of equal rows the interval is that of the groups.
        values, groups = (np.repeat(values, 3), np.repeat(np.arange(101), 3)) if grouped else (values, None)
        low, high = median_interval(values, samples=SAMPLES, seed=trial, groups=groups)
        hits += low <= math.log(2) <= high
    assert abs(hits / TRIALS - 0.95) < band(0.95)


def test_the_interval_of_a_median_is_that_of_the_binomial_distribution():
    values = np.random.default_rng(0).permutation(101) + 1.0
    low, high = median_interval(values)  # of order statistics 41 and 61
    assert (low, high) == (41, 61)
    assert stats.binom.cdf(60, 101, 0.5) - stats.binom.cdf(40, 101, 0.5) == pytest.approx(0.95, abs=0.01)
    assert median_interval(np.repeat([1, 9], [70, 30])) == (1, 1)


def test_the_interval_of_a_function_of_means_covers_it_as_often_as_it_says():
    random = np.random.default_rng(13)
    hits = 0
    for trial in range(TRIALS):
        rows = random.normal(size=(80, 2)) + np.array([2.0, 1.0])
        low, high = mean_interval(rows, lambda means: np.abs(means[:, 0] - means[:, 1]), samples=SAMPLES, seed=trial)
        hits += low <= 1 <= high
    assert abs(hits / TRIALS - 0.95) < band(0.95)


def test_the_interval_of_a_mean_of_batches_is_students():
    values = np.random.default_rng(0).normal(size=10)
    half = stats.t.ppf(0.975, 9) * values.std(ddof=1) / 10**0.5
    assert t_interval(values) == pytest.approx((values.mean() - half, values.mean() + half))
    assert t_interval(np.ones(10)) == (1, 1)


def test_p_values_are_corrected_for_their_number():
    assert holm([0.04, 0.01, 0.03, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.9])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean(np.empty(0)), "outcomes: shape"),
        (lambda: bootstrap_mean(np.array([1.0, np.nan])), "outcomes: nan in row 1"),
        (lambda: bootstrap_mean(np.array([0.3])), "an interval takes two"),
        (lambda: bootstrap_mean(np.ones(3), groups=np.ones(2)), "groups: shape"),
        (lambda: bootstrap_mean(np.ones(3), level=95), "level: 95"),
        (lambda: bootstrap_mean(np.ones(3), samples=10), "samples: 10"),
        (lambda: paired_difference(np.ones(3), np.ones(4)), "a has 3 rows and b 4"),
        (lambda: median_interval(np.arange(6), groups=np.zeros(6)), "an interval takes two"),
    ],
)
def test_what_has_no_interval_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_sign_flip_test_is_scipys_permutation_test_and_exact_for_few_differences():
    differences = np.random.default_rng(0).normal(0.5, 1.0, 11)
    how = {"permutation_type": "samples", "n_resamples": 2**12, "vectorized": True}
    expected = stats.permutation_test((differences,), lambda x, axis: x.sum(axis), **how).pvalue
    assert sign_flip(differences, 2**12) == pytest.approx(expected, abs=1e-12)
    assert sign_flip(np.ones(8), 2**9) == 2 / 2**8  # all of one sign: two of 256
    drawn = sign_flip(differences, 2**10)  # fewer than there are: at random
    assert drawn == pytest.approx(expected, abs=0.05)
    assert sign_flip(np.zeros(8), 2**9) == 1.0
