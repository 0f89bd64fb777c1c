"""Shape of the embeddings of a modality: hubs, spectrum, and whether a hyperplane separates images from texts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import as_float32, distinct_rows, row_blocks
from modstruct.evaluation.structure.alignment import mean_row
from modstruct.evaluation.structure.sampling import (
    SamplingConfig,
    bootstrap_interval,
    mean_interval,
    metric,
    random_batches,
)

K = 10
FLOAT64_ROWS = 8192
FOLDS = 5
WIDENING = (1 + FOLDS / (FOLDS - 1)) ** 0.5
DECAY = 1e-3
"""Weight of |w|^2 / 2 beside the mean logistic loss, of features in units of their deviation."""
STEPS = 200
FLATTEST = 1e-6
"""Deviation below which a feature is not scaled up."""


def hubness(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, config: SamplingConfig, k: int = K
) -> dict[str, dict[str, float]]:
    """Skewness of k-occurrence (Radovanović et al. 2010): 0 without hubs, several units where there are some.

    image: (n, D), text: (m, D). pairs: (p, 2), (image row, text row); rows in no pair are left out. Returns
      hubness_text   of how often each text is among the k nearest of an image
      hubness_image  of how often each image is among the k nearest of a text
    Equal rows of a gallery are one item. Beyond config.exact_rows pairs it is measured within random batches of
    config.hubness_batch pairs, and is then the hubness of that many pairs, since it depends on their number.
    """
    if len(pairs) <= config.exact_rows:
        return {name: metric(value) for name, value in _both_ways(image, text, pairs, k).items()}
    batches = list(random_batches(len(pairs), config.hubness_batch, config.hubness_batches, config.seed))
    found = [_both_ways(image, text, pairs[batch], k) for batch in batches]
    metrics = {}
    for name in found[0]:
        values = np.array([one[name] for one in found])
        metrics[name] = metric(values.mean(), mean_interval(values, config.confidence), len(batches[0]))
    return metrics


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


def spectra(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of Z / root n and of the centred (Z - mean) / root n, (min(n, D),) each, descending, float64.

    rows: Z, (n, D). The centred ones are the standard deviations along the principal axes. Both are square roots of
    eigenvalues of D x D products, so values below 1e-8 of the largest are rounding. Memory: O(D^2) and a block.
    """
    mean = torch.from_numpy(mean_row(rows))
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for _, block in row_blocks(rows, FLOAT64_ROWS):
        centred = block.double() - mean
        products.addmm_(centred.T, centred)
    products /= len(rows)

    def singular_values(matrix: Tensor) -> np.ndarray:
        return torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().flip(0).numpy()[: min(rows.shape)]

    return singular_values(products + torch.outer(mean, mean)), singular_values(products)


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007, definition 1).

    From 1 to the number of singular values; 1 where all are 0.
    """
    total = singular_values.sum()
    if total == 0:
        return 1.0
    shares = singular_values[singular_values > 0] / total
    return float(np.exp(-np.sum(shares * np.log(shares))))


def linear_separability(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, config: SamplingConfig
) -> dict[str, float] | None:
    """Cross-validated accuracy of a logistic regression that tells image from text embeddings; chance is 0.5.

    image: (n, D), text: (m, D). pairs: (p, 2); each image and each text is used at most once, with the other of its
    pair in the same fold: otherwise a classifier that was trained on the image would take its aligned text for an
    image. At most config.separability_pairs pairs, drawn at random. The interval is a bootstrap over pairs, widened
    for what the folds' classifiers share (Nadeau & Bengio 2003: a variance of 1/K + 1/(K-1) instead of 1/K folds);
    without this a 95 % interval covered 89 % on indistinguishable modalities. None for fewer than FOLDS pairs.
    """
    random = np.random.default_rng(config.seed)
    chosen = random.permutation(one_to_one(pairs))[: config.separability_pairs]
    if len(chosen) < FOLDS:
        return None
    rows = torch.stack([as_float32(image[chosen[:, 0]]), as_float32(text[chosen[:, 1]])], 1)  # (p, 2, D)
    fold = np.arange(len(chosen)) % FOLDS
    right = np.empty(len(chosen))  # share of each pair's two rows that are classified correctly
    for held_out in range(FOLDS):
        known = torch.from_numpy(fold != held_out)
        logits = _fitted(rows[known])(rows[~known])  # (q, 2)
        right[fold == held_out] = ((logits > 0) == torch.tensor([True, False])).double().mean(1).numpy()
    value = right.mean()
    widened = value + WIDENING * (np.array(bootstrap_interval(right, config.confidence, config.seed)) - value)
    return metric(value, widened.clip(0, 1), len(chosen))


def one_to_one(pairs: np.ndarray) -> np.ndarray:
    """Of pairs (p, 2) the first of each image, and of those the first of each text."""
    for column in (0, 1):
        pairs = pairs[np.sort(np.unique(pairs[:, column], return_index=True)[1])]
    return pairs


@torch.no_grad()
def _fitted(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Logistic regression by L-BFGS of (p, 2, D), image and text: a function of (…, D) that is > 0 for an image."""
    flat = rows.flatten(0, 1).double()
    mean, deviation = flat.mean(0), flat.std(0, correction=0).clamp(min=FLATTEST)
    features = (flat - mean) / deviation
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(rows))
    weights = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=STEPS, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = features @ weights[:-1] + weights[-1]
        value = softplus(-sign * logits).mean() + DECAY / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return lambda z: ((z.double() - mean) / deviation) @ weights[:-1] + weights[-1]
