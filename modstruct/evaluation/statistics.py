"""Confidence intervals of metrics over a set's rows, and tests of the difference of two models on the same rows.

All are seeded, need bounded memory at any number of rows, and take `groups`: rows that are not independent (captions of
one image, questions about one scene) are resampled together, and the groups are what counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats

DRAWS_AT_ONCE = 1 << 21
"""Row numbers drawn at once: 8 MB, and 16 MB of their values."""
FEW_VALUES = 4_096
"""Up to this many distinct rows are resampled by their counts, which has the same distribution as row by row."""
Label = TypeVar("Label", int, bool, str)


@dataclass(frozen=True)
class Difference:
    """Mean of a minus mean of b over the same rows, its interval, and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def bootstrap_mean(
    outcomes: np.ndarray, samples: int = 1000, level: float = 0.95, seed: int = 0, groups: np.ndarray | None = None
) -> tuple[float, float]:
    """Confidence interval (low, high) of the mean of outcomes over rows like these.

    outcomes: (n,), bool, integer or floating. samples: resamples. level: coverage, between 0 and 1. groups: (n,), rows
    of one value belong together; whole groups are resampled.
    The interval is BCa (Efron 1987): a plain percentile interval of a skewed outcome misses too much on one side. Its
    levels are widened as by Student's t for a mean of few rows (Hesterberg 2015), since the percentiles of resamples
    are too narrow by sqrt((n - 1) / n). Coverage at 95 %: exponential outcomes 92.4 % with 20 rows and 94.6 % with 50,
    normal ones 94.5 % with 10 (3,000 simulations each). It is ours since scipy.stats.bootstrap resamples no groups of
    unlike size, and its jackknife takes n^2 steps: minutes for 50,000 rows.
    Outcomes of 0 and 1 alone, without groups, are not resampled, since near 0 or 1 a bootstrap's interval shrinks to
    nothing and undercovers. They get Wilson's interval (1927), as do grouped ones that are all equal, with as many rows
    as there are groups. Raises ValueError for no outcomes, or a single group of outcomes other than 0 and 1.
    """
    outcomes = _checked("outcomes", outcomes)
    _check_level(samples, level)
    numbers = _group_numbers(groups, len(outcomes))
    binary = bool(np.all((outcomes == 0) | (outcomes == 1)))
    if binary and (numbers is None or outcomes.min() == outcomes.max()):
        return wilson(outcomes.mean(), len(outcomes) if numbers is None else int(numbers.max()) + 1, level)
    return mean_interval(outcomes[:, None], lambda means: means[:, 0], samples, level, seed, numbers)


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> Difference:
    """Mean of a minus mean of b, outcomes of two models on the same rows, with interval and p-value.

    a, b: (n,), row for row. groups: as in `bootstrap_mean`, of which this is the interval of a - b. Where a and b are
    equal on all rows and 0 or 1, the interval is Tango's (1998) for a table without discordant pairs.
    p: two-sided, of the null hypothesis that a and b are exchangeable in any row (in all rows of a group at once), by
    random sign flips; the observed signs count among the flips, so that p is at least 1 / (samples + 1) and the test is
    exact. For 0 and 1 this is McNemar's test. Raises ValueError where sizes differ.
    """
    a, b = _checked("a", a), _checked("b", b)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} rows and b {len(b)}: outcomes of the same rows are compared, give both alike")
    _check_level(samples, level)
    numbers = _group_numbers(groups, len(a))
    differences = a - b
    observed = float(differences.mean())
    binary = bool(np.all(((a == 0) | (a == 1)) & ((b == 0) | (b == 1))))
    if binary and not differences.any():
        high = wilson(0.0, len(a) if numbers is None else int(numbers.max()) + 1, level)[1]
        low = -high
    else:
        low, high = mean_interval(differences[:, None], lambda means: means[:, 0], samples, level, seed, numbers)
    totals = _units(differences[:, None], numbers)[0][:, 0]
    return Difference(observed, low, high, sign_flip_p(totals, samples, seed))


