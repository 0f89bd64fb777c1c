"""The paper's tables T1 to T4 (paper_tables.yaml): methods as rows, sets as columns, seeds of a method aggregated.

A cell holds top-1/3/5, or the validation and the test split's accuracy. Best bold, second underlined, among our rows;
the paper's printed rows stand in grey, if they are asked for. The average is over the sets that all our rows have.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modstruct.checkpoints import find
from modstruct.cli import RECIPES, read_recipe_file
from modstruct.errors import refuse, require
from modstruct.evaluation.result import Result, Value, from_json, read_json, share
from modstruct.files import atomic_write, parse_yaml, read_yaml
from modstruct.reporting.comparison import group_seeds
from modstruct.reporting.loading import Evaluation, load_evaluation
from modstruct.reporting.tables import as_cell, escaped

FORMS = read_yaml(Path(__file__).parent / "paper_tables.yaml")
TABLES = tuple(FORMS)
SPLITS = ("validation", "test")
AVERAGE = "average"
PREAMBLE = r"\usepackage{booktabs,xcolor,adjustbox}"
Values = tuple[Value | None, ...]
"""Of one cell."""


@dataclass(frozen=True)
class Options:
    """How tables are shown."""

    sets: tuple[str, ...] = ()
    """Columns; none for the paper's that were measured, or all that were where none of them was."""
    paper_rows: bool = False
    intervals: bool = False
    """95 % intervals, of rows of one seed."""


@dataclass(frozen=True)
class Row:
    """Values by column. seeds: runs that they are means of; 0 for a row of the paper."""

    name: str
    cells: dict[str, Values]
    seeds: int


@dataclass(frozen=True)
class Table:
    """columns: label by set. ours, paper: rows. common: the sets that the average is over, where there is one."""

    name: str
    caption: str
    columns: dict[str, str]
    ours: list[Row]
    paper: list[Row]
    common: list[str] = field(default_factory=list)

    def rank(self, row: Row, column: str, place: int) -> int | None:
        """Of a value of a cell among our rows, from 0; equal values share one. None where there is nothing to rank."""
        values = [v.value for other in self.ours if (v := other.cells[column][place])]
        own = row.cells[column][place]
        if not row.seeds or own is None or len(values) < 2:
            return None
        return len({value for value in values if value > own.value + 1e-9})


def paper_table(name: str, runs: Sequence[Evaluation], options: Options) -> Table:
    """One of TABLES of these runs. Raises ValueError where none of them measured any of its sets."""
    form = FORMS[name]
    values = list(form["values"])
    of_task = name == "fusion"

    def cell(run: Evaluation, column: str) -> Values:
        if of_task:
            return tuple(_value(run, [column], split, values[0]) for split in SPLITS)
        return tuple(_value(run, form["metrics"], column, value) for value in values)

    metrics = list(form["sets"]) if of_task else form["metrics"]
    measured = dict.fromkeys(m if of_task else s for run in runs for s, m in run.results if m in metrics)
    columns = [c for c in form["sets"] if c in measured] or list(measured)
    if options.sets:
        unknown = [c for c in options.sets if c not in measured]
        require(not unknown, "--sets", unknown[:1], f"no run measured it for {name}; there are {', '.join(measured)}")
        columns = list(options.sets)
    if not columns:
        refuse("--tables", name, "no run has a result for it: measure the sets, or fine-tune the tasks, first")
    merged = [(run, {c: cell(run, c) for c in columns}) for run in group_seeds(_with_methods(runs))]
    ours = [Row(run.name, cells, len(run.seeds) or 1) for run, cells in merged if any(map(any, cells.values()))]
    paper = []
    for method, printed in form["paper"].items() if options.paper_rows else ():
        there = {c: _printed(text) for c, text in zip(form["sets"], printed, strict=True) if c in columns}
        if there:
            nothing = (None,) * len(next(iter(there.values())))
            paper.append(Row(f"{method} (paper)", {c: there.get(c, nothing) for c in columns}, 0))
    common = [c for c in columns if all(all(row.cells[c]) for row in ours)]
    labels = {c: form["sets"].get(c, c) for c in columns}
    caption = f"{form['title']}: {'/'.join(form['values'].values())} in percent, {form['about']}."
    if len(common) > 1 and not of_task:
        labels[AVERAGE] = "Average"
        for row in (*ours, *paper):
            row.cells[AVERAGE] = _average([row.cells[c] for c in common])
        if len(common) < len(columns):
            caption += f" Average over what all rows have: {', '.join(labels[c] for c in common)}."
    if any(row.seeds > 1 for row in ours):
        caption += " ±: standard deviation over seeds."
    if options.intervals:
        caption += " Brackets: 95 % intervals over the images, of one seed."
    return Table(name, caption, labels, ours, paper, common)


