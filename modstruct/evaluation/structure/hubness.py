"""Hubs: items that are among the nearest of far too many queries (Radovanović et al. 2010)."""

from __future__ import annotations

import numpy as np

from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import as_float32, distinct_rows
from modstruct.evaluation.structure.sampling import SamplingConfig, figure, mean_interval, random_batches

K = 10


def hubness(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, config: SamplingConfig, k: int = K
) -> dict[str, dict[str, float]]:
    """Skewness of k-occurrence both ways; 0 for none, some units and more where there are hubs.

    image: (n, D), text: (m, D). pairs: (p, 2), (image row, text row); rows in no pair are left out. Returns
      hubness_text   of how often each text is among the k nearest of an image
      hubness_image  of how often each image is among the k nearest of a text
    Equal rows of a gallery are one item. Of more than config.exact_rows pairs, random batches of config.hubness_batch
    are measured, each in itself: the figure is then that of so many pairs, since hubness depends on their number.
    """
    if len(pairs) <= config.exact_rows:
        return {name: figure(value) for name, value in _both_ways(image, text, pairs, k).items()}
    batches = list(random_batches(len(pairs), config.hubness_batch, config.hubness_batches, config.seed))
    found = [_both_ways(image, text, pairs[batch], k) for batch in batches]
    figures = {}
    for name in found[0]:
        values = np.array([one[name] for one in found])
        figures[name] = figure(values.mean(), mean_interval(values, config.confidence), len(batches[0]))
    return figures


def _both_ways(image: np.ndarray, text: np.ndarray, pairs: np.ndarray, k: int) -> dict[str, float]:
    image, text = (as_float32(rows[np.unique(pairs[:, i])]).numpy() for i, rows in enumerate((image, text)))
    return {
        "hubness_text": skewness(occurrences(image, text, k)),
        "hubness_image": skewness(occurrences(text, image, k)),
    }


def occurrences(queries: np.ndarray, gallery: np.ndarray, k: int) -> np.ndarray:
    """(u,): how many queries have each distinct gallery row among their k nearest."""
    first, _, _ = distinct_rows(gallery)
    return np.bincount(nearest(queries, gallery, k, first).reshape(-1), minlength=len(first))


def skewness(values: np.ndarray) -> float:
    """E (x - mean)^3 / deviation^3; 0 where all are equal."""
    centred = values - np.mean(values)
    deviation = np.sqrt(np.mean(centred**2))
    return float(np.mean(centred**3) / deviation**3) if deviation > 0 else 0.0
