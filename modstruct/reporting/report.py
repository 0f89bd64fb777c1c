"""A report: the page, which needs nothing else (style, plots and images inline, no script), and its files beside it.

OUT.html           the page
OUT.csv            every value of every run, in full precision, shares from 0 to 1
OUT.tex            the same as LaTeX tables
OUT.json           {"schema": 1, "runs": [{"name": the short name, "folder": …, "model": model.json, "results": [RESULT,
                   …]}, …]}; a RESULT is what evaluation/result.py writes as METRIC.json. Every seed is a run
OUT-figures/       every plot as PDF and PNG, 3.25 inches wide
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from modstruct.evaluation.result import Result
from modstruct.files import atomic_write, require_writable
from modstruct.reporting.comparison import ALPHA, Row, Section, compare, group_seeds
from modstruct.reporting.examples import galleries
from modstruct.reporting.loading import Evaluation, load_evaluations
from modstruct.reporting.plots import Plot, planes, plots
from modstruct.reporting.tables import csv_table, latex_tables, shown

HERE = Path(__file__).parent
SCHEMA = 1
"""Of OUT.json."""
LONG_GROUP = 24
"""Longest group in the table; longer ones (a row for each class) are folded."""
SHOWN_FINDINGS = 8
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
ROWS = {"image": "images", "text": "captions", "labelled": "labelled images", "train": "training images"}
SWATCHES = (
    "M6 2a4 4 0 1 0 .01 0z",
    "M2 2h8v8h-8z",
    "M6 1l5 5-5 5-5-5z",
    "M6 1.5l5 9h-10z",
    "M6 10.5l5-9h-10z",
    "M4.5 1h3v3.5H11v3H7.5V11h-3V7.5H1v-3h3.5z",
    "M1 3l2-2 3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3z",
    "M6 .5l1.5 3.8 4 .2-3.1 2.6 1 4L6 8.9l-3.4 2.2 1-4L.5 4.5l4-.2z",
)
"""Markers of the plots, as paths of a 12 x 12 square."""


@dataclass(frozen=True)
class ReportFiles:
    html: Path
    csv: Path
    tex: Path
    json: Path
    figures: Path

    def __str__(self) -> str:
        beside = (self.csv, self.tex, self.json, self.figures)
        return f"report: {self.html}\nbeside it: {', '.join(path.name for path in beside)}"


def write_report(folders: Sequence[str | Path], out: str | Path, with_interval: bool = True) -> ReportFiles:
    """Compare evaluation folders on one page, OUT.html, with the files of this module's docstring beside it.

    folders: one for each run, in the order of the columns; runs that differ in their seed alone share one. out: with or
    without ".html". with_interval: whether tables show intervals. No file is written before all are made. Raises
    FileNotFoundError or ValueError naming the file that is missing or broken, and the remedy.
    """
    out = Path(out).expanduser()
    stem = out.with_suffix("") if out.suffix == ".html" else out
    require_writable("--out", stem.parent)
    kinds = {"html": ".html", "csv": ".csv", "tex": ".tex", "json": ".json", "figures": "-figures"}
    files = ReportFiles(**{kind: stem.with_name(f"{stem.name}{ending}") for kind, ending in kinds.items()})
    loaded = load_evaluations(folders)
    runs = group_seeds(loaded)
    sections = compare(runs)
    drawn = {section.metric: plots(section, runs) for section in sections} | {"planes": planes(runs)}
    texts = {
        files.csv: csv_table(sections, runs),
        files.tex: latex_tables(sections, runs, with_interval),
        files.json: results_json(loaded),
        files.html: html_page(sections, runs, drawn, files, with_interval),
    }
    contents = {path: text.encode("utf-8", errors="replace") for path, text in texts.items()}
    for plot in (plot for of_section in drawn.values() for plot in of_section):
        contents |= {files.figures / f"{plot.name}.{kind}": data for kind, data in plot.files.items()}
    files.figures.mkdir(exist_ok=True)
    for path, data in contents.items():
        with atomic_write(path) as file:
            file.write(data)
    return files


def results_json(runs: Sequence[Evaluation]) -> str:
    """OUT.json, as this module's docstring says."""
    made = []
    for run in runs:
        results = [result.to_json() for result in run.results.values()]
        made.append({"name": run.name, "folder": str(run.folder), "model": run.model, "results": results})
    return json.dumps({"schema": SCHEMA, "runs": made}, indent=1, allow_nan=False) + "\n"


def html_page(
    sections: Sequence[Section],
    runs: Sequence[Evaluation],
    drawn: dict[str, list[Plot]],
    files: ReportFiles,
    with_interval: bool = True,
) -> str:
    """The whole page. All data are escaped; the page's policy forbids scripts and requests.

    drawn: plots by section, and "planes".
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    sha256 = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "words": lambda words: shlex.join(map(str, words)), "weights": _weights}
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, ensure_ascii=False)
    chosen = headlines(sections)
    titles = list(dict.fromkeys(headline.title for headline in chosen))
    page = environment.get_template("page.html").render(
        runs=runs,
        sections=sections,
        drawn=drawn,
        headlines=[(title, None, [(f"{h.group}, ", h.row) for h in chosen if h.title == title]) for title in titles],
        findings=findings(chosen, runs),
        notes=list(notes(sections, runs)),
        galleries=galleries(runs),
        sets=sorted({set_name for run in runs for set_name, _ in run.results}),
        files=files,
        with_interval=with_interval,
        tables=tables,
        facts=facts,
        tip=lambda row, i: _tip(row, i, runs),
        units={"share": "%", "nats": "nats"},
        swatches=SWATCHES,
        style=Markup(style),
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{sha256}'; base-uri 'none'; form-action 'none'",
        alpha=ALPHA,
    )
    return CONTROL.sub("\ufffd", page)


def _weights(model: dict[str, Any]) -> str:
    """Where a model's weights came from."""
    named = model.get("checkpoint") or model.get("open_clip") or "not said"
    return " ".join(["OpenCLIP", *map(str, named.values())]) if isinstance(named, dict) else str(named)


