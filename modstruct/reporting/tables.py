"""Values for readers and other programs: numbers as they are printed, and CSV whatever texts hold."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from modstruct.errors import printable
from modstruct.evaluation.result import Unit, Value
from modstruct.reporting.comparison import Section
from modstruct.reporting.loading import Evaluation

COLUMNS = [
    *("run", "set", "metric", "name", "value", "low", "high", "deviation", "chance", "unit", "higher_is_better"),
    *("rows", "best", "marked", "test", "best_minus_this", "best_minus_this_low", "best_minus_this_high"),
    *("p_corrected", "fingerprint"),
]
LONG_GROUP = 24
"""Longest group in a table; longer ones (a value for each class) are folded on the page, and in LaTeX left out."""
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


def texts(value: Value | None, unit: Unit) -> tuple[str, str, str]:
    """A cell's number, deviation and interval as they are printed; "" where there is none, a dash for no value."""
    if value is None:
        return "\u2013", "", ""
    deviation = "" if value.deviation is None else shown(value.deviation, unit)
    if value.low is None or value.high is None:
        return shown(value.value, unit), deviation, ""
    return shown(value.value, unit), deviation, f"[{shown(value.low, unit)}, {shown(value.high, unit)}]"


def csv_text(columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """CSV with a head; numbers in full precision, empty for None, texts by `as_cell`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([as_cell(cell) if isinstance(cell, str) else cell for cell in line] for line in lines)
    return text.getvalue()


def as_cell(text: str) -> str:
    """Text of others as a cell of a CSV file, without control characters, and no formula to a spreadsheet."""
    return printable("'" + text if text.startswith(FORMULA) else text).replace("\n", "\\n").replace("\t", "\\t")


def csv_table(sections: Sequence[Section], runs: Sequence[Evaluation]) -> str:
    """One line for each metric of each run, shares from 0 to 1."""
    return csv_text(COLUMNS, _lines(sections, runs))


def _lines(sections: Sequence[Section], runs: Sequence[Evaluation]) -> Iterator[list[Any]]:
    for row in (row for section in sections for row in section.rows):
        for i, cell in row.cells.items():
            value, lead = cell.value, cell.lead
            ahead: tuple[float, ...] | tuple[None, ...] = (None,) * 3
            if lead:  # in the value's own sign, so that adding it to the value gives the best run's value
                ahead = (lead.difference, lead.low, lead.high)
                ahead = (-ahead[0], -ahead[2], -ahead[1]) if row.like.higher_is_better is False else ahead
            better = value.higher_is_better
            yield [
                *(runs[i].name, row.set, row.metric, row.name),
                *(value.value, value.low, value.high, value.deviation, value.chance, value.unit),
                *(None if better is None else int(better), value.rows, int(cell.best), int(cell.marked), row.test),
                *(*ahead, lead and lead.p, runs[i].results[row.set, row.metric].fingerprint),
            ]
