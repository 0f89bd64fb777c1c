"""Structure of a latent space: every metric that a set's embeddings allow; they may be larger than memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from modstruct.distributed.collect import on_main, share_out
from modstruct.errors import require, require_counts
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Curve, Result, Value
from modstruct.evaluation.retrieval.rows import as_float32, check_dimensions, check_rows, checked_pairs, row_blocks
from modstruct.evaluation.statistics import t_interval
from modstruct.evaluation.structure.basic import log_potential, mean_potential
from modstruct.evaluation.structure.pairs import (
    GRID,
    alignment,
    bridge,
    geometric_consistency,
    modality_gap,
    orthogonality,
)
from modstruct.evaluation.structure.shape import (
    FOLDS,
    effective_rank,
    hubness,
    one_to_one,
    separability_interval,
    separated,
    spectra,
)

MODALITIES = {"image": "images", "text": "texts"}
OPTIONAL = ("image_augmented", "image_independent", "text_independent")
UNIT_NORM_TOLERANCE = 0.02
"""bfloat16 rounds a norm by less."""
ABOUT = {
    "alignment": "Mean squared distance between the two embeddings of a pair, from 0 to 4.",
    "uniformity": "How evenly embeddings fill the sphere: log of the mean of exp(-t d²) over the distances d of any "
    "two of them, with t = 2, from -8 to 0; lower is more even.",
    "modality_gap": "Distance of the mean image embedding from the mean text embedding, from 0 to 2.",
    "linear_separability": "Accuracy of a linear classifier that tells image from text embeddings of unseen pairs.",
    "geometry_inter": "Mean of (⟨image j, text k⟩ - ⟨image k, text j⟩)² over all pairs of pairs j, k.",
    "geometry_intra": "Mean of (⟨image j, image k⟩ - ⟨text j, text k⟩)² over all pairs of pairs j, k.",
    "effective_rank": "Along how many directions embeddings spread: exp of the entropy of their singular values.",
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
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts("structure", self, ("exact_rows", "separability_pairs"))
        for name, least in (("batches", 10), ("hubness_batches", 10), ("hubness_batch", 2), ("batch", 2)):
            require(getattr(self, name) >= least, f"structure.{name}", getattr(self, name), f"at least {least}")


DEFAULT = StructureConfig()


def measure(embedded: EmbeddedSet, config: StructureConfig = DEFAULT) -> Result:
    """Structure of a set's latent space; metrics and sampled batches are shared out over the processes.

    embedded: with texts and pairs; the augmented view and the independent embeddings are measured where the set has
    them. Raises ValueError if the set has no pairs, and as `structure_metrics`.
    """
    pairs = np.asarray(embedded.distinct_pairs)
    require(len(pairs) > 0, "pairs", embedded.name, "this set has none: embed one whose images have captions")
    image, text = embedded.distinct_rows("image"), embedded.rows("text")
    more = {name: embedded.distinct_rows(name) for name in OPTIONAL if name in embedded.arrays}
    values, curves = structure_metrics(image, text, pairs, **more, config=config)
    return Result(
        "structure",
        embedded.name,
        values,
        "Structure of the latent space",
        "Shape of the two clouds of embeddings: how near pairs lie, how evenly each modality fills the sphere, how far "
        "apart the modalities lie, along how many directions they spread, and where the augmented image lies between "
        "image and caption. These metrics describe; no direction is better by itself.",
        curves=curves,
        settings=asdict(config) | {"arrays": ["image", "text", *more]},
        rows={"image": len(image), "text": len(text), "pairs": len(pairs)},
        fingerprint=embedded.source.get("fingerprint"),
    )


def structure_metrics(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray | None = None,
    image_augmented: np.ndarray | None = None,
    image_independent: np.ndarray | None = None,
    text_independent: np.ndarray | None = None,
    config: StructureConfig = DEFAULT,
) -> tuple[dict[str, Value], dict[str, Curve]]:
    """Every metric of the latent structure that the given embeddings allow, and curves, by name; collective.

    image, image_augmented, image_independent: (n, D), text, text_independent: (m, D), float16 or float32, unit norm,
    in memory or memory-mapped. pairs: (p, 2), (image row, text row), each counted once; None pairs row j with row j.
    Means over rows or pairs, and spectra, are exact at any size; metrics over all pairs of rows are so up to
    config.exact_rows rows. Beyond that they are means over random batches with Student's interval, and the value's
    `rows` are those that were sampled; hubness is then that of config.hubness_batch pairs, on which it depends.
    Raises ValueError, by name, for embeddings that are empty, not finite, not of unit norm, or whose shapes do not
    match.
    """
    given = {"image": image, "text": text, "augmented image": image_augmented}
    given |= {"independent image": image_independent, "independent text": text_independent}
    on_main(lambda: _check({name: rows for name, rows in given.items() if rows is not None}))
    if pairs is None:
        as_many = len(image) == len(text)
        require(as_many, "pairs", None, f"{len(image)} image and {len(text)} text rows: without pairs as many of both")
        pairs = np.repeat(np.arange(len(image))[:, None], 2, axis=1)
    pairs = checked_pairs(pairs, len(image), len(text), ("images", "texts"))
    sampled: dict[str, int] = {}
    jobs: dict[tuple[str, ...], list[Callable[[], Any]]] = {
        ("alignment",): [partial(alignment, image, text, pairs)],
        ("modality_gap",): [partial(modality_gap, image, text)],
    }

    def over_parts(
        names: tuple[str, ...], function: Callable[[np.ndarray], Any], rows: int, hubs: bool = False
    ) -> None:
        """Plan metrics of all rows at once, or of random batches of them."""
        parts = [np.arange(rows)]
        if rows > config.exact_rows:
            sizes = (config.hubness_batch, config.hubness_batches) if hubs else (config.batch, config.batches)
            parts = random_batches(rows, *sizes, config.seed)
            sampled.update(dict.fromkeys(names, len(parts[0]) if hubs else sum(map(len, parts))))
        jobs[names] = [partial(function, part) for part in parts]

    def uniformity(name: str, z: np.ndarray) -> None:
        if len(z) > 1:
            over_parts((name,), lambda part: mean_potential(as_float32(z[part])), len(z))

    uniformity("uniformity_image", image)
    uniformity("uniformity_text", text)
    if config.metrics == "all":
        chosen = np.random.default_rng(config.seed).permutation(one_to_one(pairs))[: config.separability_pairs]
        if len(chosen) >= FOLDS:
            rows = image[chosen[:, 0]], text[chosen[:, 1]]
            jobs["linear_separability",] = [partial(separated, *rows, fold) for fold in range(FOLDS)]
        if len(pairs) > 1:
            consistency = partial(geometric_consistency, image, text, pairs)
            over_parts(("geometry_inter", "geometry_intra"), consistency, len(pairs))
        over_parts(("hubness_text", "hubness_image"), partial(hubness, image, text, pairs), len(pairs), hubs=True)
        jobs |= {("spectrum_image",): [partial(spectra, image)], ("spectrum_text",): [partial(spectra, text)]}
        if image_augmented is not None:
            jobs["bridge",] = [partial(bridge, image, text, image_augmented, pairs)]
        for name, shared, own in (("image", image, image_independent), ("text", text, text_independent)):
            if own is not None:
                jobs[f"orthogonality_{name}",] = [partial(orthogonality, shared, own)]
                uniformity(f"uniformity_{name}_independent", own)
    work = [(names, job) for names, planned in jobs.items() for job in planned]
    found: dict[str, list[Any]] = defaultdict(list)
    for (names, _), result in zip(work, share_out(work, lambda item: item[1]()), strict=True):
        for name, part in zip(names, result if len(names) > 1 else [result], strict=True):
            found[name].append(part)
    return _values_and_curves(found, sampled)


def _values_and_curves(
    found: Mapping[str, list[Any]], sampled: Mapping[str, int]
) -> tuple[dict[str, Value], dict[str, Curve]]:
    """Of each metric's results of all parts."""
    values: dict[str, Value] = {}
    curves: dict[str, Curve] = {}
    for name, parts in found.items():
        if name.startswith("spectrum_"):
            modality, (plain, centred) = name.removeprefix("spectrum_"), parts[0]
            values[f"effective_rank_{modality}"] = _value(f"effective_rank_{modality}", effective_rank(centred))
            whole = f"effective_rank_{modality}_uncentred"
            values[whole] = _value(whole, effective_rank(plain))
            axes = [float(axis) for axis in range(1, len(centred) + 1)]
            more = {"x_label": "principal axis", "y_label": "standard deviation", "logarithmic": True}
            curves[name] = Curve(axes, centred.tolist(), MODALITIES[modality], **more, plot="Spectrum")
        elif name == "bridge":
            best, deviations = parts[0]
            values["bridge_best_t"] = _value("bridge_best_t", best)
            values["bridge_deviation"] = _value("bridge_deviation", deviations[-1])
            axis_labels = "t, from caption (0) to image (1)", "mean squared distance of the augmented image"
            curves["bridge_deviation"] = Curve(
                GRID.tolist(), deviations[:-1], "Deviation from the bridge", *axis_labels, chosen=best
            )
        elif name == "linear_separability":
            right = np.concatenate(parts)
            low, high = separability_interval(right)
            more: dict[str, Any] = {"unit": "share", "chance": 0.5}
            values[name] = _value(name, right.mean(), low=low, high=high, rows=len(right), **more)
        else:
            finish = log_potential if name.startswith("uniformity") else float
            values[name] = _value(name, finish(np.mean(parts)))
            if name in sampled:
                low, high = map(finish, t_interval(np.array(parts)))
                values[name] = replace(values[name], low=low, high=high, rows=sampled[name])
    return values, curves