def tables(section: Section) -> list[tuple[str, bool, list[tuple[str, str | None, list[tuple[str, Row]]]]]]:
    """(title, whether it is folded, (title, note, rows) of each group) of a section's tables."""
    made = [(group.title, group.note, [("", row) for row in group.rows]) for group in section.groups]
    short = [group for group in made if len(group[2]) <= LONG_GROUP]
    folded = [(group[0], True, [group]) for group in made if len(group[2]) > LONG_GROUP]
    return ([(section.title, False, short)] if short else []) + folded


def facts(result: Result) -> str:
    """What was measured and how: rows, features, templates."""
    parts = [f"{count:,} {ROWS.get(name, name.replace('_', ' '))}" for name, count in result.rows.items()]
    if features := result.settings.get("features"):
        parts.append(f"features {features}")
    templates = result.settings.get("templates")
    for group, found in templates.items() if isinstance(templates, dict) else []:
        number = f"{len(found)} templates, the first" if len(found) > 1 else "template"
        parts.append(f"{result.groups.get(group, group).lower()}: {number} “{found[0]}”")
    return " · ".join(parts)


def _tip(row: Row, i: int, runs: Sequence[Evaluation]) -> str:
    """Tooltip of a cell."""
    cell = row.cells[i]
    parts = [f"{cell.value.rows:,} rows"] if cell.value.rows else []
    for seed in runs[i].seeds:
        if result := seed.results.get((row.set, row.metric)):
            parts.append(f"{seed.name}: {shown(result.values[row.name].value, row.like.unit)}")
    if cell.lead:
        lead = (cell.lead.difference, cell.lead.low, cell.lead.high)
        difference, low, high = (shown(number, row.like.unit) for number in lead)
        p = f"p = {cell.lead.p:.3f}" if cell.lead.p >= 0.001 else "p < 0.001"
        parts.append(f"the best is ahead by {difference} [{low}, {high}], {p}")
    return "; ".join(parts)


@dataclass(frozen=True)
class Headline:
    """A row of the summary. title: of its section. group: title of its group, with the set."""

    title: str
    group: str
    row: Row


def headlines(sections: Sequence[Section]) -> list[Headline]:
    """The values that results name as their headlines."""
    found = []
    for section in sections:
        of_set = {name: {h for r in results.values() for h in r.headlines} for name, results in section.results.items()}
        for group in section.groups:
            found += [Headline(section.title, group.title, row) for row in group.rows if row.name in of_set[row.set]]
    return found


def findings(chosen: Sequence[Headline], runs: Sequence[Evaluation]) -> list[str]:
    """Sentences on the headlines: in which a run is shown to be ahead, and how many of the others there are."""
    sentences, undecided = [], 0
    for headline in chosen:
        row = headline.row
        if not row.marked:
            undecided += row.test is not None
            continue
        behind = [runs[i].name for i in row.cells if i not in row.marked]
        value = next(shown(cell.value.value, row.like.unit) for cell in row.cells.values() if cell.best)
        value += "\u00a0%" if row.like.unit == "share" else ""
        names = _listed([runs[i].name for i in row.marked])
        several = f"{names} (up to {value}) do not differ significantly and lead"
        lead = several if len(row.marked) > 1 else f"{names} reaches {value} and leads"
        sentences.append(f"{headline.title}, {headline.group}, {row.label}: {lead} {_listed(behind)}.")
    if (hidden := len(sentences) - SHOWN_FINDINGS) > 0:
        sentences[SHOWN_FINDINGS:] = [f"{hidden} more in which runs are shown to be ahead: see the table."]
    if undecided:
        sentences.append(f"No run is shown to be ahead of another in {undecided} of {len(chosen)} main metrics.")
    return sentences


def _listed(names: Sequence[str]) -> str:
    *start, last = names
    return f"{', '.join(start)} and {last}" if start else last


def notes(sections: Sequence[Section], runs: Sequence[Evaluation]) -> Iterator[str]:
    """What a reader must know before comparing: different data, leakage, results that only some runs have."""
    sets = sorted({set_name for run in runs for set_name, _ in run.results})
    of_run = [{set_name for set_name, _ in run.results} for run in runs]
    for run, has in zip(runs, of_run, strict=True):
        if lacking := [set_name for set_name in sets if set_name not in has]:
            yield f"{run.name} was not measured on {_listed(lacking)}."
    for section in sections:
        for set_name, note in dict.fromkeys((group.set, group.note) for group in section.groups if group.note):
            yield f"{section.title}, {set_name}. {note}"
        for set_name, results in section.results.items():
            if lacking := [run.name for i, run in enumerate(runs) if i not in results and set_name in of_run[i]]:
                yield f"{section.title} on {set_name} was not measured for {_listed(lacking)}."
            leaked: dict[float, list[str]] = {}
            for i, result in results.items() if section.metric == "leakage" else ():
                leaked.setdefault(max(value.value for value in result.values.values()), []).append(runs[i].name)
            for share, names in leaked.items():
                if share > 0:
                    found = f"{shown(share, 'share')}\u00a0% of {set_name}"
                    yield f"Leakage: {found} also occur in the training data of {_listed(names)}."
