"""Plots of a report by matplotlib: curves of results, and both modalities in the plane; as SVG for the page, whose
style sheet recolours it, and as PDF and PNG for papers, as wide as a column."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Bbox

from modstruct.errors import printable
from modstruct.evaluation.embeddings.embedded_set import EmbeddedSet
from modstruct.evaluation.result import Curve
from modstruct.evaluation.retrieval.rows import evenly_spaced
from modstruct.reporting.comparison import Section
from modstruct.reporting.loading import Evaluation

COLOURS = ("#0072b2", "#c65102", "#00845f", "#b0568c", "#8a6d00", "#3a8fc4", "#4a4a4a", "#7b5fb5")
"""Of runs, page.css's run-0, run-1, … on a light ground: Okabe and Ito's palette; a ninth run repeats the first."""
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))
"""Of the curves that share a plot."""
INK, QUIET, LINE = "#1b1f24", "#5b6470", "#dfe3e8"
CLASSES = {colour: f"run-{i}" for i, colour in enumerate(COLOURS)} | {INK: "ink", QUIET: "quiet", LINE: "line"}
STYLE: Any = {
    "font.size": 8, "text.parse_math": False, "legend.fontsize": 7, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5,
    "axes.linewidth": 0.6, "lines.linewidth": 1.3, "lines.markersize": 3.5,
    "svg.fonttype": "none", "pdf.fonttype": 42, "savefig.dpi": 200,
}  # fmt: skip
LEGEND_LINE = 0.15
"""Inches."""
WIDTH = 3.25
"""Inches: a column of a two-column page."""
UNITS = {"share": " (%)", "nats": " (nats)"}
MARKED_POINTS = 24
"""Longest curve whose points are marked."""
SHOWN_PAIRS, AXES_PAIRS = 300, 4096
"""Most pairs in a plane, and from which its axes are computed."""
SVG = "{http://www.w3.org/2000/svg}"


@dataclass(frozen=True)
class Plot:
    """run: its number if it is of one alone. name: of its files, which are bytes by their ending, "pdf" and "png"."""

    set: str
    run: int | None
    name: str
    caption: str
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
            caption = name if len(curves) > 1 else first.title or f"{first.y_label} by {first.x_label}"
            with mpl.rc_context(STYLE):
                figure, axes = _axes(2.4, first.x_label, first.y_label + UNITS.get(first.unit, ""))
                _lines(axes, curves)
                svg = _svg(figure, f"{caption}, {set_name}")
                files = _files(figure, {i: runs[i].name for i in results if any(i in of for of in curves.values())})
            made.append(Plot(set_name, None, _file_name(section.metric, set_name, name), caption, svg, files))
    return made


def _axes(height: float, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH, height))
    axes = figure.add_subplot()
    axes.set(xlabel=_short(x_label), ylabel=_short(y_label))
    return figure, axes


def _lines(axes: Axes, curves: dict[str, dict[int, Curve]]) -> None:
    """Lines with bands; dashes tell the curves apart, colours and markers the runs."""
    every = [curve for of_runs in curves.values() for curve in of_runs.values()]
    scale = 100 if every[0].unit == "share" else 1
    for number, (name, of_runs) in enumerate(curves.items()):
        dashes = DASHES[number % len(DASHES)]
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
        if len(curves) > 1:
            title = next(iter(of_runs.values())).title or name
            axes.plot([], [], color=QUIET, linestyle=dashes, label=_short(title))
    for curve in [curve for curve in every if curve.chance][:1]:
        chance = scale * np.array(curve.chance)
        axes.plot(curve.x, chance, color=QUIET, linestyle=(0, (1, 2)), linewidth=1, label="chance")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    ticks = sorted({value for curve in every for value in curve.x})
    axes.ticklabel_format(style="plain", useOffset=False)
    if ticks[0] > 0 and all(curve.logarithmic for curve in every):
        wide = ticks[-1] / ticks[0] >= 1e4
        axes.set_xscale("log")
        many = LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=8)
        axes.xaxis.set_major_locator(many if wide or len(ticks) > 8 else FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value) if wide else f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())


def _short(text: str) -> str:
    """Two lines at most."""
    return fill(printable(text)[:64], 32)


def _power(value: float) -> str:
    return "10" + f"{math.log10(value):.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _file_name(*parts: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))[:100]


def _files(figure: Figure, names: Mapping[int, str]) -> dict[str, bytes]:
    """PDF and PNG, with a legend of the runs above what `_svg` has laid out."""
    width, height = figure.get_size_inches()
    if len(names) > 1:
        marks = [Line2D([], [], color=COLOURS[i % 8], marker=MARKERS[i % 8]) for i in names]
        labels = [printable(name)[:40] for name in names.values()]
        columns = max(1, 50 // (max(map(len, labels)) + 6))
        figure.legend(marks, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=columns, borderaxespad=0)
        height += LEGEND_LINE * (1 + math.ceil(len(labels) / columns))
    made = {}
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", {})):
        file = io.BytesIO()
        figure.savefig(file, format=kind, metadata=metadata, bbox_inches=Bbox([(0, 0), (width, height)]))
        made[kind] = file.getvalue()
    return made


def _svg(figure: Figure, label: str, titles: Mapping[str, Sequence[str]] | None = None) -> Markup:
    """A figure as SVG inside a page: colours as classes of its style sheet, whose policy allows no style attributes.

    titles: of the points of a collection, by its gid: shown where the pointer rests.
    """
    file = io.BytesIO()
    ConstrainedLayoutEngine().execute(figure)  # once for all files
    with mpl.rc_context({"svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in (f"{SVG}metadata", f"{SVG}style", f"{SVG}clipPath")]:
            parent.remove(child)
        for use, title in zip(parent.iter(f"{SVG}use"), (titles or {}).get(parent.get("id", ""), ()), strict=False):
            ElementTree.SubElement(use, "title").text = title
    used = {value.removeprefix("#") for of in root.iter() for name, value in of.items() if name.endswith("href")}
    for element in root.iter():
        given = {name.rpartition("}")[2]: value for name, value in element.items() if name != "clip-path"}
        style = dict(part.split(": ", 1) for part in given.pop("style", "").split("; ") if ": " in part)
        given |= {name: "currentColor" if of in CLASSES else of for name, of in style.items() if name[:4] != "font"}
        if colours := [CLASSES[colour] for colour in style.values() if colour in CLASSES]:
            given["class"] = colours[0]
        if given.get("id") not in used:
            given.pop("id", None)
        for name in given.keys() & {"d", "x", "y", "transform"}:
            given[name] = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}", given[name])
        element.tag, element.attrib = element.tag.removeprefix(SVG), given
    root.attrib = {"class": "plot", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": printable(label)}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def planes(runs: Sequence[Evaluation]) -> list[Plot]:
    """Both modalities of each set and run in the plane, all of a set in one scale; of several seeds, the first."""
    made = []
    for set_name in sorted({set_name for run in runs for set_name, _ in run.results}):
        sources = {i: run.embedded_set(set_name) for i, run in enumerate(runs)}
        found = {i: plane for i, source in sources.items() if source and (plane := project(source))}
        span = 1.08 * max([1e-12, *(float(np.ptp(plane.points, axis=(0, 1)).max()) for plane in found.values())])
        for i, plane in found.items():
            (left, bottom), (right, top) = plane.points.min((0, 1)), plane.points.max((0, 1))
            with mpl.rc_context(STYLE):
                labels = [f"axis {n}, {100 * of:.0f} % of variance" for n, of in enumerate(plane.explained, 1)]
                figure, axes = _axes(WIDTH, *labels)
                axes.set_xlim((left + right - span) / 2, (left + right + span) / 2)
                axes.set_ylim((bottom + top - span) / 2, (bottom + top + span) / 2)
                axes.set_aspect("equal")
                ends = np.concatenate([plane.points, np.full_like(plane.points[:1], np.nan)])  # NaN parts the lines
                axes.plot(*ends.transpose(2, 1, 0).reshape(2, -1), color=QUIET, linewidth=0.4, alpha=0.4)
                for n, (kind, marker) in enumerate((("image", "o"), ("caption", "D"))):
                    x, y = plane.points[n].T
                    axes.scatter(x, y, 9, COLOURS[n], marker=marker, linewidth=0, gid=kind, label=kind)
                titles = {kind: [f"{kind} of {name}" for name in plane.names] for kind in ("image", "caption")}
                caption = f"{len(plane.names):,} of {plane.total:,} pairs"
                svg = _svg(figure, f"{set_name}, {runs[i].name}: {caption} on two principal axes", titles)
                axes.legend()
                files = _files(figure, {})
            made.append(Plot(set_name, i, _file_name("plane", set_name, str(i + 1), runs[i].name), caption, svg, files))
    return made


@dataclass(frozen=True)
class Projection:
    """Pairs in the plane. points: (2, p, 2): of images and of texts. explained: shares of the joint variance along both
    axes. names: of the pairs, for tooltips. total: pairs of the set."""

    points: np.ndarray
    explained: tuple[float, float]
    names: tuple[str, ...]
    total: int


def project(source: EmbeddedSet) -> Projection | None:
    """Up to SHOWN_PAIRS evenly spaced pairs of a set on the first two principal axes of images and texts together.

    In a set without captions but with classes each image is paired with the prompt of its class (unit mean over
    templates). None if the set has neither, or fewer than two pairs. Signs are chosen so that the largest component of
    each axis is positive: the same rows give the same plot.
    """
    names: Sequence[str]
    if "text" in source.arrays:
        pairs, text, names = np.asarray(source.pairs), source.rows("text"), source.captions
    elif source.labels is not None and source.class_prompts is not None:
        labelled = np.flatnonzero(source.labels >= 0)
        pairs, names = np.stack([labelled, source.labels[labelled]], axis=1), source.class_names
        text = source.class_prompts.astype(np.float64).mean(axis=1)
        text /= np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-12)
    else:
        return None
    if len(pairs) < 2:
        return None
    chosen = pairs[evenly_spaced(len(pairs), AXES_PAIRS)]
    rows = np.stack([source.rows("image")[chosen[:, 0]], text[chosen[:, 1]]]).astype(np.float64)
    rows -= rows.mean((0, 1))
    values, vectors = np.linalg.eigh(np.einsum("mpd,mpe->de", rows, rows))
    axes = vectors[:, ::-1][:, :2]  # (D, 2), the largest first
    axes = axes * np.where(axes[np.abs(axes).argmax(0), [0, 1]] < 0, -1, 1)
    explained = np.maximum(values[::-1][:2], 0) / max(float(values.sum()), np.finfo(np.float64).tiny)
    shown = evenly_spaced(len(chosen), SHOWN_PAIRS)
    return Projection(
        rows[:, shown] @ axes,
        (float(explained[0]), float(explained[1])),
        tuple(printable(f"{source.keys[image]}: {names[of]}")[:100] for image, of in chosen[shown]),
        len(pairs),
    )
