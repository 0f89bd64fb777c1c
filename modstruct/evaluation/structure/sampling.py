"""Disjoint random batches for a metric over too many pairs of rows, and the interval that their means give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from modstruct.errors import require, require_counts


@dataclass(frozen=True)
class SamplingConfig:
    """Up to which size metrics are exact, and how larger sets are sampled."""

    exact_rows: int = 16_384
    """Metrics over all pairs of rows are exact up to this many rows, else sampled."""
    batch: int = 1024
    """Rows of a sampled batch; all pairs within it count."""
    batches: int = 64
    """Batches at most; at least 10 are taken, shorter ones where rows are few."""
    hubness_batch: int = 4096
    """Rows of a batch for hubness, whose value depends on this number."""
    hubness_batches: int = 10
    separability_pairs: int = 10_000
    """Most pairs that the linear classifier is trained and tested on."""
    confidence: float = 0.95
    """Of the intervals."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts("sampling", self, ("exact_rows", "batch", "separability_pairs"))
        for name, least in (("batches", 10), ("hubness_batches", 10), ("hubness_batch", 2), ("batch", 2)):
            require(getattr(self, name) >= least, f"sampling.{name}", getattr(self, name), f"at least {least}")
        require(0 < self.confidence < 1, "sampling.confidence", self.confidence, "between 0 and 1")


def metric(value: float, interval: Sequence[float] | None = None, rows: int | None = None) -> dict[str, float]:
    """{"value"}, and of a sampled metric "low" and "high" of its interval, and the number of "rows" sampled."""
    made = {"value": float(value)}
    if interval is not None:
        made |= {"low": float(interval[0]), "high": float(interval[1])}
    if rows is not None:
        made["rows"] = int(rows)
    return made


def random_batches(rows: int, batch: int, batches: int, seed: int) -> Iterator[np.ndarray]:
    """Disjoint batches of row numbers, each ascending: `batches` where there are enough rows, at least 10."""
    batches = min(batches, max(10, rows // batch))
    batch = min(batch, rows // batches)
    order = np.random.default_rng(seed).permutation(rows)
    for start in range(0, batch * batches, batch):
        yield np.sort(order[start : start + batch])


def mean_interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Interval of the mean of independent values (n,), by Student's t; nearly exact for means of batches."""
    half = t_quantile((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t by Abramowitz & Stegun's 26.7.5, within 1e-3 from 9 degrees of freedom on."""
    z, n = NormalDist().inv_cdf(probability), degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def bootstrap_interval(
    values: np.ndarray,
    confidence: float,
    seed: int,
    statistic: Callable[[np.ndarray], float] = np.mean,
    resamples: int = 1000,
) -> tuple[float, float]:
    """Percentile interval of a statistic of independent values (n, …), by drawing with replacement (Efron 1979)."""
    random = np.random.default_rng(seed)
    drawn = [statistic(values[random.integers(0, len(values), len(values))]) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