def _value(name: str, value: float, **more: Any) -> Value:
    start = next(start for start in ABOUT if name.startswith(start))
    of, _, kind = name.removeprefix(start).removeprefix("_").partition("_")
    label = ", ".join(filter(None, (start.replace("_", " "), MODALITIES.get(of), kind)))
    return Value(float(value), label, about=ABOUT[start], **more)


def random_batches(rows: int, batch: int, batches: int, seed: int) -> list[np.ndarray]:
    """Disjoint batches of row numbers, each ascending: `batches` where there are enough rows, at least 10."""
    batches = min(batches, max(10, rows // batch))
    batch = min(batch, rows // batches)
    order = np.random.default_rng(seed).permutation(rows)[: batch * batches]
    return [np.sort(part) for part in order.reshape(batches, batch)]


def _check(given: Mapping[str, np.ndarray]) -> None:
    for name, rows in given.items():
        check_rows(name, rows)
        check_dimensions("image", given["image"], name, rows)
        expected = len(given["text" if name.endswith("text") else "image"])
        remedy = f"there are {len(rows)} {name} embeddings: there must be {expected}, one for each row"
        if len(rows) != expected:
            raise ValueError(remedy)
        for start, block in row_blocks(rows):
            norms = block.norm(dim=1)
            off = ((norms - 1).abs() > UNIT_NORM_TOLERANCE).nonzero()[:, 0]
            if len(off):
                raise ValueError(
                    f"{name} embeddings must have unit norm, and row {start + int(off[0])} has norm "
                    f"{norms[off[0]]:.3g}: divide each row by its norm"
                )
