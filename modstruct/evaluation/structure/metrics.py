"""Metrics of a latent space, each of arrays in memory or memory-mapped; no collectives.

image: (n, D), text: (m, D), of unit norm. pairs: (p, 2), (image row, text row). Alignment, gaps, orthogonality, bridge
and spectra are exact at any size, in float64; geometry and hubness, over all pairs of rows, are of the chosen rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy import stats
from scipy.optimize import minimize_scalar
from torch import Tensor

from modstruct import distributed
from modstruct.evaluation.classification import linear
from modstruct.evaluation.retrieval.nearest import nearest
from modstruct.evaluation.retrieval.rows import as_float32, block_rows, distinct_rows, row_blocks
from modstruct.evaluation.statistics import bootstrap_mean
from modstruct.losses.bridge import SHORTEST_MEAN
from modstruct.pairwise.gaussian import potential_sum
from modstruct.pairwise.geometric import gram_products

UNIFORMITY_T = 2.0
"""t of the Gaussian potential, as Wang & Isola and L_Uni use it."""
UNIFORMITY_ROWS = 16_384
"""Most rows that uniformity is computed on, evenly spaced ones, since its cost grows with the square."""


@torch.no_grad()
def structure(image: Tensor, text: Tensor, pairs: Tensor | None = None) -> dict[str, float]:
    """Alignment, uniformity of each modality and modality gap, of gathered rows; as they are defined below.

    image: (n, D), text: (m, D), unit norm, any floating type; measured in float32. pairs: (p, 2) rows of image and
    text that belong together; None pairs row j with row j. Uniformity is left out where there are fewer than two rows.
    """
    image, text = image.detach().float(), text.detach().float()
    if pairs is None and len(image) != len(text):
        raise ValueError(f"{len(image)} image and {len(text)} text rows: without pairs they must be as many")
    a, b = (image, text) if pairs is None else (image[pairs[:, 0]], text[pairs[:, 1]])
    metrics = {
        "alignment": float((a - b).square().sum(1).mean()),
        "uniformity_image": uniformity(image),
        "uniformity_text": uniformity(text),
        "modality_gap": float((image.mean(0) - text.mean(0)).norm()),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def uniformity(z: Tensor) -> float | None:
    """log of `mean_potential`; None for fewer than two rows. Beyond UNIFORMITY_ROWS rows that of evenly spaced ones."""
    if len(z) > UNIFORMITY_ROWS:
        z = z[torch.linspace(0, len(z) - 1, UNIFORMITY_ROWS, dtype=torch.float64, device=z.device).round().long()]
    return log_potential(mean_potential(z)) if len(z) > 1 else None


@torch.no_grad()
def mean_potential(z: Tensor) -> float:
    """Mean of exp(-t |z_j - z_k|^2) over j != k (Wang & Isola 2020, equation 5). z: (N, D), float32, N > 1."""
    total, _, _ = potential_sum(z.contiguous(), None, UNIFORMITY_T, False, "float32")
    return (float(total) - len(z)) / (len(z) * (len(z) - 1))  # without each row's potential with itself


def log_potential(mean: float) -> float:
    """Uniformity; of unit rows at least -4 t, below which rounding, or the end of an interval, may fall."""
    return math.log(max(mean, math.exp(-4 * UNIFORMITY_T)))


GRID = np.linspace(0, 1, 21)
"""Of the bridge's t."""
K = 10
"""Nearest items that count for hubness."""
FLOAT64_ROWS = 8192
FOLDS = 5
WIDENING = (1 + FOLDS / (FOLDS - 1)) ** 0.5
DECAY = 1e-3
"""Weight of |w|^2 / 2 beside the mean logistic loss, of features in units of their deviation."""
FIT = linear.FitConfig(max_iterations=200, gradient_tolerance=1e-7, precision="float64")


