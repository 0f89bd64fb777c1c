"""Values for readers and other programs: numbers as they are printed, CSV whatever texts hold, and LaTeX.

LaTeX's tables fit a page of two columns, and texts of others compile whatever they hold. Rows are runs. A table whose
columns do not fit is cut into blocks below each other, one of more rows than a page holds into several tables; what is
still too wide is scaled down.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from unicodedata import normalize

from modstruct.errors import printable
from modstruct.evaluation.result import Unit, Value
from modstruct.reporting.comparison import Group, Section
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


PACKAGES = r"\usepackage{booktabs,graphicx,xcolor}"
WIDE, NARROW = 125, 56
"""Characters across a page and across a column, at \\footnotesize."""
ROWS, LINES = 20, 44
"""Rows of a block, and lines of a table, that a page holds."""
UNBROKEN = 22
"""Characters of a word before a line may break in it."""
FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\u2192": r"$\to$",
    "\u2212": "$-$", "\u2013": "--", "\u2014": "---", "\u00b7": r"$\cdot$", "\u2026": r"\dots{}", "<": "$<$",
    ">": "$>$", "|": "$|$", "\u2018": "`", "\u2019": "'", "\u201c": "``", "\u201d": "''", "\u00d7": r"$\times$",
    "\u00b1": r"$\pm$", "\u00b0": r"$^\circ$", "\u03bc": r"$\mu$", "\u00b5": r"$\mu$", "\u00df": r"\ss{}",
    "\u00e6": r"\ae{}", "\u00c6": r"\AE{}", "\u00f8": r"\o{}", "\u00d8": r"\O{}", "\u0142": r"\l{}",
    "\u0141": r"\L{}",
} | {c: f"\\{c}" for c in "&%$#_{}"}  # fmt: skip
ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0323": "d", "\u0327": "c", "\u0328": "k",
}  # fmt: skip
"""Combining characters -> LaTeX's commands."""


@dataclass(frozen=True)
class Line:
    """A row of a table. name: text; cells: LaTeX; below: LaTeX that stands small under the cells; ruled: whether a rule
    stands above it."""

    name: str
    cells: Sequence[str]
    below: Sequence[str]
    grey: bool = False
    ruled: bool = False


@dataclass(frozen=True)
class Block:
    """Lines under one head. head, title: LaTeX."""

    head: Sequence[str]
    lines: Sequence[Line]
    title: str = ""

    def widths(self) -> list[int]:
        """Characters of the names and of each column with the space before it, about."""
        texts = [self.head, *(of for line in self.lines for of in (line.cells, line.below))]
        columns = ([len(re.sub(r"\\[a-zA-Z]+|[{}$\\]", "", text)) for text in of] for of in zip(*texts, strict=True))
        return [max(len(line.name) for line in self.lines), *(2 + max(column) for column in columns)]

    def cut(self) -> Iterator[Block]:
        """The block in parts that a page holds, by columns and by rows."""
        name, *widths = self.widths()
        starts, used = [0], name
        for i, width in enumerate(widths):
            if used + width > WIDE and i > starts[-1]:
                starts, used = [*starts, i], name
            used += width
        for first, last in pairwise([*starts, len(widths)]):
            part = slice(first, last)
            lines = [replace(line, cells=line.cells[part], below=line.below[part]) for line in self.lines]
            for top in range(0, len(lines), ROWS):
                yield Block(self.head[part], lines[top : top + ROWS], "" if first or top else self.title)

    def latex(self) -> Iterator[str]:
        if self.title:
            yield f"{{\\raggedright {self.title}\\par}}\\smallskip"
        yield f"{FITTED}\n\\begin{{tabular}}{{l{'c' * len(self.head)}}}\n\\toprule"
        yield " & ".join(["", *self.head]) + r" \\"
        for i, line in enumerate(self.lines):
            cells = [escaped(line.name), *line.cells]
            cells = [f"\\textcolor{{gray}}{{{cell}}}" for cell in cells] if line.grey else cells
            # {}: else a name that begins with [ or * would be an argument of the line break before it.
            yield (r"\midrule {}" if line.ruled or not i else "{}") + " & ".join(cells) + r" \\"
            if any(line.below):
                yield " & ".join(["", *(f"\\scriptsize {text}" if text else "" for text in line.below)]) + r" \\"
        yield "\\bottomrule\n\\end{tabular}}\\par\\smallskip"


