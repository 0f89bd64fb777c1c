"""A report's three files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modstruct.files import atomic_write
from modstruct.reporting.comparison import compare
from modstruct.reporting.loading import load_evaluations
from modstruct.reporting.page import html_page
from modstruct.reporting.tables import csv_table, latex_tables


@dataclass(frozen=True)
class ReportFiles:
    html: Path
    csv: Path
    tex: Path


def write_report(folders: Sequence[str | Path], out: str | Path) -> ReportFiles:
    """Compare evaluation folders on one page, OUT.html, with the figures as OUT.csv and OUT.tex beside it.

    folders: one for each run, in the order of the columns. out: with or without ".html". All is made before the first
    file is written. Raises FileNotFoundError or ValueError naming the file that is missing or broken, and the remedy.
    """
    out = Path(out).expanduser()
    stem = out.with_suffix("") if out.suffix == ".html" else out
    runs = load_evaluations(folders)
    sections = compare(runs)
    contents = {
        "html": html_page(sections, runs),
        "csv": csv_table(sections, runs),
        "tex": latex_tables(sections, runs),
    }
    files = ReportFiles(**{kind: stem.with_name(f"{stem.name}.{kind}") for kind in contents})
    for kind, text in contents.items():
        with atomic_write(getattr(files, kind)) as file:
            file.write(text.encode("utf-8", errors="replace"))
    return files