def alignment(image: np.ndarray, text: np.ndarray, pairs: np.ndarray) -> float:
    """Mean |z_V - z_T|^2 over pairs, from 0 to 4 (Wang & Isola 2020, alpha = 2)."""
    blocks = _paired_blocks((image, pairs[:, 0]), (text, pairs[:, 1]))
    return sum(float((a - b).square().sum()) for a, b in blocks) / len(pairs)


def mean_row(rows: np.ndarray) -> Tensor:
    """(D,) float64."""
    sums = [block.double().sum(0) for _, block in row_blocks(rows)]
    return torch.stack(sums).sum(0) / len(rows)


def modality_gap(image: np.ndarray, text: np.ndarray) -> float:
    """|mean z_V - mean z_T|, from 0 to 2 (Liang et al. 2022)."""
    return float((mean_row(image) - mean_row(text)).norm())


def relative_gap(image: np.ndarray, text: np.ndarray, pairs: np.ndarray) -> float:
    """Relative modality gap (Schrodi et al. 2024), from 0 to 1; rows of either modality: at least two.

    d_pair / (d_pair + (d_II + d_TT) / 2), d = (1 - cos) / 2: its mean over pairs, over all j != k of images, and of
    texts. Of unit rows d is |a - b|^2 / 4, and the mean of |z_j - z_k|^2 over j != k is twice the variance, summed over
    the dimensions: no N x N matrix. 0 where all rows are one point.
    """
    apart = alignment(image, text, pairs)
    whole = apart + _total_variance(image) + _total_variance(text)
    return apart / whole if whole else 0.0


def _total_variance(rows: np.ndarray) -> float:
    """Sum over the dimensions of the unbiased variance."""
    mean = mean_row(rows)
    return sum(float((block.double() - mean).square().sum()) for _, block in row_blocks(rows)) / (len(rows) - 1)