def _value(run: Evaluation, metrics: Sequence[str], set_name: str, value: str) -> Value | None:
    for metric in metrics:
        result = run.results.get((set_name, metric))
        found = result and (result.values.get(value) or result.values.get(value.rpartition("/")[2]))
        if found:
            return found
    return None


def _printed(text: str | float) -> Values:
    return tuple(share(float(number) / 100) for number in str(text).split("/"))


def _average(cells: Sequence[Values]) -> Values:
    places = zip(*cells, strict=True)
    return tuple(share(np.mean([v.value for v in place if v])) if all(place) else None for place in places)


def _with_methods(runs: Sequence[Evaluation]) -> list[Evaluation]:
    """The runs, those called by their methods where each then has a name of its own, but for seeds."""
    named = [Evaluation(r.folder, method_of(r.model.get("recipe")) or r.name, r.model, r.results) for r in runs]
    merged = [run.name for run in group_seeds(named)]
    return [b if merged.count(b.name) < 2 else a for a, b in zip(runs, named, strict=True)]


def method_of(recipe: object) -> str | None:
    """The method (config/recipes/methods) whose losses a recipe, given as YAML, has on; None if there is none."""
    try:
        losses = parse_yaml(str(recipe).encode())["losses"]
        on = {name for name, loss in losses.items() if loss["weight"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    for path in sorted((RECIPES / "methods").glob("*.yaml")):
        wanted = read_recipe_file(path)["losses"]
        if wanted.keys() == on and all(
            losses[name].get(key) == value for name, loss in wanted.items() for key, value in loss.items()
        ):
            return path.stem
    return None


def load_runs(folders: Sequence[Path]) -> list[Evaluation]:
    """Evaluation folders, and the results of fine-tuned runs joined by the pre-training that they started from."""
    found: dict[Path, Evaluation] = {}
    for folder in folders:
        if (folder / "model.json").is_file():
            found[folder] = load_evaluation(folder)
            continue
        start, recipe = _pretraining_of(folder)
        run = found.setdefault(start, Evaluation(start, start.name, {"name": "fine-tuned", "recipe": recipe}))
        results = [Result.load(folder / f"{split}.json") for split in SPLITS if (folder / f"{split}.json").is_file()]
        if (folder / "metrics.json").is_file() and "test" not in {result.set for result in results}:
            content = read_json(folder / "metrics.json").get("results", {})
            results += [from_json(result, folder / "metrics.json") for result in content.values()]
        if not results:
            refuse("report", str(folder), "holds no results: `evaluate.py task --checkpoint` measures a fine-tuned run")
        run.results.update({(result.set, result.metric): result for result in results})
    return list(found.values())


def _pretraining_of(run: Path) -> tuple[Path, str]:
    """The run that a fine-tuned one started from, through those between them, and its recipe."""
    recipe = ""
    while checkpoint := find(str(run), run, "report"):
        recipe = (checkpoint / "recipe.yaml").read_text()
        before = parse_yaml(recipe.encode()).get("init")
        if not isinstance(before, str) or not Path(before).expanduser().is_dir():
            return (run, recipe) if before is None else (Path(before), recipe)
        run = Path(before).expanduser()
    refuse("report", str(run), "is no evaluation folder and no run with a checkpoint")


def markdown(table: Table, options: Options) -> str:
    """The table as Markdown, its caption first."""

    def shown(value: Value | None, rank: int | None) -> str:
        text = "\u2013" if value is None else _percent(value)
        text = f"**{text}**" if rank == 0 else f"<u>{text}</u>" if rank == 1 else text
        return text + _beside(value, options, " ± {}", " [{}, {}]")

    lines = [["", *table.columns.values()], ["---", *("---:" for _ in table.columns)]]
    lines += [[row.name.replace("|", "\\|"), *_cells(table, row, shown)] for row in (*table.paper, *table.ours)]
    return f"{table.caption}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def latex(table: Table, options: Options) -> str:
    """The table as LaTeX, never wider than the page; the preamble needs PREAMBLE."""

    def shown(value: Value | None, rank: int | None) -> str:
        text = "--" if value is None else _percent(value)
        text = f"\\textbf{{{text}}}" if rank == 0 else f"\\underline{{{text}}}" if rank == 1 else text
        return text + _beside(value, options, r"{{\scriptsize\,$\pm$\,{}}}", r"{{\scriptsize\,[{}, {}]}}")

    wide = "*" if len(table.columns) * len(next(iter(table.ours[0].cells.values()))) > 5 else ""
    lines = [
        f"\\begin{{table{wide}}}",
        r"  \centering\small",
        f"  \\caption{{{escaped(table.caption)}}}",
        f"  \\label{{tab:{table.name}}}",
        r"  \begin{adjustbox}{max width=\linewidth}",
        f"  \\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
        r"    \toprule",
        "    " + " & ".join(["", *map(escaped, table.columns.values())]) + r" \\",
        r"    \midrule",
    ]
    for rows in (table.paper, table.ours):
        for row in rows:
            cells = [f"{{}}{escaped(row.name)}", *_cells(table, row, shown)]
            cells = cells if row.seeds else [f"\\textcolor{{gray}}{{{cell}}}" for cell in cells]
            lines.append("    " + " & ".join(cells) + r" \\")
        lines += [r"    \midrule"] if rows is table.paper and rows else []
    return "\n".join(
        [*lines, r"    \bottomrule", r"  \end{tabular}", r"  \end{adjustbox}", f"\\end{{table{wide}}}", ""]
    )


def _cells(table: Table, row: Row, shown: Callable[[Value | None, int | None], str]) -> list[str]:
    def cell(column: str, values: Values) -> str:
        if not any(values):
            return shown(None, None)
        return "/".join(shown(value, table.rank(row, column, place)) for place, value in enumerate(values))

    return [cell(column, row.cells[column]) for column in table.columns]


def _percent(value: Value) -> str:
    return f"{100 * value.value:.2f}"


def _beside(value: Value | None, options: Options, spread: str, interval: str) -> str:
    if value is None:
        return ""
    if value.deviation is not None:
        return spread.format(f"{100 * value.deviation:.2f}")
    if options.intervals and value.low is not None and value.high is not None:
        return interval.format(f"{100 * value.low:.2f}", f"{100 * value.high:.2f}")
    return ""


def csv_lines(tables: Sequence[Table]) -> str:
    """All tables as CSV, a line a value, shares from 0 to 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "row", "set", "place", "value", "low", "high", "deviation", "seeds"])
    for table in tables:
        for row in (*table.paper, *table.ours):
            for column, values in row.cells.items():
                for place, v in enumerate(values, 1):
                    if v is not None:
                        numbers = (v.value, v.low, v.high, v.deviation, row.seeds)
                        writer.writerow([table.name, as_cell(row.name), as_cell(column), place, *numbers])
    return text.getvalue()


def write_paper_tables(names: Sequence[str], folders: Sequence[Path], out: Path, options: Options) -> str:
    """Write OUT-tables.md, .tex and .csv, and .pdf where pdflatex or tectonic is there. Returns them as Markdown."""
    runs = load_runs(folders)
    tables = [paper_table(name, runs, options) for name in names]
    shown = "\n".join(markdown(table, options) for table in tables)
    body = "\n".join(latex(table, options) for table in tables)
    texts = {"md": shown, "tex": f"% The preamble needs {PREAMBLE}.\n{body}", "csv": csv_lines(tables)}
    for kind, text in texts.items():
        with atomic_write(out.with_name(f"{out.name}-tables.{kind}")) as file:
            file.write(text.encode())
    pdf = compiled(body)
    if pdf is not None:
        with atomic_write(out.with_name(f"{out.name}-tables.pdf")) as file:
            file.write(pdf)
    kinds = [*texts, *(["pdf"] if pdf else [])]
    without = "" if pdf else "; no PDF, since neither pdflatex nor tectonic compiled it"
    return f"{shown}\npaper's tables: {out}-tables.{{{','.join(kinds)}}}{without}"


def compiled(body: str) -> bytes | None:
    """Tables in two columns as CVPR sets them, as PDF; None without a TeX that has the packages."""
    size = r"\usepackage[letterpaper,textwidth=6.875in,textheight=8.875in,columnsep=0.3125in]{geometry}"
    document = f"\\documentclass[10pt,twocolumn]{{article}}\n{size}\n{PREAMBLE}\n\\begin{{document}}\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "tables.tex")
        source.write_text(f"{document}{body}\n\\end{{document}}\n")
        for command in (["pdflatex", "-interaction=nonstopmode", "-halt-on-error"], ["tectonic"]):
            if shutil.which(command[0]):
                subprocess.run([*command, source.name], cwd=folder, capture_output=True, timeout=300, check=False)
            if source.with_suffix(".pdf").is_file():
                return source.with_suffix(".pdf").read_bytes()
    return None