def table(label: str, caption: str, blocks: Sequence[Block]) -> str:
    """Blocks as one table, or several where they are longer than a page. label, caption: texts."""
    parts, lines = [list[Block]()], 0
    for block in (part for whole in blocks for part in whole.cut()):
        size = 3 + sum(1 + any(line.below) for line in block.lines)
        if parts[-1] and lines + size > LINES:
            parts, lines = [*parts, []], 0
        parts[-1].append(block)
        lines += size
    made = []
    for i, part in enumerate(parts):
        kind = "table" if max(sum(block.widths()) for block in part) <= NARROW else "table*"
        name = f"\\label{{tab:{re.sub('[^a-z0-9]+', '-', label.lower())}}}" if not i else ""
        made += [f"\\begin{{{kind}}}[tp]", r"\centering\footnotesize\sloppy\setlength{\tabcolsep}{4pt}"]
        made += [f"\\caption{{{escaped(caption)}{' (Continued.)' if i else ''}}}{name}"]
        made += [text for block in part for text in block.latex()] + [f"\\end{{{kind}}}", ""]
    return "\n".join(made)


def latex_tables(sections: Sequence[Section], runs: Sequence[Evaluation], with_interval: bool = True) -> str:
    """A table for each section: runs as rows, metrics as columns; marked values are bold, intervals small below."""
    parts = [f"% Tables of a modstruct report. The preamble needs {PACKAGES}.\n"]
    for section in sections:
        legend = f"{section.title}. Shares in percent{', 95 % intervals below' if with_interval else ''}."
        if any(row.marked for row in section.rows):
            legend += " Bold: the best, and what is not shown to be worse than it."
        if any(cell.value.deviation is not None for row in section.rows for cell in row.cells.values()):
            legend += " ±: standard deviation over draws or seeds."
        parts.append(table(section.metric, legend, [_of_group(group, runs, with_interval) for group in section.groups]))
    return "\n\\clearpage\n".join(parts)


def _of_group(group: Group, runs: Sequence[Evaluation], with_interval: bool) -> Block:
    title = f"\\emph{{{escaped(group.title)}}}{f' -- {escaped(group.note)}' if group.note else ''}"
    rows = group.rows if len(group.rows) <= LONG_GROUP else ()
    if not rows:
        title += f" -- {len(group.rows)} metrics: see the CSV file"
    head = [escaped(row.label) + (r"\,$\downarrow$" if row.like.higher_is_better is False else "") for row in rows]
    lines = []
    for i in (i for i in range(len(runs)) if any(i in row.cells for row in group.rows)):
        cells, below = [], []
        for row in rows:
            found = row.cells.get(i)
            number, deviation, interval = texts(found.value if found else None, row.like.unit)
            cells.append(cell(number, deviation, r"\textbf{%s}" if found and found.marked else "%s"))
            below.append(escaped(interval) if with_interval else "")
        lines.append(Line(runs[i].name, cells, below))
    chances = ["" if (c := row.like.chance) is None else escaped(shown(c, row.like.unit)) for row in rows]
    if any(chances):
        lines.append(Line("chance", chances, [""] * len(rows), grey=True, ruled=True))
    return Block(head, lines, title)


def cell(number: str, deviation: str, mark: str = "%s") -> str:
    """A number, marked by a LaTeX command with %s, with its deviation."""
    return mark % escaped(number) + (f"{{\\scriptsize\\,$\\pm$\\,{escaped(deviation)}}}" if deviation else "")


def escaped(text: str) -> str:
    """Text as LaTeX prints it, on one line, in ASCII: accents as commands, what has none by its code point. A long word
    may be broken."""
    made, since = [], 0
    for character in " ".join(text.split()):
        latex = SPECIAL.get(character) or _in_ascii(character)
        since = 0 if latex == " " else since + (7 if "texttt" in latex else 1)
        if since > UNBROKEN:
            made.append(r"\allowbreak{}")
            since = 0
        made.append(latex)
    return "".join(made)


def _in_ascii(character: str) -> str:
    if " " <= character <= "~":
        return character
    letter, *accents = list(normalize("NFD", character))
    if letter.isascii() and letter.isalpha() and len(accents) == 1 and accents[0] in ACCENTS:
        return f"\\{ACCENTS[accents[0]]}{{{letter}}}"
    return f"\\texttt{{U+{ord(character):04X}}}"