def gap_by_dimension(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """|mean z_V - mean z_T| of each dimension, (D,) float64, descending (Schrodi et al. 2024)."""
    return (mean_row(image) - mean_row(text)).abs().sort(descending=True).values.numpy()


def orthogonality(shared: np.ndarray, independent: np.ndarray) -> float:
    """Mean <z_j, z^i_j>^2, from 0 to 1, of rows j: one modality's half of L_Ortho (Jiang et al. 2023, section 4.1)."""
    blocks = zip(row_blocks(shared), row_blocks(independent), strict=True)
    return sum(float((a.double() * b.double()).sum(1).square().sum()) for (_, a), (_, b) in blocks) / len(shared)


def geometry(image: np.ndarray, text: np.ndarray, pairs: np.ndarray, chosen: np.ndarray) -> tuple[float, float]:
    """Both terms of L_GC (Jiang et al. 2023, section 4.3) over pairs of chosen pairs j != k; chosen: (c,), c > 1.

    The means of (<zV_j,zT_k> - <zV_k,zT_j>)^2, inter-modality, and of (<zV_j,zV_k> - <zT_j,zT_k>)^2, intra-modality.
    """
    a, b = as_float32(image[pairs[chosen, 0]]), as_float32(text[pairs[chosen, 1]])
    n = len(chosen)
    own = (a.double().square().sum(1) - b.double().square().sum(1)).square().sum()  # j = k, for rounded norms
    if n < a.shape[1]:
        a, b = a.double(), b.double()
        cross = a @ b.T
        inter, intra = (cross - cross.T).square().sum(), (a @ a.T - b @ b.T).square().sum()
    else:
        plus, minus, mixed = gram_products(a, b)
        both, difference = (plus * minus).sum(), (mixed * mixed.T).sum()
        inter, intra = (both - difference) / 2, (both + difference) / 2
    return max(float(inter), 0.0) / (n * (n - 1)), max(float(intra - own), 0.0) / (n * (n - 1))


def bridge(image: np.ndarray, text: np.ndarray, augmented: np.ndarray, pairs: np.ndarray) -> tuple[float, list[float]]:
    """The t in [0, 1] with the least deviation, and the deviations at each t of GRID and at that t.

    The deviation is the mean over pairs of |zV^a - mu|^2, mu = (t zV + (1-t) zT) / |t zV + (1-t) zT| (Jiang et al.
    2023, section 4.2), from six inner products of each pair.
    """
    parts = []
    for a, v, z in _paired_blocks((augmented, pairs[:, 0]), (image, pairs[:, 0]), (text, pairs[:, 1])):
        products = ((a, a), (a, v), (a, z), (v, v), (z, z), (v, z))
        parts.append(np.stack([(x * y).sum(1).numpy() for x, y in products]))
    own, to_image, to_text, of_image, of_text, between = np.concatenate(parts, axis=1)

    def deviation(t: float) -> float:
        s = 1 - t
        length = np.sqrt(np.maximum(t * t * of_image + s * s * of_text + 2 * t * s * between, 0))
        divisor = np.maximum(length, SHORTEST_MEAN)
        return float(np.mean(own - 2 * (t * to_image + s * to_text) / divisor + (length / divisor) ** 2))

    on_grid = [deviation(t) for t in GRID]
    best = int(np.argmin(on_grid))
    around = GRID[max(best - 1, 0)], GRID[min(best + 1, len(GRID) - 1)]
    found = minimize_scalar(deviation, bounds=around, method="bounded", options={"xatol": 1e-8})
    best_t = min((float(GRID[best]), float(found.x)), key=deviation)
    return best_t, [*on_grid, deviation(best_t)]


def _paired_blocks(*columns: tuple[np.ndarray, np.ndarray]) -> Iterator[list[Tensor]]:
    """Yields float64 blocks (b, D) of several arrays, each by its own row numbers (p,)."""
    at_once = block_rows(columns[0][0].shape[1])
    for start in range(0, len(columns[0][1]), at_once):
        yield [as_float32(array[rows[start : start + at_once]]).double() for array, rows in columns]


def hubness(image: np.ndarray, text: np.ndarray, pairs: np.ndarray, chosen: np.ndarray) -> tuple[float, float]:
    """Skewness of k-occurrence (Radovanović et al. 2010) of texts, and of images, within those of the chosen pairs.

    Of how often each text is among the K nearest of an image, and each image of a text. Equal rows are one item.
    """
    images, texts = (as_float32(rows[np.unique(pairs[chosen, i])]).numpy() for i, rows in enumerate((image, text)))
    return skewness(occurrences(images, texts)), skewness(occurrences(texts, images))


def occurrences(queries: np.ndarray, gallery: np.ndarray, k: int = K) -> np.ndarray:
    """(u,): how many queries have each distinct gallery row among their k nearest."""
    first, _, _ = distinct_rows(gallery)
    return np.bincount(nearest(queries, gallery, k, first).reshape(-1), minlength=len(first))


def skewness(values: np.ndarray) -> float:
    """E (x - mean)^3 / deviation^3; 0 where all are equal, of which scipy's is no number."""
    return float(stats.skew(values)) if np.ptp(values) else 0.0


def spectra(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values of Z / root n and of the centred (Z - mean) / root n, (min(n, D),) each, descending, float64.

    rows: Z, (n, D). The centred ones are the standard deviations along the principal axes. Values below 1e-8 of the
    largest are rounding. Memory: O(D^2) and a block.
    """
    mean = mean_row(rows)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for _, block in row_blocks(rows, FLOAT64_ROWS):
        centred = block.double() - mean
        products.addmm_(centred.T, centred)
    products /= len(rows)

    def singular_values(matrix: Tensor) -> np.ndarray:
        return torch.linalg.eigvalsh(matrix).clamp(min=0).sqrt().flip(0).numpy()[: min(rows.shape)]

    return singular_values(products + torch.outer(mean, mean)), singular_values(products)


def effective_rank(singular_values: np.ndarray) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007, definition 1); 1 if all are 0."""
    return float(np.exp(stats.entropy(singular_values[singular_values > 0])))


def separated(image: np.ndarray, text: np.ndarray, pairs: np.ndarray, held_out: int) -> np.ndarray:
    """Share of each pair's two rows that are classified right by a logistic regression on the other folds, (q,).

    pairs: (p, 2), (image row, text row), in fold j % FOLDS both rows of pair j: otherwise a classifier that was trained
    on the image would take its aligned text for an image.
    """
    rows = np.concatenate([image[pairs[:, 0]], text[pairs[:, 1]]])
    every = linear.Features((rows,), np.arange(len(rows)), np.repeat([1, 0], len(pairs)))
    own = np.tile(np.arange(len(pairs)) % FOLDS == held_out, 2)
    fitted, others = every.take(np.flatnonzero(~own)), every.take(np.flatnonzero(own))
    statistics = linear.column_statistics(fitted, distributed.device())
    blocks, watched = (
        linear.RowBlocks(features.standardised_by(statistics), distributed.device(), FIT.dtype, 2)
        for features in (fitted, others)
    )
    # Two rows of weights that differ by w have at least |w|^2 / 2, and the penalty is weighed against a sum over rows.
    classifier = linear.fit_logistic_regression(blocks, 2, 2 * DECAY * len(blocks), FIT)
    right = [(scores[:, 1] > scores[:, 0]) == (labels == 1) for _, scores, labels in classifier.scores(watched)]
    return torch.cat(right).cpu().numpy().reshape(2, -1).mean(0)


def separability_interval(right: np.ndarray) -> tuple[float, float]:
    """Of the mean of `separated` over all pairs, (p,), widened for what the folds' classifiers share (Nadeau & Bengio
    2003: a variance of 1/K + 1/(K-1) instead of 1/K folds)."""
    low, high = np.clip(right.mean() + WIDENING * (np.array(bootstrap_mean(right)) - right.mean()), 0, 1)
    return float(low), float(high)


def one_to_one(pairs: np.ndarray) -> np.ndarray:
    """Of pairs (p, 2) the first of each image, and of those the first of each text."""
    for column in (0, 1):
        pairs = pairs[np.sort(np.unique(pairs[:, column], return_index=True)[1])]
    return pairs


def clustered(
    image: np.ndarray, text: np.ndarray, pairs: np.ndarray, labels: np.ndarray, start: int
) -> tuple[float, ...]:
    """One start of k-means on images and texts together, k being the number of classes.

    pairs: (p, 2), (image row, text row), no row twice. labels: (n,), the class of each image, and so of its text.
    start: seed of the first centres (k-means++). Returns the sum of squared distances to the centres; of the classes
    the V-measure, and of the modalities the homogeneity, as `told` gives them, each with its chance.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = np.concatenate([as_float32(a[pairs[:, side]]).numpy() for side, a in enumerate((image, text))])
    classes = np.tile(labels[pairs[:, 0]], 2)
    with threadpool_limits(1):  # sums of several threads differ in the last bit from run to run
        found = KMeans(len(np.unique(classes)), n_init=1, random_state=start).fit(rows)
    v_measure = told(classes, found.labels_)[2:]
    return float(found.inertia_), *v_measure, *told(np.repeat([0, 1], len(pairs)), found.labels_)[:2]


def told(classes: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float, float]:
    """Homogeneity of clusters, its chance, V-measure and its chance (Rosenberg & Hirschberg 2007), from 0 to 1.

    classes, clusters: (n,), at least two classes. Homogeneity: the share of the classes' entropy that the cluster
    tells, I / H(class). V-measure: its harmonic mean with completeness, I / H(cluster). Chance: of a random assignment
    with clusters of these sizes, exact, from the expected mutual information (Vinh et al. 2010).
    """
    from sklearn.metrics import mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

    table = contingency_matrix(classes, clusters, sparse=True)
    known = float(mutual_info_score(None, None, contingency=table))
    expected = float(expected_mutual_information(table, len(classes)))
    whole, both = (
        float(sum(stats.entropy(np.unique(of, return_counts=True)[1]) for of in some))
        for some in ([classes], [classes, clusters])
    )
    return known / whole, expected / whole, 2 * known / both, 2 * expected / both
