"""A report: its three files, and the page that needs nothing else: style, plots and images inline, no script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from modstruct.files import atomic_write, require_writable
from modstruct.reporting.comparison import ALPHA, Cell, Row, Section, compare
from modstruct.reporting.examples import galleries
from modstruct.reporting.line_chart import STYLES, mark
from modstruct.reporting.loading import Evaluation, load_evaluations
from modstruct.reporting.plots import SHOWN_PAIRS, charts, project, projection_chart, widest
from modstruct.reporting.tables import csv_table, latex_tables
from modstruct.reporting.vocabulary import TIES, Task, humanised, label, lowered, shown

HERE = Path(__file__).parent
LONG_GROUP = 24
"""Longest group in the table; longer ones (a row for each class) are folded."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
SHOWN_FINDINGS = 8


@dataclass(frozen=True)
class ReportFiles:
    html: Path
    csv: Path
    tex: Path

    def __str__(self) -> str:
        return f"report: {self.html}\ntables: {self.csv}, {self.tex}"


def write_report(folders: Sequence[str | Path], out: str | Path) -> ReportFiles:
    """Compare evaluation folders on one page, OUT.html, with the metrics as OUT.csv and OUT.tex beside it.

    folders: one for each run, in the order of the columns. out: with or without ".html". No file is written before all
    are made. Raises FileNotFoundError or ValueError naming the file that is missing or broken, and the remedy.
    """
    out = Path(out).expanduser()
    stem = out.with_suffix("") if out.suffix == ".html" else out
    require_writable("--out", stem.parent)
    runs = load_evaluations([Path(folder).expanduser() for folder in folders])
    sections = compare(runs)
    contents = {
        "html": html_page(sections, runs),
        "csv": csv_table(sections, runs),
        "tex": latex_tables(sections, runs),
    }
    paths = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in contents}
    for kind, text in contents.items():
        with atomic_write(paths[kind]) as file:
            file.write(text.encode("utf-8", errors="replace"))
    return ReportFiles(**paths)


@dataclass(frozen=True)
class Plane:
    """The projections of one set, one a run."""

    set: str
    shown: int
    total: int
    charts: tuple[tuple[int, str, Markup], ...]
    """(number of the run, its name, SVG)."""


def html_page(sections: Sequence[Section], runs: Sequence[Evaluation]) -> str:
    """The whole page. All data are escaped; the page's policy forbids scripts and requests."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    chosen = headlines(sections)
    results = [result for run in runs for result in run.results.values()]
    page = (
        _environment()
        .get_template("page.html")
        .render(
            runs=runs,
            sections=sections,
            headlines=chosen,
            findings=findings(chosen, runs),
            notes=list(notes(sections, runs)),
            charts={section.metric: charts(section, runs) for section in sections},
            planes=_planes(runs),
            galleries=galleries(runs),
            sets=sorted({result.set for result in results}),
            first=min(result.written for result in results),
            last=max(result.written for result in results),
            style=Markup(style),
            policy=f"default-src 'none'; img-src data:; style-src 'sha256-{_sha256(style)}'; base-uri 'none'; "
            "form-action 'none'",
            ties=TIES,
            alpha=ALPHA,
            long_group=LONG_GROUP,
        )
    )
    return CONTROL.sub("\ufffd", page)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "humanised": humanised,
        "shown": shown,
        "words": lambda words: shlex.join(str(word) for word in words),
        "pretty": lambda value: json.dumps(value, indent=1, ensure_ascii=False),
        "swatch": _swatch,
        "weights": _weights,
    }
    environment.tests["at_most"] = lambda items, most: len(items) <= most
    environment.globals |= {"tip": _tip, "period": _period, "commands_of": _commands_of}
    return environment


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _swatch(style: int) -> Markup:
    """The mark of a run in the charts, to be placed beside its name."""
    svg = '<svg class="swatch run-{}" viewBox="0 0 12 12" aria-hidden="true">{}</svg>'
    return Markup(svg).format(style % STYLES, mark(style, 6, 6, 4.2))


def _weights(model: dict) -> str:
    """Where a model's weights came from."""
    if model.get("checkpoint"):
        return str(model["checkpoint"])
    named = model.get("open_clip")
    if isinstance(named, dict):
        named = " ".join(str(value) for value in named.values())
    return f"OpenCLIP {named}" if named else "not said"


def _tip(row: Row, cell: Cell) -> str:
    """Tooltip of a cell."""
    parts = [f"{cell.metric.rows:,} rows"] if cell.metric.rows else []
    if cell.lead:
        numbers = [shown(n, row.share) for n in (cell.lead.difference, cell.lead.low, cell.lead.high)]
        p = f"p = {cell.lead.p:.3f}" if cell.lead.p >= 0.001 else "p < 0.001"
        parts.append(f"the best is ahead by {numbers[0]} [{numbers[1]}, {numbers[2]}], {p}")
    elif cell.best:
        parts.append("the best value")
    return "; ".join(parts)


def _period(first: datetime, last: datetime) -> str:
    days = sorted({f"{moment:%Y-%m-%d}" for moment in (first, last)})
    return " to ".join(days)


def _commands_of(run: Evaluation) -> list[str]:
    """The distinct commands that measured a run."""
    return list(dict.fromkeys(shlex.join(r.command) for r in run.results.values() if r.command))


