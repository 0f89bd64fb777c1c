"""The metrics of a report for other programs: numbers as they are printed, and one CSV for all."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from modstruct.errors import printable
from modstruct.evaluation.result import Unit
from modstruct.reporting.comparison import Cell, Row, Section
from modstruct.reporting.loading import Evaluation

COLUMNS = [
    *("run", "set", "metric", "name", "value", "low", "high", "deviation", "chance", "unit", "higher_is_better"),
    *("rows", "best", "marked", "test", "best_minus_this", "best_minus_this_low", "best_minus_this_high"),
    *("p_corrected", "fingerprint"),
]
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "\n", " ")
"""What a spreadsheet may read as the beginning of a formula, the fullwidth forms included."""


def shown(value: float, unit: Unit) -> str:
    """A value as it is printed: a share in percent with one decimal, others with four digits; a true minus sign."""
    if unit == "share":
        text = f"{100 * value:.1f}"
    elif unit == "rank":
        text = f"{value:,.1f}".removesuffix(".0")
    elif value == int(value) and abs(value) < 1e9:
        text = f"{int(value):,}"
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1e-3 else f"{value:#.4g}"
    return text.replace("-", "\u2212")


def csv_table(sections: Sequence[Section], runs: Sequence[Evaluation]) -> str:
    """One line for each metric of each run, values in full precision, shares from 0 to 1; empty if there is none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for section in sections:
        for row in section.rows:
            for i, cell in row.cells.items():
                writer.writerow(_csv_row(runs[i], row, cell))
    return text.getvalue()


def _csv_row(run: Evaluation, row: Row, cell: Cell) -> list:
    value, lead = cell.value, cell.lead
    # In the value's own sign, so that adding it to the value gives the best run's value.
    ahead: tuple[float, ...] = () if lead is None else (lead.difference, lead.low, lead.high)
    if row.like.higher_is_better is False:
        ahead = tuple(-number for number in (ahead[0], ahead[2], ahead[1])) if ahead else ()
    return [
        *map(as_cell, (run.name, row.set, row.metric, row.name)),
        *(value.value, value.low, value.high, value.deviation, value.chance, value.unit),
        None if value.higher_is_better is None else int(value.higher_is_better),
        value.rows,
        *(int(cell.best), int(cell.marked), row.test),
        *((*ahead, lead.p) if lead else (None,) * 4),
        as_cell(run.results[row.set, row.metric].fingerprint),
    ]


def as_cell(text: str | None) -> str | None:
    """Text of others as a cell of a CSV file, without control characters, and no formula to a spreadsheet."""
    if text is None:
        return None
    return printable("'" + text if text.startswith(FORMULA) else text).replace("\n", "\\n").replace("\t", "\\t")
