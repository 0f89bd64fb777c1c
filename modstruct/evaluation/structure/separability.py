"""Can a hyperplane tell images from texts? The modality gap as a classifier sees it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from modstruct.evaluation.retrieval.rows import as_float32
from modstruct.evaluation.structure.sampling import SamplingConfig, bootstrap_interval, figure

FOLDS = 5
WIDENING = (1 + FOLDS / (FOLDS - 1)) ** 0.5
DECAY = 1e-3
"""Weight of |w|^2 / 2 beside the mean logistic loss, of features in units of their deviation."""
STEPS = 200
FLATTEST = 1e-6
"""Deviation below which a feature is not stretched."""


def linear_separability(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, config: SamplingConfig
) -> dict[str, float] | None:
    """Cross-validated accuracy of a logistic regression that tells image from text embeddings; chance is 0.5.

    image: (n, D), text: (m, D). pairs: (p, 2); each image and each text is used once at most, with the other of its
    pair in the same fold: else a classifier that has seen the image would take its aligned text for one. At most
    config.separability_pairs pairs, drawn at random. The interval is the bootstrap's over pairs, widened for what the
    folds' classifiers share (Nadeau & Bengio 2003: a variance of 1/K + 1/(K-1) instead of 1/K folds), without which
    95 % covered 89 % where nothing can be told. None for fewer than FOLDS pairs.
    """
    random = np.random.default_rng(config.seed)
    chosen = random.permutation(one_to_one(pairs))[: config.separability_pairs]
    if len(chosen) < FOLDS:
        return None
    rows = torch.stack([as_float32(image[chosen[:, 0]]), as_float32(text[chosen[:, 1]])], 1)  # (p, 2, D)
    fold = np.arange(len(chosen)) % FOLDS
    right = np.empty(len(chosen))  # share of each pair's two that were told right
    for held_out in range(FOLDS):
        known = torch.from_numpy(fold != held_out)
        logits = _fitted(rows[known])(rows[~known])  # (q, 2)
        right[fold == held_out] = ((logits > 0) == torch.tensor([True, False])).double().mean(1).numpy()
    value = right.mean()
    widened = value + WIDENING * (np.array(bootstrap_interval(right, config.confidence, config.seed)) - value)
    return figure(value, tuple(widened.clip(0, 1)), len(chosen))


def one_to_one(pairs: np.ndarray) -> np.ndarray:
    """Of pairs (p, 2) the first of each image, and of those the first of each text."""
    for column in (0, 1):
        pairs = pairs[np.sort(np.unique(pairs[:, column], return_index=True)[1])]
    return pairs


@torch.no_grad()
def _fitted(rows: Tensor):
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
