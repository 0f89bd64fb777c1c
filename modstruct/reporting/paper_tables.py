"""The paper's tables T1 to T4 (paper_tables.yaml): methods as rows, sets as columns, seeds of a method aggregated.

A cell holds top-1/3/5, or the accuracy of the validation and the test split. Best bold, second underlined, among the
rows that were measured; published ones stand beside them, the paper's own in grey, if they are asked for. The average
is over the sets that all measured rows have.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from modstruct.checkpoints import find
from modstruct.cli import RECIPES, read_recipe_file
from modstruct.config.migrations import migrate_checkpoint
from modstruct.errors import printable, refuse, require
from modstruct.evaluation.result import Result, Value, from_json, read_json, share
from modstruct.files import atomic_write, read_yaml
from modstruct.reporting.clip_benchmark import read_benchmark
from modstruct.reporting.comparison import group_seeds
from modstruct.reporting.loading import Evaluation, load_evaluations, stem_of
from modstruct.reporting.tables import PACKAGES, Block, Line, cell, csv_text, escaped, table

FORMS: Any = read_yaml(Path(__file__).parent / "paper_tables.yaml")
METHODS = {"clip": "CLIP", "clip_inmodal": "CLIP + in-modal", "cyclip": "CyCLIP", "siglip": "SigLIP", "albef": "ALBEF"}
METHODS |= {"clip_2v": "CLIP, two views", "align": "Align", "align_uniform": "Align + uniformity of centres"}
METHODS |= {"sep_no_ortho": "Sep without Ortho", "albef_inmodal": "ALBEF + in-modal"}
METHODS |= {"sep": "Sep", "br": "Br", "gc": "GC", "all": "Sep + Br + GC", "albef_all": "ALBEF + Sep + Br + GC"}
METHODS |= {f"albef_{name}": f"ALBEF + {METHODS[name]}" for name in ("sep", "br", "gc")}
"""What tables call the methods of the recipes; others go by their own names."""
SPLITS = ("validation", "test")
PAGE = "letterpaper,textwidth=6.875in,textheight=8.875in,columnsep=0.3125in"
"""CVPR's."""
Values = tuple[Value | None, ...]
"""Of one cell."""


@dataclass(frozen=True)
class Options:
    """How tables are shown. sets: columns; none for the paper's that were measured, or, but for the distribution shift,
    which only they have, all where none of them was.
    intervals: 95 %, of rows of one seed."""

    sets: tuple[str, ...] = ()
    paper_rows: bool = False
    intervals: bool = False


@dataclass(frozen=True)
class Row:
    """Values by column. seeds: of how many runs they are means; kind: where they come from."""

    name: str
    cells: dict[str, Values]
    kind: Literal["measured", "published", "paper"] = "measured"
    seeds: int = 1


@dataclass(frozen=True)
class Table:
    """columns: label by set. parts: labels of a cell's values. unlike: sets whose content differs between rows."""

    name: str
    caption: str
    columns: dict[str, str]
    parts: tuple[str, ...]
    rows: list[Row]
    unlike: list[str]

    def rank(self, row: Row, column: str, place: int) -> int | None:
        """0 for the best and 1 for the second of the measured rows, as printed; None where there is no ranking."""
        found = [other.cells[column][place] for other in self.rows if other.kind == "measured"]
        printed = [_percent(value.value) for value in found if value]
        own = row.cells[column][place]
        if row.kind != "measured" or own is None or len(printed) < 2 or column in self.unlike:
            return None
        return sorted(set(printed), key=float, reverse=True).index(_percent(own.value))

    def cells(self, row: Row, text: Callable[[Value, int | None], str], nothing: str) -> list[str]:
        """A row's cells, each value as `text` makes it of the value and its rank."""
        made = []
        for column in self.columns:
            values = row.cells[column] if any(row.cells[column]) else (None,)
            made.append("/".join(text(v, self.rank(row, column, i)) if v else nothing for i, v in enumerate(values)))
        return made


