"""Plots of a report by matplotlib: curves of results, and both modalities in the plane; as SVG for the page, whose
style sheet recolours it, and as PDF and PNG for papers, as wide as a column."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from modstruct.errors import printable
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Curve, Unit
from modstruct.evaluation.retrieval.rows import evenly_spaced
from modstruct.reporting.comparison import Section
from modstruct.reporting.loading import Evaluation

COLOURS = ("#0072b2", "#c65102", "#00845f", "#b0568c", "#8a6d00", "#3a8fc4", "#4a4a4a", "#7b5fb5")
"""Of runs, page.css's run-0, run-1, … on a light ground: Okabe and Ito's palette; a ninth run repeats the first."""
MARKERS = "osD^vPX*"
DASHES = ("-", (0, (4, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))
"""Of the curves that share a plot."""
INK, QUIET, LINE = "#1b1f24", "#5b6470", "#dfe3e8"
CLASSES = {colour: f"run-{i}" for i, colour in enumerate(COLOURS)} | {INK: "ink", QUIET: "quiet", LINE: "line"}
STYLE: dict[str, Any] = {
    "font.size": 8, "font.family": "sans-serif", "text.parse_math": False, "axes.titlesize": 8, "legend.fontsize": 7,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5,
    "axes.linewidth": 0.6, "lines.linewidth": 1.3, "lines.markersize": 3.5, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "modstruct", "pdf.fonttype": 42, "savefig.dpi": 300,
}  # fmt: skip
WIDTH, HEIGHT = 3.25, 2.4
"""Inches: a column of a two-column page."""
MARKED_POINTS = 24
"""Longest curve whose points are marked."""
SHOWN_PAIRS = 300
AXES_PAIRS = 4096
"""Most pairs from which the axes of a plane are computed."""
NUMBER = re.compile(r"-?\d+\.\d+")
PLACES = ("d", "x", "y", "transform")
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Plot:
    """A drawn plot. name: of its files. runs: numbers of the runs in it. svg: for the page, without a legend of runs.
    files: the same as "pdf" and "png"."""

    set: str
    name: str
    caption: str
    runs: tuple[int, ...]
    svg: Markup
    files: dict[str, bytes]


def plots(section: Section, runs: Sequence[Evaluation]) -> list[Plot]:
    """The curves of a section, set by set: those of one `Curve.plot` in one plot, each run in its colour."""
    made = []
    for set_name, results in section.results.items():
        shared: dict[str, dict[str, dict[int, Curve]]] = {}
        for i, result in results.items():
            for name, curve in result.curves.items():
                shared.setdefault(curve.plot or name, {}).setdefault(name, {})[i] = curve
        for name, curves in shared.items():
            first = next(iter(next(iter(curves.values())).values()))
            caption = name if len(curves) > 1 else first.title or name
            drawn = sorted({i for of_runs in curves.values() for i in of_runs})
            with mpl.rc_context(STYLE):
                figure, axes = _frame(first.x_label, first.y_label, first.unit)
                _lines(axes, curves)
                label = f"{caption}, {set_name}"
                svg, files = _svg(figure, label), _files(figure, axes, {i: runs[i].name for i in drawn})
            made.append(Plot(set_name, _file_name(section.metric, set_name, name), caption, tuple(drawn), svg, files))
    return made


def _frame(x_label: str, y_label: str, unit: Unit = "number", height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height))
    axes = figure.add_axes((0.17, 0.42 / height, 0.8, 1 - 0.5 / height))
    axes.set_xlabel(printable(x_label))
    axes.set_ylabel(printable(y_label) + {"share": " (%)", "nats": " (nats)"}.get(unit, ""))
    return figure, axes


def _lines(axes: Axes, curves: dict[str, dict[int, Curve]]) -> None:
    """Lines with bands; dashes tell the curves apart, colours and markers the runs."""
    every = [curve for of_runs in curves.values() for curve in of_runs.values()]
    scale = 100 if every[0].unit == "share" else 1
    for dashes, of_runs in zip(DASHES * len(curves), curves.values(), strict=False):
        for i, curve in of_runs.items():
            order = np.argsort(curve.x, kind="stable")
            x, y = np.array(curve.x, float)[order], scale * np.array(curve.y, float)[order]
            colour, marker = COLOURS[i % 8], MARKERS[i % 8]
            axes.plot(x, y, marker=marker if len(x) <= MARKED_POINTS else "", color=colour, linestyle=dashes)
            if curve.low and curve.high:
                low, high = (scale * np.array(of, float)[order] for of in (curve.low, curve.high))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            if curve.chosen is not None:
                axes.axvline(curve.chosen, linestyle=":", color=colour, linewidth=0.8)
                axes.plot([curve.chosen], [np.interp(curve.chosen, x, y)], marker=marker, color=colour, markersize=7)
        chance = next((curve for curve in of_runs.values() if curve.chance), None)
        if chance and chance.chance:
            y = [scale * value for value in chance.chance]
            axes.plot(chance.x, y, color=QUIET, linestyle="--", linewidth=0.9)
            axes.annotate("chance", (chance.x[-1], y[-1]), (0, 3), color=QUIET, textcoords="offset points", ha="right")
    if len(curves) > 1:
        titles = [printable(next(iter(of.values())).title or name) for name, of in curves.items()]
        axes.legend(
            [Line2D([], [], color=QUIET, linestyle=dashes) for dashes in (DASHES * len(titles))[: len(titles)]], titles
        )
    x = sorted({value for curve in every for value in curve.x})
    axes.ticklabel_format(style="plain", useOffset=False)
    if all(curve.logarithmic for curve in every) and x[0] > 0:
        axes.set_xscale("log")
        wide = x[-1] / x[0] >= 1e4
        some = LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8)
        axes.xaxis.set_major_locator(FixedLocator(x) if len(x) < 9 and not wide else some)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value) if wide else f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())


def _power(value: float) -> str:
    return "10" + f"{math.log10(value):.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))[:100]


def _files(figure: Figure, axes: Axes, names: dict[int, str]) -> dict[str, bytes]:
    """PDF and PNG, with a legend of the runs above."""
    if len(names) > 1:
        labels = [printable(name)[:40] for name in names.values()]
        columns = max(1, min(len(labels), 50 // (max(map(len, labels)) + 6)))
        taller = 0.16 * math.ceil(len(labels) / columns)
        width, height = figure.get_size_inches()
        box = axes.get_position()
        figure.set_size_inches(width, height + taller)
        axes.set_position(
            (
                box.x0,
                *(part * height / (height + taller) for part in (box.y0,)),
                box.width,
                box.height * height / (height + taller),
            )
        )
        marks = [Line2D([], [], color=COLOURS[i % 8], marker=MARKERS[i % 8]) for i in names]
        figure.legend(marks, labels, loc="upper center", ncols=columns, borderaxespad=0.1)
    made = {}
    for kind in ("pdf", "png"):
        file = io.BytesIO()
        figure.savefig(file, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        made[kind] = file.getvalue()
    return made


def _svg(figure: Figure, label: str, titles: dict[str, Sequence[str]] | None = None) -> Markup:
    """A figure as SVG inside a page: colours as classes of its style sheet, whose policy allows no style attributes.

    titles: of the points of a collection, by its gid: shown where the pointer rests.
    """
    file = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style", f"{SVG}clipPath"):
                parent.remove(child)
        for use, title in zip(parent.iter(f"{SVG}use"), (titles or {}).get(parent.get("id", ""), ()), strict=False):
            ElementTree.SubElement(use, f"{SVG}title").text = title
    used = {value.removeprefix("#") for of in root.iter() for name, value in of.items() if name.endswith("href")}
    for element in root.iter():
        given = {name.rpartition("}")[2]: value for name, value in element.items() if name != "clip-path"}
        style = dict(part.split(": ", 1) for part in given.pop("style", "").split("; ") if ": " in part)
        classes = {CLASSES[colour] for colour in style.values() if colour in CLASSES}
        given |= {k: "currentColor" if v in CLASSES else v for k, v in style.items() if not k.startswith("font")}
        kept = {
            k: NUMBER.sub(lambda found: f"{float(found[0]):.2f}", v) if k in PLACES else v
            for k, v in given.items()
            if k != "id" or v in used
        }
        element.tag = element.tag.removeprefix(SVG)
        element.attrib = kept | ({"class": " ".join(classes)} if classes else {})
    shape = {"class": "plot", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": printable(label)}
    root.attrib = shape
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def planes(runs: Sequence[Evaluation]) -> list[Plot]:
    """Both modalities of each set and run in the plane, all of a set in one scale; of several seeds, the first."""
    made = []
    for set_name in sorted({set_name for run in runs for set_name, _ in run.results}):
        sources = {i: run.embedded_set(set_name) for i, run in enumerate(runs)}
        found = {i: plane for i, source in sources.items() if source and (plane := project(source))}
        clouds = {i: np.concatenate([plane.image, plane.text]) for i, plane in found.items()}
        span = max([1e-12, *(float(np.ptp(cloud, axis=0).max()) for cloud in clouds.values())]) * 1.08
        for i, plane in found.items():
            first, second = (f"axis {n}, {100 * share:.0f} % of variance" for n, share in enumerate(plane.explained, 1))
            with mpl.rc_context(STYLE):
                figure, axes = _frame(first, second, height=WIDTH * 0.92)
                for limit, middle in zip(
                    (axes.set_xlim, axes.set_ylim), (clouds[i].min(0) + clouds[i].max(0)) / 2, strict=True
                ):
                    limit(middle - span / 2, middle + span / 2)
                axes.set_aspect("equal")
                joins = np.stack([plane.image, plane.text, np.full_like(plane.image, np.nan)], axis=1).reshape(-1, 2)
                axes.plot(*joins.T, color=QUIET, linewidth=0.4, alpha=0.4)
                axes.scatter(*plane.image.T, s=9, color=COLOURS[0], linewidth=0, gid="image", label="image")
                axes.scatter(
                    *plane.text.T, s=10, color=COLOURS[1], marker="D", linewidth=0, gid="text", label="caption"
                )
                titles = {kind: [f"{kind} of {name}" for name in plane.names] for kind in ("image", "text")}
                svg = _svg(
                    figure, f"{set_name}, {runs[i].name}: {len(plane.names)} pairs on two principal axes", titles
                )
                axes.legend(loc="best")
                files = _files(figure, axes, {})
            caption = f"{len(plane.names):,} of {plane.total:,} pairs"
            made.append(Plot(set_name, _file_name("plane", set_name, str(i + 1)), caption, (i,), svg, files))
    return made


@dataclass(frozen=True)
class Projection:
    """Pairs in the plane. image, text: (p, 2). explained: shares of the joint variance along both axes.

    names: of the pairs, for tooltips. total: pairs of the set.
    """

    image: np.ndarray
    text: np.ndarray
    explained: tuple[float, float]
    names: tuple[str, ...]
    total: int


def project(source: EmbeddedSet) -> Projection | None:
    """Up to SHOWN_PAIRS evenly spaced pairs of a set on the first two principal axes of images and texts together.

    In a set without captions but with classes each image is paired with the prompt of its class (unit mean over
    templates). None if the set has neither, or fewer than two pairs. Signs are chosen so that the largest component of
    each axis is positive: the same rows give the same plot.
    """
    pairs, text, names = _pairs_and_texts(source)
    if len(pairs) < 2:
        return None
    chosen = pairs[evenly_spaced(len(pairs), AXES_PAIRS)]
    images, texts = source.rows("image")[chosen[:, 0]].astype(np.float64), text[chosen[:, 1]].astype(np.float64)
    cloud = np.concatenate([images, texts])
    mean = cloud.mean(0)
    values, vectors = np.linalg.eigh((cloud - mean).T @ (cloud - mean))
    axes = vectors[:, ::-1][:, :2]  # (D, 2), the largest first
    axes = axes * np.where(axes[np.abs(axes).argmax(0), [0, 1]] < 0, -1, 1)
    total = max(float(values.sum()), np.finfo(np.float64).tiny)
    shown = evenly_spaced(len(chosen), SHOWN_PAIRS)
    return Projection(
        image=(images[shown] - mean) @ axes,
        text=(texts[shown] - mean) @ axes,
        explained=(float(max(values[-1], 0) / total), float(max(values[-2], 0) / total)),
        names=tuple(printable(f"{source.keys[image]}: {names[of]}")[:100] for image, of in chosen[shown]),
        total=len(pairs),
    )


def _pairs_and_texts(source: EmbeddedSet) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """(pairs (p, 2), texts (t, D), what is written in them)."""
    if "text" in source.arrays and len(source.pairs):
        return np.asarray(source.pairs), source.rows("text"), source.captions
    labels, prompts = source.labels, source.class_prompts
    if labels is None or prompts is None:
        return np.empty((0, 2), dtype=np.int64), np.empty((0, 1)), ()
    labelled = np.flatnonzero(labels >= 0)
    mean = prompts.astype(np.float64).mean(axis=1)
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
    return np.stack([labelled, labels[labelled]], axis=1), mean, source.class_names
