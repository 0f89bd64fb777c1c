"""The report as one HTML page that needs nothing else: style, charts and images lie inside it, and no script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from modstruct.reporting.comparison import ALPHA, Cell, Row, Section
from modstruct.reporting.curves import charts
from modstruct.reporting.examples import galleries
from modstruct.reporting.line_chart import STYLES, mark
from modstruct.reporting.loading import Evaluation
from modstruct.reporting.projection import SHOWN_PAIRS, project, projection_chart, widest
from modstruct.reporting.summary import findings, headlines, notes
from modstruct.reporting.vocabulary import TIES, humanised, shown

HERE = Path(__file__).parent
LONG_GROUP = 24
"""Rows of a group that stand in the table; a longer group (a row for each class) is folded."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Plane:
    """The projections of one set, one a run."""

    set: str
    shown: int
    total: int
    charts: tuple[tuple[int, str, Markup], ...]
    """(number of the run, its name, SVG)."""


def html_page(sections: Sequence[Section], runs: Sequence[Evaluation]) -> str:
    """The whole page. Everything that comes from data is escaped; the page's policy forbids scripts and requests."""
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
    """The mark that a run has in the charts, to stand beside its name."""
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
    """What a cell tells when pointed at."""
    parts = [f"{cell.figure.rows:,} rows"] if cell.figure.rows else []
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
    """Each command that measured a run, once."""
    return list(dict.fromkeys(shlex.join(r.command) for r in run.results.values() if r.command))


def _planes(runs: Sequence[Evaluation]) -> list[Plane]:
    planes = []
    for set_name in sorted({set_name for run in runs for set_name, _ in run.results}):
        sources = [run.embedded_set(set_name) for run in runs]
        projections = [project(source) if source else None for source in sources]
        drawn = [(style, projection) for style, projection in enumerate(projections) if projection]
        if drawn:
            span = widest([projection for _, projection in drawn])
            total = max(projection.total for _, projection in drawn)
            charts = ((i, runs[i].name, projection_chart(found, runs[i].name, span)) for i, found in drawn)
            planes.append(Plane(set_name, min(SHOWN_PAIRS, total), total, tuple(charts)))
    return planes
