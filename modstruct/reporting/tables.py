"""The metrics of a report for other programs: one CSV for all, and LaTeX tables with booktabs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from unicodedata import normalize

from modstruct.errors import printable
from modstruct.evaluation.result import Unit
from modstruct.reporting.comparison import Cell, Group, Row, Section
from modstruct.reporting.loading import Evaluation

COLUMNS = [
    "run",
    "set",
    "metric",
    "name",
    "value",
    "low",
    "high",
    "deviation",
    "chance",
    "unit",
    "rows",
    "best",
    "marked",
    "test",
    "best_minus_this",
    "best_minus_this_low",
    "best_minus_this_high",
    "p_corrected",
    "fingerprint",
]
FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "\n", " ")
"""What a spreadsheet may read as the beginning of a formula, the fullwidth forms included."""
LONGEST_LATEX_GROUP = 24
"""Longest group in a LaTeX table; longer ones (a row for each class) are left to the CSV."""
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "→": r"$\to$",
    "\u2212": "$-$",
    "\u2013": "--",
    "·": r"$\cdot$",
    "…": r"\dots{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "\u2014": "---",
    "\u2018": "`",
    "\u2019": "'",
    "\u201c": "``",
    "\u201d": "''",
    "\u00d7": r"$\times$",
    "\u00b1": r"$\pm$",
    "\u00b0": r"$^\circ$",
    "\u03bc": r"$\mu$",
    "\u00b5": r"$\mu$",
    "\u00df": r"\ss{}",
    "\u00e6": r"\ae{}",
    "\u00c6": r"\AE{}",
    "\u00f8": r"\o{}",
    "\u00d8": r"\O{}",
    "\u0142": r"\l{}",
    "\u0141": r"\L{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}

# Combining characters -> LaTeX's commands.
ACCENTS = {
    "\u0300": "`",
    "\u0301": "'",
    "\u0302": "^",
    "\u0303": "~",
    "\u0304": "=",
    "\u0306": "u",
    "\u0307": ".",
    "\u0308": '"',
    "\u030a": "r",
    "\u030b": "H",
    "\u030c": "v",
    "\u0323": "d",
    "\u0327": "c",
    "\u0328": "k",
}


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
        *(value.value, value.low, value.high, value.deviation, value.chance, value.unit, value.rows),
        *(int(cell.best), int(cell.marked), row.test),
        *((*ahead, lead.p) if lead else (None,) * 4),
        as_cell(run.results[row.set, row.metric].fingerprint),
    ]


def as_cell(text: str | None) -> str | None:
    """Text of others as a cell of a CSV file, without control characters, and no formula to a spreadsheet."""
    if text is None:
        return None
    return printable("'" + text if text.startswith(FORMULA) else text).replace("\n", "\\n").replace("\t", "\\t")


def latex_tables(sections: Sequence[Section], runs: Sequence[Evaluation], with_interval: bool = True) -> str:
    """A table for each section, for \\usepackage{booktabs}; marked values are bold, intervals small."""
    parts = ["% Tables of a modstruct report. The preamble needs \\usepackage{booktabs}.\n"]
    parts += [_latex_table(section, runs, with_interval) for section in sections]
    return "\n".join(parts)


def _latex_table(section: Section, runs: Sequence[Evaluation], with_interval: bool) -> str:
    with_chance = any(row.like.chance is not None for row in section.rows)
    columns = 1 + with_chance + len(runs)
    head = ["", *(["chance"] if with_chance else []), *(run.name for run in runs)]
    lines = [
        r"\begin{table}",
        r"  \centering",
        f"  \\caption{{{escaped(section.title)}. {_legend(section)}}}",
        f"  \\label{{tab:{re.sub('[^a-z0-9]+', '-', section.metric.lower())}}}",
        f"  \\begin{{tabular}}{{l{'r' * (columns - 1)}}}",
        r"    \toprule",
        f"    {' & '.join(escaped(name) for name in head)} \\\\",
    ]
    for group in section.groups:
        lines += [f"    {line}" for line in _latex_group(group, len(runs), with_chance, with_interval)]
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}", ""])


def _legend(section: Section) -> str:
    shares = any(row.like.unit == "share" for row in section.rows)
    parts = [r"Shares in percent, 95\,\% intervals in brackets." if shares else r"95\,\% intervals in brackets."]
    if any(row.marked for row in section.rows):
        parts.append("Bold: the best, and what is not shown to be worse than it.")
    return " ".join(parts)


def _latex_group(group: Group, runs: int, with_chance: bool, with_interval: bool) -> Iterator[str]:
    columns = 1 + with_chance + runs
    yield r"\midrule"
    yield f"\\multicolumn{{{columns}}}{{l}}{{\\emph{{{escaped(group.title)}}}}} \\\\"
    if group.note:
        yield f"\\multicolumn{{{columns}}}{{l}}{{\\scriptsize {escaped(group.note)}}} \\\\"
    if len(group.rows) > LONGEST_LATEX_GROUP:
        yield f"\\multicolumn{{{columns}}}{{l}}{{{len(group.rows)} metrics: see the CSV file}} \\\\"
        return
    for row in group.rows:
        chance = "" if row.like.chance is None else escaped(shown(row.like.chance, row.like.unit))
        label = escaped(row.label)
        label = f"{{}}{label}" if label.startswith(("[", "*")) else label  # else an argument of the line break before
        cells = [_latex_cell(row, row.cells.get(i), with_interval) for i in range(runs)]
        yield " & ".join([label, *([chance] if with_chance else []), *cells]) + r" \\"


def _latex_cell(row: Row, cell: Cell | None, with_interval: bool) -> str:
    if cell is None:
        return "--"
    value, unit = cell.value, row.like.unit
    text = escaped(shown(value.value, unit))
    if cell.marked:
        text = f"\\textbf{{{text}}}"
    if value.deviation is not None:
        return f"{text} $\\pm$ {escaped(shown(value.deviation, unit))}"
    if value.low is None or value.high is None or not with_interval:
        return text
    low, high = (escaped(shown(bound, unit)) for bound in (value.low, value.high))
    return f"{text} {{\\scriptsize [{low}, {high}]}}"


def escaped(text: str) -> str:
    """Text as LaTeX prints it, on one line, in ASCII: accents as commands, what has none by its code point."""
    return "".join(SPECIAL.get(c) or _in_ascii(c) for c in " ".join(text.split()))


def _in_ascii(character: str) -> str:
    if " " <= character <= "~":
        return character
    letter, *accents = list(normalize("NFD", character))
    if letter.isascii() and letter.isalpha() and len(accents) == 1 and accents[0] in ACCENTS:
        return f"\\{ACCENTS[accents[0]]}{{{letter}}}"
    return f"\\texttt{{U+{ord(character):04X}}}"
