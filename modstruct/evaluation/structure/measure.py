"""Structure of a latent space: every metric that a set's embeddings allow; they may be larger than memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from modstruct.distributed.collect import on_main, share_out
from modstruct.errors import require, require_counts
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet, distinct_classes
from modstruct.evaluation.result import Curve, Result, Value
from modstruct.evaluation.retrieval.rows import as_float32, check_dimensions, check_unit_rows, checked_pairs
from modstruct.evaluation.statistics import t_interval
from modstruct.evaluation.structure import metrics
from modstruct.evaluation.structure.metrics import clustered, log_potential, mean_potential

Arrays = Mapping[str, np.ndarray]
Jobs = dict[tuple[str, ...], list[Callable[[], Any]]]
MODALITIES = {"image": "images", "text": "texts"}
OPTIONAL = ("image_augmented", "image_independent", "text_independent")
ABOUT = {
    "alignment": "Mean squared distance between the two embeddings of a pair, from 0 to 4.",
    "uniformity": "How evenly embeddings fill the sphere: log of the mean of exp(-t d²) over the distances d of any "
    "two of them, with t = 2, from -8 to 0; lower is more even.",
    "modality_gap": "Distance of the mean image embedding from the mean text embedding, from 0 to 2.",
    "relative_modality_gap": "How far pairs lie apart beside embeddings of one modality: d_pair / (d_pair + d_own), "
    "from 0 to 1, with d = (1 - cos) / 2 averaged over pairs, and over any two of one modality.",
    "gap_dimensions": "How many dimensions carry the gap of the means: (sum of d²)² / (sum of d⁴), d being the means' "
    "difference in a dimension, from 1 to all of them; it depends on the axes.",
    "gap_in_three_dimensions": "Share of the squared gap of the means in the three dimensions that carry most of it.",
    "temperature": "1 / logit scale of the model, by which its loss divides cosines: gaps of unlike temperatures are "
    "no like comparison, since a learnt temperature keeps the gap open.",
    "v_measure": "V-measure against the classes of k-means clusters of images and captions together, k being the "
    "number of classes: the harmonic mean of how much clusters tell of the class, and classes of the cluster.",
    "cluster_modality": "Homogeneity of these clusters in modality: how much of it they tell, 100 % where no cluster "
    "holds both images and captions.",
    "linear_separability": "Accuracy of a linear classifier that tells image from text embeddings of unseen pairs.",
    "geometry_inter": "Mean of (⟨image j, text k⟩ - ⟨image k, text j⟩)² over all pairs of pairs j, k.",
    "geometry_intra": "Mean of (⟨image j, image k⟩ - ⟨text j, text k⟩)² over all pairs of pairs j, k.",
    "effective_rank": "Along how many directions embeddings spread around their mean: exp of the entropy of the "
    "singular values of embeddings less mean; uncentred, of embeddings as they are, where a long mean makes it small.",
    "hubness": "Skewness of how often an item is among the 10 nearest of one of the other modality: 0 without hubs, "
    "several units where a few items are near to very many.",
    "bridge_best_t": "Where the augmented image lies between caption (t = 0) and image (t = 1): the nearest point's t.",
    "bridge_deviation": "Mean squared distance of the augmented image from the point of the bridge at the best t.",
    "orthogonality": "Mean squared inner product of the shared and the independent embedding, from 0 to 1.",
}
"""Definitions, by how the names of metrics begin."""


@dataclass(frozen=True)
class StructureConfig:
    """Which metrics, up to which size they are exact, and how larger sets are sampled."""

    metrics: Literal["all", "basic"] = "all"
    """basic: alignment, uniformity and modality gap alone."""
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
    label: str = ""
    """Field of the metadata with the classes that clusters are held against; by default the set's classes."""
    cluster_pairs: int = 10_000
    """Most pairs that are clustered, one caption an image."""
    cluster_starts: int = 10
    """Starts of k-means, of which the best counts."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts("structure", self, ("exact_rows", "separability_pairs", "cluster_pairs", "cluster_starts"))
        for name, least in (("batches", 10), ("hubness_batches", 10), ("hubness_batch", 2), ("batch", 2)):
            require(getattr(self, name) >= least, f"structure.{name}", getattr(self, name), f"at least {least}")


DEFAULT = StructureConfig()


def measure(embedded: EmbeddedSet, config: StructureConfig = DEFAULT) -> Result:
    """Structure of a set's latent space; metrics and sampled batches are shared out over the processes.

    The augmented view and the independent embeddings are measured where the set has them. Metrics over all pairs of
    rows are exact up to config.exact_rows rows; beyond that they are means over random batches with Student's interval,
    and the value's `rows` are those that were sampled; hubness is then that of config.hubness_batch pairs, on which it
    depends. Raises ValueError for a set without pairs, or embeddings that are not finite or not of unit norm.
    """
    pairs = np.asarray(embedded.distinct_pairs)
    require(len(pairs) > 0, "pairs", embedded.name, "this set has none: embed one whose images have captions")
    names = ["image", "text", *(name for name in OPTIONAL if name in embedded.arrays)]
    arrays = {name: embedded.distinct_rows(name) for name in names}
    on_main(lambda: _check(arrays))
    pairs = checked_pairs(pairs, len(arrays["image"]), len(arrays["text"]), ("images", "texts"))
    classes = distinct_classes(embedded, config.label, "structure.label") if config.metrics == "all" else None
    jobs, sampled = _planned(arrays, pairs, classes, config)
    work = [(of, job) for of, planned in jobs.items() for job in planned]
    found: dict[str, list[Any]] = defaultdict(list)
    for (of, _), result in zip(work, share_out(work, lambda item: item[1]()), strict=True):
        for name, part in zip(of, result if len(of) > 1 else [result], strict=True):
            found[name].append(part)
    values, curves = _values_and_curves(found, sampled, embedded.model.get("logit_scale"))
    left_out = {} if classes is not None else {"notes": ["no clusters: the set has no classes; name structure.label"]}
    return Result(
        "structure",
        embedded.name,
        values,
        "Structure of the latent space",
        "Shape of the two clouds of embeddings: how near pairs lie, how evenly each modality fills the sphere, how far "
        "apart the modalities lie, along how many directions they spread, and where the augmented image lies between "
        "image and caption. These metrics describe; but for clusters no direction is better by itself.",
        curves=curves,
        settings=asdict(config) | {"arrays": names} | left_out,
        rows={"image": len(arrays["image"]), "text": len(arrays["text"]), "pairs": len(pairs)},
        fingerprint=embedded.source.get("fingerprint"),
    )


def _planned(
    arrays: Arrays, pairs: np.ndarray, classes: np.ndarray | None, config: StructureConfig
) -> tuple[Jobs, dict[str, int]]:
    """Names -> what computes them, part by part; and of sampled ones the number of rows."""
    image, text, sampled = arrays["image"], arrays["text"], dict[str, int]()
    jobs: Jobs = {("alignment",): [partial(metrics.alignment, image, text, pairs)]}
    jobs["modality_gap",] = [partial(metrics.modality_gap, image, text)]

    def plan(names: tuple[str, ...], function: Callable[[np.ndarray], Any], rows: int, hubs: bool = False) -> None:
        """Of all rows at once, or of random batches of them."""
        parts = [np.arange(rows)]
        if rows > config.exact_rows:
            sizes = (config.hubness_batch, config.hubness_batches) if hubs else (config.batch, config.batches)
            parts = random_batches(rows, *sizes, config.seed)
            sampled.update(dict.fromkeys(names, len(parts[0]) if hubs else sum(map(len, parts))))
        if rows > 1 or hubs:
            jobs[names] = [partial(function, part) for part in parts]

    def uniformity(name: str, z: np.ndarray) -> None:
        plan((name,), lambda part: mean_potential(as_float32(z[part])), len(z))

    uniformity("uniformity_image", image)
    uniformity("uniformity_text", text)
    if config.metrics == "basic":
        return jobs, sampled
    jobs["gap_by_dimension",] = [partial(metrics.gap_by_dimension, image, text)]
    if min(len(image), len(text)) > 1:
        jobs["relative_modality_gap",] = [partial(metrics.relative_gap, image, text, pairs)]
    single = np.random.default_rng(config.seed).permutation(metrics.one_to_one(pairs))
    if classes is not None:
        known = single[classes[single[:, 0]] >= 0][: config.cluster_pairs]
        if len(np.unique(classes[known[:, 0]])) > 1:
            starts = range(config.seed, config.seed + config.cluster_starts)
            jobs["clusters",] = [partial(clustered, image, text, known, classes, start) for start in starts]
    chosen = single[: config.separability_pairs]
    if len(chosen) >= metrics.FOLDS:
        by_fold = partial(metrics.separated, image, text, chosen)
        jobs["linear_separability",] = [partial(by_fold, fold) for fold in range(metrics.FOLDS)]
    geometry, hubness = (partial(f, image, text, pairs) for f in (metrics.geometry, metrics.hubness))
    plan(("geometry_inter", "geometry_intra"), geometry, len(pairs))
    plan(("hubness_text", "hubness_image"), hubness, len(pairs), hubs=True)
    jobs |= {(f"spectrum_{name}",): [partial(metrics.spectra, arrays[name])] for name in MODALITIES}
    if "image_augmented" in arrays:
        jobs["bridge",] = [partial(metrics.bridge, image, text, arrays["image_augmented"], pairs)]
    for name in MODALITIES:
        if (own := arrays.get(f"{name}_independent")) is not None:
            jobs[f"orthogonality_{name}",] = [partial(metrics.orthogonality, arrays[name], own)]
            uniformity(f"uniformity_{name}_independent", own)
    return jobs, sampled


def _values_and_curves(
    found: Mapping[str, list[Any]], sampled: Mapping[str, int], logit_scale: float | None
) -> tuple[dict[str, Value], dict[str, Curve]]:
    """Of each metric's results of all parts."""
    values: dict[str, Value] = {}
    curves: dict[str, Curve] = {}

    def add(name: str, value: float, **more: Any) -> None:
        start = next(start for start in ABOUT if name.startswith(start))
        of, _, kind = name.removeprefix(start).removeprefix("_").partition("_")
        label = ", ".join(filter(None, (start.replace("_", " "), MODALITIES.get(of), kind)))
        values[name] = Value(float(value), **{"label": label, "about": ABOUT[start]} | more)

    if logit_scale:
        add("temperature", 1 / logit_scale)
    for name, parts in found.items():
        if name.startswith("spectrum_"):
            modality, (plain, centred) = name.removeprefix("spectrum_"), parts[0]
            add(f"effective_rank_{modality}", metrics.effective_rank(centred))
            add(f"effective_rank_{modality}_uncentred", metrics.effective_rank(plain))
            axes = np.arange(1.0, len(centred) + 1).tolist()
            title, labels = MODALITIES[modality], ("principal axis", "standard deviation")
            curves[name] = Curve(axes, centred.tolist(), title, *labels, logarithmic=True, plot="Spectrum")
        elif name == "bridge":
            best, deviations = parts[0]
            add("bridge_best_t", best)
            add("bridge_deviation", deviations[-1])
            title, labels = "Deviation from the bridge", ("t, from caption (0) to image (1)", "mean squared distance")
            curves["bridge_deviation"] = Curve(metrics.GRID.tolist(), deviations[:-1], title, *labels, chosen=best)
        elif name == "gap_by_dimension":
            squares = parts[0] ** 2
            if squares.any():
                add("gap_dimensions", squares.sum() ** 2 / (squares**2).sum())
                add("gap_in_three_dimensions", squares[:3].sum() / squares.sum(), unit="share")
            labels = ("dimension, sorted", "|difference of the means|")
            axes = np.arange(1.0, len(squares) + 1).tolist()
            curves[name] = Curve(axes, parts[0].tolist(), "Modality gap by dimension", *labels, logarithmic=True)
        elif name == "clusters":
            _, classes, of_classes, modalities, of_modalities = min(parts)
            of = {"label": "V-measure of clusters", "chance": of_classes, "higher_is_better": True}
            add("v_measure", classes, unit="share", **of)
            add("cluster_modality", modalities, unit="share", chance=of_modalities)
        elif name == "linear_separability":
            right = np.concatenate(parts)
            bottom, top = metrics.separability_interval(right)
            add(name, right.mean(), low=bottom, high=top, rows=len(right), unit="share", chance=0.5)
        else:
            finish = log_potential if name.startswith("uniformity") else float
            low, high = map(finish, t_interval(np.array(parts))) if name in sampled else (None, None)
            add(name, finish(np.mean(parts)), low=low, high=high, rows=sampled.get(name))
    return values, curves


def random_batches(rows: int, batch: int, batches: int, seed: int) -> list[np.ndarray]:
    """Disjoint batches of row numbers, each ascending: `batches` where there are enough rows, at least 10."""
    batches = min(batches, max(10, rows // batch))
    batch = min(batch, rows // batches)
    order = np.random.default_rng(seed).permutation(rows)[: batch * batches]
    return [np.sort(part) for part in order.reshape(batches, batch)]


def _check(arrays: Arrays) -> None:
    for name, rows in arrays.items():
        check_unit_rows(name, rows)
        check_dimensions("image", arrays["image"], name, rows)
