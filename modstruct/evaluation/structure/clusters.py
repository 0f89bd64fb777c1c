"""k-means over both modalities: whether clusters follow the classes or the modalities (V-measure, homogeneity)."""

from __future__ import annotations

import numpy as np
from scipy.stats import entropy

from modstruct.evaluation.retrieval.rows import as_float32


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
        float(sum(entropy(np.unique(of, return_counts=True)[1]) for of in some))
        for some in ([classes], [classes, clusters])
    )
    return known / whole, expected / whole, 2 * known / both, 2 * expected / both
