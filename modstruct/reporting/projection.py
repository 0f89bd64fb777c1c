"""Both modalities in two dimensions: principal axes of the joint cloud, with the pairs joined by lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet

SHOWN_PAIRS = 300
AXES_PAIRS = 4096
"""Pairs that the axes are found from, at most."""
SIDE = 340
MARGIN = 24
LONGEST_TITLE = 100


@dataclass(frozen=True)
class Projection:
    """Pairs in the plane. image, text: (p, 2). explained: shares of the joint cloud's variance along both axes.

    names: what each pair is, for the tooltip. total: pairs that the set has. axes_pairs: pairs that gave the axes.
    """

    image: np.ndarray
    text: np.ndarray
    explained: tuple[float, float]
    names: tuple[str, ...]
    total: int
    axes_pairs: int


def project(source: EmbeddedSet) -> Projection | None:
    """Up to SHOWN_PAIRS evenly spaced pairs of a set on the first two principal axes of images and texts together.

    A set without captions but with classes pairs each image with its class's prompt (unit mean over templates).
    None where the set has neither, or fewer than two pairs. The same rows give the same image: signs are chosen so
    that the largest component of each axis is positive.
    """
    pairs, text = _pairs_and_texts(source)
    if len(pairs) < 2:
        return None
    chosen = pairs[_evenly(len(pairs), AXES_PAIRS)]
    images, texts = source.rows("image")[chosen[:, 0]], text[chosen[:, 1]]
    images, texts = (np.asarray(rows, dtype=np.float64) for rows in (images, texts))
    cloud = np.concatenate([images, texts])
    mean = cloud.mean(0)
    values, vectors = np.linalg.eigh((cloud - mean).T @ (cloud - mean))
    axes = vectors[:, ::-1][:, :2]  # (D, 2), the largest first
    if axes.shape[1] < 2:
        return None
    axes = axes * np.where(axes[np.abs(axes).argmax(0), [0, 1]] < 0, -1, 1)
    total = max(float(values.sum()), np.finfo(np.float64).tiny)
    shown = _evenly(len(chosen), SHOWN_PAIRS)
    return Projection(
        image=(images[shown] - mean) @ axes,
        text=(texts[shown] - mean) @ axes,
        explained=(float(max(values[-1], 0) / total), float(max(values[-2], 0) / total)),
        names=tuple(_names(source, chosen[shown])),
        total=len(pairs),
        axes_pairs=len(chosen),
    )


def projection_chart(projection: Projection, run: str, span: float) -> Markup:
    """The plane as SVG; each pair tells what it is when pointed at.

    span: the length that fills a side, on both axes; the same for every run makes distances comparable.
    """
    points = np.concatenate([projection.image, projection.text])
    centre = (points.min(0) + points.max(0)) / 2
    scale = (SIDE - 2 * MARGIN) / span
    image, text = (
        (rows - centre) * (scale, -scale) + (SIDE / 2, SIDE / 2) for rows in (projection.image, projection.text)
    )
    joined = " ".join(f"M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" for (a, b), (c, d) in zip(image, text, strict=True))
    bar = 10 ** math.floor(math.log10(span / 3))
    bar *= max(m for m in (1, 2, 5) if m * bar <= span / 3)
    first, second = (f"{100 * share:.0f} % of variance" for share in projection.explained)
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {s} {s}" role="img" aria-label="{}">').format(
            f"{run}: {len(image)} pairs on the first two principal axes of images and texts together", s=SIDE
        ),
        Markup('<path class="joins" d="{}"/>').format(joined),
        _points("image", image, projection.names),
        _points("text", text, projection.names),
        Markup('<path class="axis" d="M{m} {}v-3h{:.1f}v3"/><text class="tick" x="{m}" y="{}">{}</text>').format(
            SIDE - 1, bar * scale, SIDE - 8, f"{bar:g}", m=MARGIN
        ),
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            SIDE / 2 + MARGIN, SIDE - 5, f"Axis 1, {first}"
        ),
        Markup('<text class="label" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            SIDE / 2, f"Axis 2, {second}"
        ),
    ]
    return Markup("").join([*parts, Markup("</svg>")])


def widest(projections: Sequence[Projection]) -> float:
    """The longest side of any of the clouds."""
    clouds = [np.concatenate([one.image, one.text]) for one in projections]
    return max(1e-12, *(float(np.ptp(cloud, axis=0).max()) for cloud in clouds))


def _points(modality: str, places: np.ndarray, names: Sequence[str]) -> Markup:
    """Circles for images, diamonds for texts."""
    parts = [Markup('<g class="{}-points">').format(modality)]
    for (x, y), name in zip(places, names, strict=True):
        if modality == "image":
            shape = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.6">').format(x, y)
            end = Markup("</circle>")
        else:
            shape = Markup('<path d="M{:.1f} {:.1f}l3.2 3.2-3.2 3.2-3.2-3.2z">').format(x, y - 3.2)
            end = Markup("</path>")
        parts += [shape, Markup("<title>{}</title>").format(f"{modality} of {name}"), end]
    return Markup("").join([*parts, Markup("</g>")])


def _pairs_and_texts(source: EmbeddedSet) -> tuple[np.ndarray, np.ndarray]:
    if "text" in source.arrays and len(source.pairs):
        return source.pairs, source.rows("text")
    labels, prompts = source.labels, source.class_prompts
    if labels is None or prompts is None:
        return np.empty((0, 2), dtype=np.int64), np.empty((0, 1))
    labelled = np.flatnonzero(labels >= 0)
    mean = prompts.astype(np.float64).mean(axis=1)
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return np.stack([labelled, labels[labelled]], axis=1), mean


def _evenly(rows: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, rows - 1, min(rows, wanted)).round().astype(np.int64))


def _names(source: EmbeddedSet, pairs: np.ndarray) -> list[str]:
    texts = source.captions if "text" in source.arrays else source.class_names
    return [_cut(f"{source.keys[image]}: {texts[text]}") for image, text in pairs]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TITLE else f"{text[: LONGEST_TITLE - 1]}…"