def paper_table(name: str, runs: Sequence[Evaluation], options: Options) -> Table:
    """One of FORMS of these runs. Raises ValueError where none of them measured any of its sets."""
    form, of_task = FORMS[name], name == "fusion"
    measured = {key for run in runs for key in run.results if key[1] in form["metrics"]}
    found = sorted({metric if of_task else set_name for set_name, metric in measured})
    unknown = [c for c in options.sets if c not in found]
    what = f"no run measured it for {name}; there are {', '.join(found) or 'none'}"
    require(not unknown, "--sets", unknown[:1], what)
    columns = list(options.sets) or [c for c in form["sets"] if c in found]
    if not columns and name == "distribution_shift":
        which = ", ".join(form["sets"])
        refuse("--tables", name, f"no run measured one of its sets, {which}: measure one, or name columns by --sets")
    columns = columns or found
    if not columns:
        refuse("--tables", name, "no run has a result for it: measure the sets, or fine-tune the tasks, first")
    # One kind of probe for all cells, or they could not be compared.
    metric = next(m for m in form["metrics"] if of_task or any((c, m) in measured for c in columns))
    keys = {c: [(split, c) for split in SPLITS] if of_task else [(c, metric)] for c in columns}

    def cells(run: Evaluation) -> dict[str, Values]:
        return {c: tuple(v for key in keys[c] for v in _values(run.results.get(key), form["values"])) for c in columns}

    merged = [(run, of) for run in _with_methods(runs) if any(map(any, (of := cells(run)).values()))]
    ours = [(run, of) for run, of in merged if not run.published]
    rows = []
    for method, texts in form["paper"].items() if options.paper_rows else ():
        printed = {c: tuple(share(float(n) / 100) for n in str(t).split("/")) for c, t in zip(form["sets"], texts)}  # noqa: B905
        if printed.keys() & set(columns):
            rows.append(Row(f"{method} (paper)", {c: printed.get(c, (None,)) for c in columns}, "paper"))
    rows += [Row(run.name, of, "published" if run.published else "measured", len(run.seeds) or 1) for run, of in merged]

    labels = {c: form["sets"].get(c, c) for c in columns}
    notes, unlike = [], []
    for c in columns:
        if lacking := [run.name for run, of in merged if not any(of[c])]:
            notes.append(f"Without {labels[c]}: {', '.join(lacking)}.")
        if any(len({run.results[key].fingerprint for run, _ in ours if key in run.results}) > 1 for key in keys[c]):
            unlike.append(c)
        for run, _ in merged:
            if any(0 < sum(key in seed.results for seed in run.seeds) < len(run.seeds) for key in keys[c]):
                notes.append(f"Not of all seeds: {run.name} on {labels[c]}.")
    if unlike:
        notes.append(f"Not the same data in all rows, so unmarked: {', '.join(labels[c] for c in unlike)}.")
    if metric == "zero_shot" and any(row.kind == "published" for row in rows):
        notes.append("Published rows: the ensemble of templates.")
    common = [c for c in columns if ours and not of_task and all(all(of[c]) for _, of in ours)]
    if len(common) > 1:
        labels["average"] = "Average"
        of_seeds = {run.name: [_average(cells(seed), common) for seed in run.seeds] for run, _ in merged}
        for row in rows:
            row.cells["average"] = _with_deviation(_average(row.cells, common), of_seeds.get(row.name, []))
        if len(common) < len(columns):
            notes.append(f"Average over what all measured rows have: {', '.join(labels[c] for c in common)}.")
    if options.paper_rows and not any(row.kind == "paper" for row in rows):
        notes.append(f"No rows of the paper, which has only {', '.join(form['sets'].values())}.")
    notes += ["±: standard deviation over seeds."] if any(row.seeds > 1 for row in rows) else []
    notes += ["Brackets: 95 % intervals over the samples, of one seed."] if options.intervals else []
    caption = f"{form['title']}: {'/'.join(form['values'].values())} in percent, {form['about'].get(metric)}."
    parts = SPLITS if of_task else tuple(form["values"].values())
    return Table(name, " ".join([caption, *notes]), labels, parts, rows, unlike)


def _values(result: Result | None, names: Sequence[str]) -> Values:
    """The values of these names; of zero-shot classification by the first template, or by the ensemble alone."""
    of = result.values if result else {}
    group = next((group for group in ("", "first/", "ensemble/") if any(group + name in of for name in names)), "")
    return tuple(of.get(group + name) for name in names)


def _average(cells: dict[str, Values], columns: Sequence[str]) -> Values:
    """Over columns, by place in the cell; None for a place that one of them lacks."""
    if not all(any(cells[c]) for c in columns):
        return (None,)
    places = zip(*(cells[c] for c in columns), strict=True)
    return tuple(share(np.mean([v.value for v in place if v])) if all(place) else None for place in places)


