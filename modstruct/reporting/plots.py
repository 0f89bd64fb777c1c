"""Plots of a report: saved curves, families of metrics, and both modalities in the plane."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.retrieval.rows import evenly_spaced
from modstruct.reporting.comparison import Row, Section
from modstruct.reporting.line_chart import Scale, Series, line_chart
from modstruct.reporting.loading import Evaluation
from modstruct.reporting.vocabulary import humanised, is_share, label, lowered

FEWEST_POINTS = 3
LONGEST_FAMILY_GROUP = 24
"""Longest group that is searched for families: numbers in the names of many classes are no axis."""
X_NAMES: dict[str, Scale] = {"k": "log", "shots": "log", "strength": "log", "x": "linear", "t": "linear"}
"""Curves that are an x axis, and its scale."""
SHOWN_PAIRS = 300
AXES_PAIRS = 4096
"""Most pairs from which the axes are computed."""
SIDE = 340
MARGIN = 24
LONGEST_TITLE = 100


@dataclass(frozen=True)
class Chart:
    """A drawn chart of all runs, with its caption."""

    set: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class CurveWords:
    title: str
    x: str
    y: str
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"


KNOWN_CURVES = {
    "spectrum_image": CurveWords("Spectrum of images", "principal axis", "standard deviation", "log", "log"),
    "spectrum_text": CurveWords("Spectrum of texts", "principal axis", "standard deviation", "log", "log"),
    "bridge_deviation": CurveWords(
        "Deviation of the augmented image from the bridge", "t (1 = image, 0 = caption)", "mean squared distance"
    ),
}


def charts(section: Section, runs: Sequence[Evaluation]) -> list[Chart]:
    """Every chart of a section, set by set: families of metrics first, then the saved curves."""
    sets = dict.fromkeys(group.set for group in section.groups)
    return [
        chart
        for set_name in sets
        for chart in (*_families(section, set_name, runs), *_saved(section.metric, set_name, runs))
    ]


def _families(section: Section, set_name: str, runs: Sequence[Evaluation]) -> Iterator[Chart]:
    """Metrics of one set whose names differ only in one whole number, such as recall_at_1, …_5 and …_10."""
    families: dict[str, dict[int, int]] = {}
    groups = [group for group in section.groups if group.set == set_name and len(group.rows) <= LONGEST_FAMILY_GROUP]
    rows = [row for group in groups for row in group.rows if row.better]
    by_name = {row.names: row for group in groups for row in group.rows}
    saved = {name for run in runs if (result := run.results.get((set_name, section.metric))) for name in result.curves}
    for i, row in enumerate(rows):
        path = "/".join(row.names)
        for found in re.finditer(r"(?<![\d.])\d+(?![\d.])", path):
            family = f"{path[: found.start()]}{{}}{path[found.end() :]}"
            families.setdefault(family, {})[int(found[0])] = i
    for family, members in families.items():
        # Recall that was saved as a curve, at more K, is drawn from there.
        if len(members) < FEWEST_POINTS or family.replace("recall_at_{}", "recall") in saved - {family}:
            continue
        numbers = sorted(members)
        chosen = [rows[members[number]] for number in numbers]
        series = []
        for style, run in enumerate(runs):
            points = [
                (number, row.measured[style].metric.value, *_bounds(row, style, by_name))
                for number, row in zip(numbers, chosen, strict=True)
                if style in row.measured
            ]
            if points:
                series.append(Series(run.name, style, *zip(*points, strict=True)))
        share = all(row.share for row in chosen)
        scale: Scale = "log" if numbers[0] > 0 and numbers[-1] >= 8 * numbers[0] else "linear"
        caption, x_label, y_label = _family_words(family)
        svg = line_chart(caption, x_label, y_label, series, scale, share=share, x_ticks=numbers[:8])
        yield Chart(set_name, caption, svg)


def _bounds(row: Row, style: int, by_name: dict[tuple[str, ...], Row]) -> tuple[float | None, float | None]:
    """A metric's interval, or one standard deviation over draws to both sides if it has that instead."""
    metric = row.measured[style].metric
    deviations = by_name.get((*row.names[:-1], f"{row.names[-1]}_deviation"))
    if metric.low is None and deviations and style in deviations.measured:
        one = deviations.measured[style].metric.value
        return metric.value - one, metric.value + one
    return metric.low, metric.high


def _family_words(family: str) -> tuple[str, str, str]:
    """Caption, x label and y label of a family, from its path with {} in place of the number."""
    *start, last = family.split("/")
    place = next(part for part in family.split("/") if "{}" in part)
    around = [humanised(part) for part in start if "{}" not in part]
    if place.startswith("recall_at_"):
        words = ("Recall at K", "K", "recall")
    elif place.startswith("top_"):
        words = ("Top-K accuracy", "K", "accuracy")
    elif "shot" in place:
        y = "accuracy" if last == place else humanised(last).lower()
        words = (f"{y.capitalize()} by number of shots", "labelled images a class", y)
    else:
        bare = humanised(re.sub(r"_*\{\}_*", " ", place).strip() or "number")
        y = bare if last == place else humanised(last)
        words = (f"{y} by {bare.lower()}" if last != place else bare, bare.lower(), y.lower())
    return (": ".join([", ".join(around), lowered(words[0])] if around else [words[0]]), *words[1:])