def _planes(runs: Sequence[Evaluation]) -> list[Plane]:
    planes = []
    for set_name in sorted({set_name for run in runs for set_name, _ in run.results}):
        sources = [(style, run.embedded_set(set_name)) for style, run in enumerate(runs)]
        drawn = [(style, found) for style, source in sources if source and (found := project(source))]
        if drawn:
            span = widest([projection for _, projection in drawn])
            total = max(projection.total for _, projection in drawn)
            charts = ((i, runs[i].name, projection_chart(found, runs[i].name, span)) for i, found in drawn)
            planes.append(Plane(set_name, min(SHOWN_PAIRS, total), total, tuple(charts)))
    return planes


@dataclass(frozen=True)
class Headline:
    """A row of the summary, and its name there."""

    task: Task
    row: Row

    @property
    def metric(self) -> str:
        return label(self.row.names)

    @property
    def name(self) -> str:
        """In a sentence."""
        first, *others = [part for part in (self.task.short, *map(humanised, self.row.names)) if part]
        return f"{', '.join([first, *map(lowered, others)])} on {self.row.set}"


def headlines(sections: Sequence[Section]) -> list[Headline]:
    """The summary's metrics of each set and section in which a direction is better, or else its first metric."""
    found = []
    for section in sections:
        for set_name in dict.fromkeys(group.set for group in section.groups):
            rows = [row for row in section.rows if row.set == set_name and row.better]
            wanted = [row for name in section.task.headlines for row in rows if "/".join(row.names) == name]
            found += [Headline(section.task, row) for row in wanted or rows[:1]]
    return found


def findings(chosen: Sequence[Headline], runs: Sequence[Evaluation]) -> list[str]:
    """Sentences on the headlines: first those in which a run is shown to be ahead, then one on the others."""
    sentences = [sentence for headline in chosen if (sentence := _finding(headline, runs))]
    hidden = len(sentences) - SHOWN_FINDINGS
    if hidden > 1:
        sentences = [*sentences[:SHOWN_FINDINGS], f"{hidden} further metrics in which a run is ahead: see the table."]
    undecided = [f"{h.name}" for h in chosen if h.row.test and not h.row.marked]
    if undecided:
        sentences.append(f"No run is shown to be ahead of another on {_listed(undecided)}.")
    untested = [f"{h.name}" for h in chosen if len(h.row.measured) > 1 and not h.row.test]
    if untested:
        sentences.append(f"Not tested, for want of intervals or of the same data: {_listed(untested)}.")
    return sentences


def _finding(headline: Headline, runs: Sequence[Evaluation]) -> str | None:
    row, measured = headline.row, headline.row.measured
    unit = "\u00a0%" if row.share else ""
    if len(measured) == 1:
        ((i, cell),) = measured.items()
        beside = "" if row.chance is None else f" (chance {shown(row.chance, row.share)}{unit})"
        return f"{headline.name}: {runs[i].name} reaches {shown(cell.metric.value, row.share)}{unit}{beside}."
    ahead, best = row.marked, row.best
    if not ahead or best is None:
        return None
    behind = [i for i in measured if i not in ahead]
    others = _listed([runs[i].name for i in behind])
    value = f"{shown(measured[best].metric.value, row.share)}{unit}"
    if len(ahead) > 1:
        names = _listed([runs[i].name for i in sorted(ahead, key=lambda i: i != best)])
        return f"{headline.name}: {names} (up to {value}) do not differ significantly, and are ahead of {others}."
    nearest = max(behind, key=lambda i: row.better * measured[i].metric.value)
    start = f"{headline.name}: {runs[best].name} reaches {value}"
    lead = measured[nearest].lead
    if lead is None:
        return f"{start}, ahead of {others} by intervals that do not overlap."
    difference, low, high = (shown(number, row.share) for number in (lead.difference, lead.low, lead.high))
    points = "\u00a0points" if row.share else ""
    next_best = ", the next best" if len(behind) > 1 else ""
    return f"{start}, {difference}{points} [{low},\u00a0{high}] ahead of {runs[nearest].name}{next_best}."


def _listed(names: Sequence[str]) -> str:
    *start, last = names
    return f"{', '.join(start)} and {last}" if start else last


def notes(sections: Sequence[Section], runs: Sequence[Evaluation]) -> Iterator[str]:
    """What a reader must know before comparing: different data, leakage, results that only some runs have."""
    for section in sections:
        if section.metric == "leakage":
            yield from _leaks(section, runs)
        said = dict.fromkeys((group.set, group.note) for group in section.groups if group.note)
        for set_name, note in said:
            yield f"{section.task.title}, {set_name}. {note}"
        for set_name in dict.fromkeys(group.set for group in section.groups):
            lacking = [run.name for run in runs if (set_name, section.metric) not in run.results]
            if lacking:
                yield f"{section.task.title} on {set_name} was not measured for {_listed(lacking)}."


def _leaks(section: Section, runs: Sequence[Evaluation]) -> Iterator[str]:
    """The largest share of each set that was found in a run's training data."""
    for set_name in dict.fromkeys(group.set for group in section.groups):
        rows = [row for row in section.rows if row.set == set_name and row.share]
        by_share: dict[str, list[str]] = {}
        for i, run in enumerate(runs):
            found = max((row.measured[i].metric.value for row in rows if i in row.measured), default=0)
            if found > 0:
                by_share.setdefault(shown(found, True), []).append(run.name)
        for share, names in by_share.items():
            trained = f"{_listed(names)} {'was' if len(names) == 1 else 'were'} trained on"
            yield f"Leakage: {share}\u00a0% of {set_name} also occur in what {trained}."