def _with_deviation(average: Values, of_seeds: Sequence[Values]) -> Values:
    if len(of_seeds) < 2 or not all(all(values) for values in of_seeds):
        return average
    spread = np.std([[value.value for value in values if value] for values in of_seeds], axis=0, ddof=1)
    return tuple(v and replace(v, deviation=float(d)) for v, d in zip(average, spread, strict=True))


def _with_methods(runs: Sequence[Evaluation]) -> list[Evaluation]:
    """The runs, seeds made one, by the name of their method; where several have one method, their own behind it."""
    merged = group_seeds(runs)
    methods = [method_of((run.seeds or (run,))[0].recipe) for run in merged]
    titles = [METHODS.get(method, method) if method else run.name for run, method in zip(merged, methods, strict=True)]
    named = zip(merged, titles, strict=True)
    return [replace(run, name=title if titles.count(title) < 2 else f"{title} ({run.name})") for run, title in named]


def method_of(recipe: dict[str, Any]) -> str | None:
    """The method (config/recipes/methods) whose losses a recipe has on; None if there is none.

    Fields that the method does not name, such as the bridge's t, may differ.
    """
    try:
        losses = migrate_checkpoint(recipe)["losses"]
        on = {name for name, loss in losses.items() if loss.get("weight")}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    for path in sorted((RECIPES / "methods").glob("*.yaml")):
        wanted = read_recipe_file(path)["losses"]
        named = [(losses.get(name, {}).get(key), value) for name, loss in wanted.items() for key, value in loss.items()]
        if wanted.keys() == on and all(own == value for own, value in named):
            return path.stem
    return None


def load_runs(folders: Sequence[Path], beside: Sequence[Path] = ()) -> list[Evaluation]:
    """Evaluations, fine-tuned runs joined by the pre-training that they started from, and published results.

    Raises ValueError or FileNotFoundError naming the folder that is neither, or that stands for what another one does.
    """
    evaluations = [folder for folder in folders if (folder / "model.json").is_file()]
    loaded = load_evaluations(evaluations) if evaluations else []
    tuned: dict[tuple[Path, object], Evaluation] = {}
    for folder in (folder for folder in folders if folder not in evaluations):
        start, recipe, seed = _pretraining_of(folder)
        model = {"name": "fine-tuned", "recipe": yaml.safe_dump(recipe), "commands": []}
        run = tuned.setdefault((start, seed), Evaluation(start, start.name, model))
        for result in _task_results(folder):
            if (result.set, result.metric) in run.results:
                what = f"{result.metric} of {start.name} with seed {seed}"
                refuse("report", str(folder), f"a second {result.set} of {what}: give one of the two, or another seed")
            run.results[result.set, result.metric] = result
    return [*loaded, *tuned.values(), *read_benchmark(beside)]


def _task_results(folder: Path) -> list[Result]:
    """What `evaluate.py task` wrote as SPLIT.json, and the test split as training itself measured it."""
    results = [Result.load(path) for split in SPLITS if (path := folder / f"{split}.json").is_file()]
    whole = folder / "metrics.json"
    if whole.is_file() and "test" not in {result.set for result in results}:
        results += [from_json({**result}, whole) for result in read_json(whole).get("results", {}).values()]
    if not results:
        refuse("report", str(folder), "has neither model.json nor SPLIT.json: `evaluate.py full` or `task` measures")
    return results


def _pretraining_of(folder: Path) -> tuple[Path, dict[str, Any], object]:
    """The pre-training that a fine-tuned run started from, through those between them; its recipe, which holds all
    seeds on the way as one; and the seed of the run itself."""
    seeds: list[object] = []
    run, recipe = folder, dict[str, Any]()
    while (run / "checkpoints").is_dir() or (run / "state.json").is_file():
        run = run.parents[1] if (run / "state.json").is_file() and run.parent.name == "checkpoints" else run
        if not (checkpoint := find(str(run), run, "report")):
            break
        recipe = dict[str, Any](read_recipe_file(checkpoint / "recipe.yaml"))
        seeds.append(recipe.get("train", {}).get("seed"))
        if not isinstance(before := recipe.get("init"), str):
            break
        run = Path(before).expanduser()
    kept: dict[str, Any] = recipe if "init" not in recipe else {"start": str(run)}  # published weights have no recipe
    return run, kept | {"train": kept.get("train", {}) | {"seed": str(seeds)}}, seeds[0] if seeds else None