def sign_flip_p(totals: np.ndarray, samples: int = 1000, seed: int = 0) -> float:
    """Two-sided p-value of the null hypothesis that each of the numbers (u,) could as well have the other sign.

    scipy's permutation test: all signs where there are fewer than `samples` of them, else random ones.
    """
    told = totals[totals != 0]
    if len(told) < 2:
        return 1.0
    test = stats.permutation_test(
        (told,),
        lambda x, axis: x.sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=samples,
        batch=max(1, DRAWS_AT_ONCE // len(told)),
        rng=np.random.default_rng([seed, 1]),
    )
    return float(test.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number by Holm's step-down procedure (1979), in the order given."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = largest
    return corrected


def mean_interval(
    outcomes: np.ndarray,
    function: Callable[[np.ndarray], np.ndarray],
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """BCa interval of a smooth function of the means of several outcomes of the same rows.

    outcomes: (n, k). function: (s, k) means -> (s,). The rest is as in `bootstrap_mean`; outcomes that are equal in all
    rows give an interval of no width. Acceleration: by the jackknife over rows or groups.
    """
    _check_level(samples, level)
    totals, sizes = _units(outcomes, _group_numbers(groups, len(outcomes)))
    count = len(totals)
    if count < 2:
        raise ValueError(f"outcomes: {count} independent rows; an interval takes two: leave it out of so small a set")
    found = function(_resampled_means(totals, sizes, samples, np.random.default_rng(seed)))
    value = float(function(totals.sum(0, keepdims=True) / sizes.sum())[0])
    left_out = function((totals.sum(0) - totals) / (sizes.sum() - sizes)[:, None])
    influence = left_out.mean() - left_out
    power = float((influence**2).sum())
    acceleration = float((influence**3).sum()) / (6 * power**1.5) if power > 0 else 0.0
    return _bca(found, value, acceleration, level, count)


def bootstrap_statistic(
    function: Callable[[np.ndarray], float],
    rows: np.ndarray,
    samples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: np.ndarray | None = None,
) -> tuple[float, float]:
    """Confidence interval (low, high) of any statistic of rows; for means `bootstrap_mean` is faster and covers better.

    function: (n', …) rows drawn with replacement -> a number; called samples + 1 times. rows: (n, …). groups: as in
    `bootstrap_mean`; n' then varies. Bias-corrected percentiles without acceleration, which would take a call for each
    row. Raises ValueError for fewer than two rows or groups.
    """
    _check_level(samples, level)
    random = np.random.default_rng(seed)
    numbers = _group_numbers(groups, len(rows))
    count = len(rows) if numbers is None else int(numbers.max()) + 1
    if count < 2:
        raise ValueError(f"rows: {count} independent ones; an interval takes two: leave it out of so small a set")
    members = np.arange(count) if numbers is None else np.argsort(numbers, kind="stable")
    sizes = np.ones(count, dtype=np.int64) if numbers is None else np.bincount(numbers)
    starts = np.cumsum(sizes) - sizes
    found = np.empty(samples)
    for s in range(samples):
        drawn = random.integers(0, count, count)
        within = np.arange(sizes[drawn].sum()) - np.repeat(np.cumsum(sizes[drawn]) - sizes[drawn], sizes[drawn])
        found[s] = function(rows[members[np.repeat(starts[drawn], sizes[drawn]) + within]])
    return _bca(found, float(function(rows)), 0.0, level, count)


def t_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of independent values (n,); nearly exact for means of batches."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values))
    return mean - half, mean + half


def wilson(share: float, rows: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval (1927) of a probability whose observed share in `rows` rows is `share`; never of no width."""
    right = round(share * rows)
    found = stats.binomtest(right, rows, right / rows).proportion_ci(level, method="wilson")  # of p = 1, for speed
    return float(found.low), float(found.high)


def majority_label(labels: Iterable[Label | None]) -> Label:
    """The most frequent label, the smallest of several; None is no label. Raises ValueError if there is none.

    What a classifier must beat: to be found on the training set and measured on another, like any prediction.
    """
    counts = Counter(label for label in labels if label is not None)
    if not counts:
        raise ValueError("labels: there are none")
    return min(counts, key=lambda label: (-counts[label], label))


def _bca(found: np.ndarray, value: float, acceleration: float, level: float, count: int) -> tuple[float, float]:
    """Percentiles of the resampled values at levels corrected for bias, skewness and few rows."""
    below = ((found < value).mean() + (found <= value).mean()) / 2
    edge = 0.5 / len(found)
    bias = float(stats.norm.ppf(min(max(float(below), edge), 1 - edge)))
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * math.sqrt(count / (count - 1))
    levels = []
    for z in (bias - reach, bias + reach):
        # Where the correction has no finite value, the extreme resample.
        scale = 1 - acceleration * z
        levels.append(float(stats.norm.cdf(bias + z / scale)) if scale > 0 else float(z > 0))
    low, high = np.quantile(found, levels, method="weibull")  # k-th of s: k / (s + 1) lies below on average
    return float(low), float(high)


def _resampled_means(totals: np.ndarray, sizes: np.ndarray, samples: int, random: np.random.Generator) -> np.ndarray:
    """(samples, k) means of units drawn with replacement. totals: (u, k) sums over each unit's rows; sizes: (u,)."""
    units = np.column_stack([totals, sizes])
    count = len(units)
    if units.shape[1] == 2:
        distinct, times = np.unique(units, axis=0, return_counts=True)
        if len(distinct) <= min(FEW_VALUES, count // 2):
            sums = np.empty((samples, 2))
            step = max(1, DRAWS_AT_ONCE // len(distinct))
            for start in range(0, samples, step):
                stop = min(start + step, samples)
                sums[start:stop] = random.multinomial(count, times / count, stop - start) @ distinct
            return sums[:, :1] / sums[:, 1:]
    sums = np.zeros((samples, units.shape[1]))
    at_once = max(1, DRAWS_AT_ONCE // count)
    for start in range(0, samples, at_once):
        stop = min(start + at_once, samples)
        for first in range(0, count, DRAWS_AT_ONCE):
            drawn = random.integers(0, count, (stop - start, min(DRAWS_AT_ONCE, count - first)))
            for column in range(units.shape[1]):
                sums[start:stop, column] += units[:, column][drawn].sum(1)
    return sums[:, :-1] / sums[:, -1:]


def _units(outcomes: np.ndarray, numbers: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Sums of outcomes (n, k) over each group (u, k), and rows of each group (u,); without groups, rows themselves."""
    outcomes = np.asarray(outcomes, dtype=np.float64)
    if numbers is None:
        return outcomes, np.ones(len(outcomes))
    sizes = np.bincount(numbers)
    return np.column_stack([np.bincount(numbers, column) for column in outcomes.T]), sizes.astype(np.float64)


def _group_numbers(groups: np.ndarray | None, rows: int) -> np.ndarray | None:
    """Groups numbered 0, 1, … without gaps."""
    if groups is None:
        return None
    groups = np.asarray(groups)
    if groups.shape != (rows,):
        raise ValueError(f"groups: shape {groups.shape} for {rows} rows; give one group for each row")
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def _checked(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name}: shape {values.shape}; give one outcome for each row, and at least one row")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"{name}: {values[row]} in row {row}; leave out rows without an outcome")
    return values


def _check_level(samples: int, level: float) -> None:
    if samples < 100:
        raise ValueError(f"samples: {samples}; percentiles take at least 100 resamples")
    if not 0 < level < 1:
        raise ValueError(f"level: {level}; give the coverage as a share between 0 and 1, such as 0.95")
