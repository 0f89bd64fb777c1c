"""All structure figures of a source, of embeddings that may be larger than memory."""

from __future__ import annotations

import numpy as np

from modstruct.evaluation.retrieval.rows import check_dimensions, check_rows, checked_pairs, row_blocks
from modstruct.evaluation.structure import means
from modstruct.evaluation.structure.bridge import GRID, bridge_deviation
from modstruct.evaluation.structure.hubness import hubness
from modstruct.evaluation.structure.over_pairs import geometric_consistency, uniformity
from modstruct.evaluation.structure.sampling import SamplingConfig, figure
from modstruct.evaluation.structure.separability import linear_separability
from modstruct.evaluation.structure.spectrum import effective_rank, spectra

UNIT_NORM_TOLERANCE = 0.02
"""bfloat16 rounds a norm by less."""
DEFAULT = SamplingConfig()


def structure_metrics(
    image: np.ndarray,
    text: np.ndarray,
    pairs: np.ndarray | None = None,
    image_augmented: np.ndarray | None = None,
    image_independent: np.ndarray | None = None,
    text_independent: np.ndarray | None = None,
    config: SamplingConfig = DEFAULT,
) -> dict[str, dict]:
    """Every figure of the latent structure that the embeddings given allow.

    image, image_augmented, image_independent: (n, D), text, text_independent: (m, D), float16 or float32, unit norm,
    in memory or memory-mapped. pairs: (p, 2), (image row, text row), a pair counts once; None pairs row j with row j.
    Returns figures {"value": …}; one that was sampled also has "low" and "high", its confidence interval, and "rows",
    how many rows or pairs it saw:
      alignment, uniformity_image, uniformity_text, modality_gap    as `structure.structure`
      linear_separability                                           as separability.linear_separability
      geometry_inter, geometry_intra                                as over_pairs.geometric_consistency
      effective_rank_image, …_text and …_image_uncentred, …_text_uncentred    as spectrum.effective_rank
      hubness_text, hubness_image                                   as hubness.hubness
      bridge_best_t, bridge_deviation                               t of the least deviation, and that; see bridge.py
      orthogonality_image, …_text, uniformity_image_independent, …_text_independent
    and "curves": "bridge_t" and "bridge_deviation", "spectrum_image" and "spectrum_text" (deviations along principal
    axes, descending), lists of floats.
    Means over rows or pairs, and spectra, are exact at any size; figures over all pairs up to config.exact_rows rows.
    Raises ValueError, by name, for embeddings that are empty, not finite, not of unit norm, or do not fit each other.
    """
    given = {
        "image": image,
        "text": text,
        "augmented image": image_augmented,
        "independent image": image_independent,
        "independent text": text_independent,
    }
    given = {name: rows for name, rows in given.items() if rows is not None}
    for name, rows in given.items():
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
    figures = {
        "alignment": figure(means.alignment(image, text, pairs)),
        "uniformity_image": uniformity(image, config),
        "uniformity_text": uniformity(text, config),
        "modality_gap": figure(means.modality_gap(image, text)),
        "linear_separability": linear_separability(image, text, pairs, config),
        **geometric_consistency(image, text, pairs, config),
    }
    for name, rows in (("image", image), ("text", text)):
        plain, centred = spectra(rows)
        figures[f"effective_rank_{name}"] = figure(effective_rank(centred))
        figures[f"effective_rank_{name}_uncentred"] = figure(effective_rank(plain))
        curves[f"spectrum_{name}"] = centred.tolist()
    figures |= hubness(image, text, pairs, config)
    if image_augmented is not None:
        deviation = bridge_deviation(image, text, image_augmented, pairs)
        best = deviation.best_t()
        figures |= {"bridge_best_t": figure(best), "bridge_deviation": figure(deviation.at(best))}
        curves |= {"bridge_t": GRID.tolist(), "bridge_deviation": [deviation.at(t) for t in GRID]}
    for name, shared, own in (("image", image, image_independent), ("text", text, text_independent)):
        if own is not None:
            figures[f"orthogonality_{name}"] = figure(means.orthogonality(shared, own))
            figures[f"uniformity_{name}_independent"] = uniformity(own, config)
    return {name: found for name, found in figures.items() if found is not None} | {"curves": curves}


def _check_norms(name: str, rows: np.ndarray) -> None:
    for start, block in row_blocks(rows):
        norms = block.norm(dim=1)
        off = ((norms - 1).abs() > UNIT_NORM_TOLERANCE).nonzero()[:, 0]
        if len(off):
            raise ValueError(
                f"{name} embeddings must have unit norm, and row {start + int(off[0])} has norm {norms[off[0]]:.3g}: "
                "divide each row by its norm"
            )