def _bounds(value: Value, options: Options) -> str:
    bounds = (value.low, value.high) if options.intervals else (None, None)
    return "" if None in bounds else f"[{', '.join(_percent(of) for of in bounds if of is not None)}]"


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def markdown(made: Table, options: Options) -> str:
    """The table as Markdown, its caption first, columns aligned for the terminal."""

    marks: dict[int | None, str] = {0: "**{}**", 1: "<u>{}</u>"}

    def text(value: Value, rank: int | None) -> str:
        deviation = "" if value.deviation is None else f" ± {_percent(value.deviation)}"
        number = marks.get(rank, "{}").format(_percent(value.value))
        return f"{number}{deviation} {_bounds(value, options)}".rstrip()

    def plain(name: str) -> str:
        return re.sub(r"([\\|*`<\[\]])|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(" ".join(name.split())))

    rows = [["", *map(plain, made.columns.values())]]
    rows += [[plain(row.name), *made.cells(row, text, "\u2013")] for row in made.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * max(3, width) for width in widths])
    lines = [" | ".join(of.ljust(width) for of, width in zip(row, widths, strict=True)) for row in rows]
    return f"{plain(made.caption)}\n\n" + "".join(f"| {line} |\n" for line in lines)


def latex(made: Table, options: Options) -> str:
    """The table as LaTeX, never wider than the page; the preamble needs PACKAGES."""
    marks: dict[int | None, str] = {0: r"\textbf{%s}", 1: r"\underline{%s}"}

    def text(value: Value, rank: int | None) -> str:
        deviation = "" if value.deviation is None else _percent(value.deviation)
        return cell(_percent(value.value), deviation, marks.get(rank, "%s"))

    lines, before = [], ""
    for row in made.rows:
        below = made.cells(row, lambda value, _: _bounds(value, options), "")
        cells = made.cells(row, text, "--")
        lines.append(Line(row.name, cells, [of.strip("/") for of in below], row.kind == "paper", row.kind != before))
        before = row.kind
    return table(made.name, made.caption, [Block([*map(escaped, made.columns.values())], lines)])


def csv_lines(made: Sequence[Table]) -> str:
    """All tables as CSV, a line a value, shares from 0 to 1. rank: 1 for the best of the measured rows."""
    lines = []
    for of, row in ((one, row) for one in made for row in one.rows):
        for column, values in row.cells.items():
            for i, v in enumerate(values):
                if v is not None:
                    rank = of.rank(row, column, i)
                    numbers = (v.value, v.low, v.high, v.deviation, row.seeds, None if rank is None else rank + 1)
                    lines.append([of.name, row.name, row.kind, column, of.parts[i], *numbers])
    columns = ("table", "row", "kind", "set", "name", "value", "low", "high", "deviation", "seeds", "rank")
    return csv_text(columns, lines)


def write_paper_tables(names: Sequence[str], runs: Sequence[Evaluation], out: Path, options: Options) -> str:
    """Write OUT-tables.md, .tex and .csv, and .pdf where pdflatex or tectonic is there. Returns them as Markdown."""
    stem, made = stem_of(out), [paper_table(name, runs, options) for name in names]
    shown = "\n".join(markdown(of, options) for of in made)
    body = "\n".join(latex(of, options) for of in made)
    pdf = compiled(body)[0]
    contents = {"md": shown.encode(), "tex": f"% The preamble needs {PACKAGES}.\n{body}".encode()}
    contents |= {"csv": csv_lines(made).encode()} | ({"pdf": pdf} if pdf else {})
    for kind, content in contents.items():
        with atomic_write(stem.with_name(f"{stem.name}-tables.{kind}")) as file:
            file.write(content)
    without = "" if pdf else "; no PDF, since neither pdflatex nor tectonic compiled it"
    return f"{shown}\ntables: {stem}-tables.{{{','.join(contents)}}}{without}"


def compiled(body: str) -> tuple[bytes | None, str]:
    """Tables in two columns as CVPR sets them, as PDF, and what TeX said; None without a TeX that has the packages."""
    document = f"\\documentclass[10pt,twocolumn]{{article}}\n\\usepackage[{PAGE}]{{geometry}}\n{PACKAGES}\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "tables.tex")
        source.write_text(f"{document}\\begin{{document}}\n{body}\n\\end{{document}}\n")
        for command in (["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"], ["tectonic"]):
            if shutil.which(command[0]):
                done = subprocess.run(
                    [*command, source.name], cwd=folder, capture_output=True, timeout=300, check=False
                )
                if source.with_suffix(".pdf").is_file():
                    return source.with_suffix(".pdf").read_bytes(), done.stdout.decode(errors="replace")
    return None, ""
