"""A report: the page, which needs nothing else (style, plots and images inline, no script), and its files beside it.

OUT.html           the page
OUT.csv            every value of every run, in full precision, shares from 0 to 1
OUT.tex            the same as LaTeX tables
OUT.json           {"schema": 1, "runs": [{"name": the short name, "folder": …, "model": model.json, "results": [RESULT,
                   …]}, …]}; a RESULT is what evaluation/result.py writes as METRIC.json. Every seed is a run
OUT-figures/       every plot as PDF and PNG, 3.25 inches wide
OUT-benchmark/     zero-shot, retrieval and probe in the formats of CLIP_benchmark, JSON and CSV
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
from modstruct.evaluation.tables import ROWS
from modstruct.files import atomic_write, require_writable
from modstruct.reporting.clip_benchmark import benchmark_files, read_benchmark
from modstruct.reporting.comparison import ALPHA, Row, Section, compare, differing_fields, group_seeds
from modstruct.reporting.loading import Evaluation, Gallery, galleries, load_evaluations, stem_of
from modstruct.reporting.plots import Plot, planes, plots
from modstruct.reporting.tables import LONG_GROUP, csv_table, latex_tables, shown, texts

HERE = Path(__file__).parent
SCHEMA = 1
"""Of OUT.json."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class ReportFiles:
    html: Path
    csv: Path
    tex: Path
    json: Path
    figures: Path
    benchmark: Path

    def __str__(self) -> str:
        beside = (self.csv, self.tex, self.json, self.figures, self.benchmark)
        return f"report: {self.html}\nbeside it: {', '.join(path.name for path in beside)}"


def write_report(
    folders: Sequence[str | Path], out: str | Path, with_interval: bool = True, beside: Sequence[Path] = ()
) -> ReportFiles:
    """Compare evaluation folders on one page, OUT.html, with the files of this module's docstring beside it.

    folders: one for each run, in the order of the columns; runs that differ in their seed alone share one. out: with or
    without ".html", or a folder that is there, for FOLDER/report. with_interval: whether tables show intervals. beside:
    files of CLIP_benchmark, whose models become runs. No file is written before all are made. Raises FileNotFoundError
    or ValueError naming the file that is missing or broken, and the remedy.
    """
    stem = stem_of(out)
    require_writable("--out", stem.parent)
    endings = (".html", ".csv", ".tex", ".json", "-figures", "-benchmark")
    files = ReportFiles(*(stem.with_name(stem.name + ending) for ending in endings))
    loaded = load_evaluations(folders)
    runs = [*group_seeds(loaded), *read_benchmark(beside)]
    sections = compare(runs)
    drawn = {section.metric: plots(section, runs) for section in sections} | {"planes": planes(runs)}
    of_runs = []
    for run in loaded:
        results = [result.to_json() for result in run.results.values()]
        of_runs.append({"name": run.name, "folder": str(run.folder), "model": run.model, "results": results})
    texts = {
        files.csv: csv_table(sections, runs),
        files.tex: latex_tables(sections, runs, with_interval),
        files.json: json.dumps({"schema": SCHEMA, "runs": of_runs}, indent=1, allow_nan=False) + "\n",
        files.html: html_page(sections, runs, drawn, files, with_interval),
    }
    contents = {path: text.encode("utf-8", errors="replace") for path, text in texts.items()}
    for plot in (plot for of_section in drawn.values() for plot in of_section):
        contents |= {files.figures / f"{plot.name}.{kind}": data for kind, data in plot.files.items()}
    contents |= {files.benchmark / name: text.encode() for name, text in benchmark_files(loaded).items()}
    for folder in (files.figures, files.benchmark):
        folder.mkdir(parents=True, exist_ok=True)
    for path, data in contents.items():
        with atomic_write(path) as file:
            file.write(data)
    return files


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
    examples = galleries(runs)
    return rendered(
        "page.html",
        runs=runs,
        sections=sections,
        drawn=drawn,
        notes=list(notes(sections, runs, examples)),
        galleries=examples,
        differing=differing_fields(runs) if len(runs) > 1 else {},
        sets=sorted({set_name for run in runs for set_name, _ in run.results}),
        files=files,
        with_interval=with_interval,
        facts=facts,
        texts=texts,
        tip=lambda row, i: _tip(row, i, runs),
        units={"share": "%", "nats": "nats"},
        alpha=ALPHA,
    )


def rendered(template: str, **values: Any) -> str:
    """A page of a template beside this file, in the style of all: every text is escaped, nothing else is asked for."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    sha256 = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "words": lambda words: shlex.join(map(str, words)), "weights": _weights}
    environment.tests |= {"long": lambda group: len(group.rows) > LONG_GROUP}
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{sha256}'; base-uri 'none'; form-action 'none'"
    page = environment.get_template(template).render(values | {"style": Markup(style), "policy": policy})
    return CONTROL.sub("\ufffd", page)


def _weights(model: dict[str, Any]) -> str:
    """Where a model's weights came from."""
    named = model.get("checkpoint") or model.get("open_clip") or "not said"
    return " ".join(["OpenCLIP", *map(str, named.values())]) if isinstance(named, dict) else str(named)


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
    value, lead = row.cells[i].value, row.cells[i].lead
    parts = [f"{value.rows:,} rows"] if value.rows else []
    for seed in runs[i].seeds:
        if result := seed.results.get((row.set, row.metric)):
            parts.append(f"{seed.name}: {shown(result.values[row.name].value, row.like.unit)}")
    if lead:
        difference, low, high = (shown(n, row.like.unit) for n in (lead.difference, lead.low, lead.high))
        p = f"p = {lead.p:.3f}" if lead.p >= 0.001 else "p < 0.001"
        parts.append(f"the best is ahead by {difference} [{low}, {high}], {p}")
    return "; ".join(parts)


def notes(
    sections: Sequence[Section], runs: Sequence[Evaluation], examples: dict[tuple[str, str], Gallery]
) -> Iterator[str]:
    """What a reader must know before comparing: different data, leakage, results that only some runs have."""
    of_run = [{set_name for set_name, _ in run.results} for run in runs]
    for run, sets in zip(runs, of_run, strict=True):
        if lacking := sorted(set().union(*of_run) - sets):
            yield f"{run.name} was not measured on {', '.join(lacking)}."
    for section in sections:
        for set_name, note in dict.fromkeys((group.set, group.note) for group in section.groups if group.note):
            yield f"{section.title}, {set_name}. {note}"
        for set_name, results in section.results.items():
            if lacking := [run.name for i, run in enumerate(runs) if i not in results and set_name in of_run[i]]:
                yield f"{section.title} on {set_name} was not measured for {', '.join(lacking)}."
            for i, result in results.items():
                most = max(value.value for value in result.values.values())
                if section.metric == "leakage" and most > 0:
                    yield f"Leakage: {shown(most, 'share')}\u00a0% of {set_name} are in {runs[i].name}'s training data."
    in_galleries = {found["run"] for queries in examples.values() for query in queries for found in query}
    lacking = [run.name for i, run in enumerate(runs) if i not in in_galleries and not run.published]
    if examples and lacking:
        yield f"Retrieved examples were not kept of {', '.join(lacking)}."
