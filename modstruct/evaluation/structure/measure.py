"""Structure of a latent space: every metric that the given embeddings allow; they may be larger than memory."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from modstruct.errors import require
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.rows import check_dimensions, check_rows, checked_pairs, row_blocks
from modstruct.evaluation.structure.alignment import (
    GRID,
    alignment,
    bridge_deviation,
    geometric_consistency,
    modality_gap,
    orthogonality,
    uniformity,
)
from modstruct.evaluation.structure.sampling import SamplingConfig, metric
from modstruct.evaluation.structure.shape import effective_rank, hubness, linear_separability, spectra

OPTIONAL = ("image_augmented", "image_independent", "text_independent")
UNIT_NORM_TOLERANCE = 0.02
"""bfloat16 rounds a norm by less."""
DEFAULT = SamplingConfig()


def measure_set_structure(embedded: EmbeddedSet, config: SamplingConfig = DEFAULT) -> dict[str, Any]:
    """Structure of a set's latent space, on one process.

    embedded: with texts and pairs; the augmented view and the independent embeddings are measured where the set has
    them. Returns the content of METRIC.json with the metrics and curves of `structure_metrics`. Raises ValueError if
    the set has no texts or no pairs.
    """
    started = time.monotonic()
    image, text, pairs = embedded.distinct_rows("image"), embedded.rows("text"), np.asarray(embedded.distinct_pairs)
    require(len(pairs) > 0, "pairs", str(embedded.folder), "this set has none: embed one whose images have captions")
    more = {name: embedded.distinct_rows(name) for name in OPTIONAL if name in embedded.arrays}
    metrics = structure_metrics(image, text, pairs, config=config, **more)
    return {
        "metric": "structure",
        "set": embedded.name,
        "figures": {name: value for name, value in metrics.items() if name != "curves"},
        "curves": metrics["curves"],
        "settings": asdict(config) | {"arrays": ["image", "text", *more]},
        "rows": {"image": len(image), "text": len(text), "pairs": len(pairs)},
        "source_fingerprint": embedded.source.get("fingerprint"),
        "seconds": time.monotonic() - started,
        "command": list(sys.argv),
    }


def structure_metrics(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray | None = None,
    image_augmented: np.ndarray | None = None,
    image_independent: np.ndarray | None = None,
    text_independent: np.ndarray | None = None,
    config: SamplingConfig = DEFAULT,
) -> dict[str, dict]:
    """Every metric of the latent structure that the given embeddings allow.

    image, image_augmented, image_independent: (n, D), text, text_independent: (m, D), float16 or float32, unit norm,
    in memory or memory-mapped. pairs: (p, 2), (image row, text row), each counted once; None pairs row j with row j.
    Returns metrics {"value": …}; a sampled one also has "low" and "high", its confidence interval, and "rows", the
    rows or pairs that were sampled:
      alignment, uniformity_image, uniformity_text, modality_gap    as `basic.structure`
      geometry_inter, geometry_intra                                `alignment.geometric_consistency`
      linear_separability                                           `shape.linear_separability`
      effective_rank_image, …_text and …_image_uncentred, …_text_uncentred    `shape.effective_rank`
      hubness_text, hubness_image                                   `shape.hubness`
      bridge_best_t, bridge_deviation                               t of the least deviation, and that deviation
      orthogonality_image, …_text, uniformity_image_independent, …_text_independent
    and "curves", lists of floats: "bridge_t" and "bridge_deviation", "spectrum_image" and "spectrum_text" (standard
    deviations along principal axes, descending).
    Means over rows or pairs, and spectra, are exact at any size; metrics over all pairs of rows up to
    config.exact_rows rows. Raises ValueError, by name, for embeddings that are empty, not finite, not of unit norm, or
    whose shapes do not match.
    """
    given = {
        "image": image,
        "text": text,
        "augmented image": image_augmented,
        "independent image": image_independent,
        "independent text": text_independent,
    }
    for name, rows in given.items():
        if rows is None:
            continue
        check_rows(name, rows)
        check_dimensions("image", image, name, rows)
        like = text if name.endswith("text") else image
        if name != "text" and len(rows) != len(like):
            raise ValueError(f"there are {len(rows)} {name} embeddings: there must be {len(like)}, one for each row")
        _check_norms(name, rows)
    if pairs is None:
        if len(image) != len(text):
            raise ValueError(f"{len(image)} image and {len(text)} text rows: without pairs they must be as many")
        pairs = np.repeat(np.arange(len(image))[:, None], 2, axis=1)
    pairs = checked_pairs(pairs, len(image), len(text), ("images", "texts"))
    curves: dict[str, list[float]] = {}
    metrics = {
        "alignment": metric(alignment(image, text, pairs)),
        "uniformity_image": uniformity(image, config),
        "uniformity_text": uniformity(text, config),
        "modality_gap": metric(modality_gap(image, text)),
        "linear_separability": linear_separability(image, text, pairs, config),
        **geometric_consistency(image, text, pairs, config),
    }
    for name, rows in (("image", image), ("text", text)):
        plain, centred = spectra(rows)
        metrics[f"effective_rank_{name}"] = metric(effective_rank(centred))
        metrics[f"effective_rank_{name}_uncentred"] = metric(effective_rank(plain))
        curves[f"spectrum_{name}"] = centred.tolist()
    metrics |= hubness(image, text, pairs, config)
    if image_augmented is not None:
        deviation = bridge_deviation(image, text, image_augmented, pairs)
        best = deviation.best_t()
        metrics |= {"bridge_best_t": metric(best), "bridge_deviation": metric(deviation.at(best))}
        curves |= {"bridge_t": GRID.tolist(), "bridge_deviation": [deviation.at(t) for t in GRID]}
    for name, shared, own in (("image", image, image_independent), ("text", text, text_independent)):
        if own is not None:
            metrics[f"orthogonality_{name}"] = metric(orthogonality(shared, own))
            metrics[f"uniformity_{name}_independent"] = uniformity(own, config)
    return {name: value for name, value in metrics.items() if value is not None} | {"curves": curves}


def _check_norms(name: str, rows: np.ndarray) -> None:
    for start, block in row_blocks(rows):
        norms = block.norm(dim=1)
        off = ((norms - 1).abs() > UNIT_NORM_TOLERANCE).nonzero()[:, 0]
        if len(off):
            raise ValueError(
                f"{name} embeddings must have unit norm, and row {start + int(off[0])} has norm {norms[off[0]]:.3g}: "
                "divide each row by its norm"
            )
