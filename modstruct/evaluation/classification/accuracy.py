"""Figures of a classifier from the classes that scored ahead of the true one."""

from __future__ import annotations

import numpy as np

TOP_K = (1, 5)


def accuracy_metrics(ahead: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, dict[str, float]]:
    """Top-1 and top-5 accuracy and top-1 accuracy averaged over classes, each beside a uniform guess's.

    ahead: (n,), other classes that score at least as high. labels: (n,). A k that is not below the number of classes
    is left out; classes without a row do not enter the average.
    Returns {"top_1": {"value": …, "chance": …, "rows": n}, …, "mean_per_class": {…, "rows": classes that occur}}.
    """
    figures = {
        name: {"value": float(np.mean(hit, dtype=np.float64)), "chance": k / classes, "rows": len(labels)}
        for k, (name, hit) in zip(TOP_K, hits(ahead, classes).items(), strict=False)
    }
    _, place = np.unique(labels, return_inverse=True)
    per_class = np.bincount(place, weights=ahead == 0) / np.bincount(place)
    average = {"value": float(per_class.mean()), "chance": 1 / classes, "rows": len(per_class)}
    return figures | {"mean_per_class": average}


def hits(ahead: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """Whether each row's class is among the best k, (n,) float32, for the k of TOP_K below the number of classes."""
    return {f"top_{k}": (ahead < k).astype(np.float32) for k in TOP_K if k == 1 or k < classes}


def metrics_over_draws(each: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean of each figure over draws and, of several, its standard deviation (n - 1) as "…_deviation"."""
    figures = {}
    for name, one in each[0].items():
        values = [metrics_of_draw[name]["value"] for metrics_of_draw in each]
        figures[name] = one | {"value": float(np.mean(values))}
        if len(values) > 1:
            figures[f"{name}_deviation"] = {"value": float(np.std(values, ddof=1)), "rows": len(values)}
    return figures