def _saved(metric: str, set_name: str, runs: Sequence[Evaluation]) -> Iterator[Chart]:
    found = [
        (i, run.name, run.results[set_name, metric].curves)
        for i, run in enumerate(runs)
        if (set_name, metric) in run.results
    ]
    names = dict.fromkeys(name for _, _, curves in found for name in curves)
    axes = {axis for _, _, curves in found for name in curves if (axis := _x_of(name, curves))}
    for name in names:
        # Curves of single draws (shots_4/top_1) are for other programs; a chart of each would hide the others.
        if name in axes or name in X_NAMES or metric == "few_shot":
            continue
        series = []
        x_name = None
        for style, run_name, curves in found:
            values = curves.get(name)
            if values:
                x_name = _x_of(name, curves)
                x = curves[x_name] if x_name else list(range(1, len(values) + 1))
                series.append(Series(run_name, style, *zip(*sorted(zip(x, values, strict=True)), strict=True)))
        words = KNOWN_CURVES.get(name) or _curve_words(name, x_name)
        if not series:
            continue
        # A logarithmic axis needs a positive value.
        x_scale: Scale = words.x_scale if any(value > 0 for one in series for value in one.x) else "linear"
        y_scale: Scale = words.y_scale if any(value > 0 for one in series for value in one.y) else "linear"
        share = is_share(metric, (name,), [value for one in series for value in one.y])
        svg = line_chart(words.title, words.x, words.y, series, x_scale, y_scale, share=share)
        yield Chart(set_name, words.title, svg)


def _curve_words(name: str, x_name: str | None) -> CurveWords:
    """Words for a curve by its name and that of its axis."""
    *start, last = name.split("/")
    title = f"{label(tuple(start))}: {lowered(humanised(last))}" if start else humanised(last)
    if last == "recall" and x_name == "k":
        return CurveWords(f"{title} at K", "K", "recall", "log")
    axis = humanised(x_name) if x_name else "step"
    return CurveWords(title, axis.lower(), humanised(last).lower(), X_NAMES.get(x_name or "", "linear"))


def _x_of(name: str, curves: dict[str, list[float]]) -> str | None:
    """The curve that is the x axis of another: of the same length, and named after it."""
    start = name.rpartition("_")[0]
    candidates = [f"{name}_x", *(f"{start}_{x}" for x in X_NAMES), *X_NAMES]
    return next((c for c in candidates if c != name and len(curves.get(c, ())) == len(curves[name])), None)


@dataclass(frozen=True)
class Projection:
    """Pairs in the plane. image, text: (p, 2). explained: shares of the joint variance along both axes.

    names: of the pairs, for tooltips. total: pairs of the set. axes_pairs: pairs from which the axes were computed.
    """

    image: np.ndarray
    text: np.ndarray
    explained: tuple[float, float]
    names: tuple[str, ...]
    total: int
    axes_pairs: int


def project(source: EmbeddedSet) -> Projection | None:
    """Up to SHOWN_PAIRS evenly spaced pairs of a set on the first two principal axes of images and texts together.

    In a set without captions but with classes each image is paired with the prompt of its class (unit mean over
    templates). None if the set has neither, or fewer than two pairs. Signs are chosen so that the largest component of
    each axis is positive: the same rows give the same plot.
    """
    pairs, text = _pairs_and_texts(source)
    if len(pairs) < 2:
        return None
    chosen = pairs[evenly_spaced(len(pairs), AXES_PAIRS)]
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
    shown = evenly_spaced(len(chosen), SHOWN_PAIRS)
    return Projection(
        image=(images[shown] - mean) @ axes,
        text=(texts[shown] - mean) @ axes,
        explained=(float(max(values[-1], 0) / total), float(max(values[-2], 0) / total)),
        names=tuple(_names(source, chosen[shown])),
        total=len(pairs),
        axes_pairs=len(chosen),
    )


def projection_chart(projection: Projection, run: str, span: float) -> Markup:
    """The plane as SVG, with a tooltip for each point.

    span: the length of a side, on both axes; distances are comparable between runs of the same span.
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


def _names(source: EmbeddedSet, pairs: np.ndarray) -> list[str]:
    texts = source.captions if "text" in source.arrays else source.class_names
    return [_cut(f"{source.keys[image]}: {texts[text]}") for image, text in pairs]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TITLE else f"{text[: LONGEST_TITLE - 1]}…"
