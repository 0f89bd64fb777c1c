"""One HTML page of one or several evaluations side by side, with its tables as CSV, LaTeX and JSON, and its plots.

python launch_scripts/evaluate.py report evaluations/scenes evaluations/scenes-gc --out reports/scenes
python launch_scripts/evaluate.py report evaluations/* --out reports/paper --tables zero_shot linear_probe --paper_rows

--tables makes the paper's tables instead: methods as rows, sets as columns, seeds of a method aggregated; fusion takes
fine-tuned runs. They are printed, and written as Markdown, LaTeX, CSV and, with pdflatex or tectonic, PDF. --beside
sets published results of other models, as LAION's CLIP_benchmark writes them, beside ours in either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from modstruct.cli import is_first_process, run

USAGE = "python launch_scripts/evaluate.py report EVALUATION… --out FILE [--tables TABLE …]"
TABLES = ("zero_shot", "distribution_shift", "linear_probe", "fusion")


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, usage=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, help="Folders of evaluations, measured, or fine-tuned runs.")
    files = "Writes OUT.html, OUT.csv, …, or OUT-tables.tex, …; in a folder that is there report.html, …."
    parser.add_argument("--out", type=Path, required=True, help=files)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[], help="The paper's T1 to T4.")
    parser.add_argument("--sets", nargs="+", default=[], help="Their columns (default: those of the paper's measured).")
    parser.add_argument("--paper_rows", action="store_true", help="What the paper printed as grey rows.")
    parser.add_argument("--beside", nargs="+", type=Path, default=[], help="JSON and CSV files of CLIP_benchmark.")
    parser.add_argument("--intervals", action=argparse.BooleanOptionalAction, help="95 %% intervals (page: on).")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(words)

    def write() -> None:
        if options.tables:
            from modstruct.reporting.paper_tables import Options, load_runs, write_paper_tables

            shown = Options(tuple(options.sets), options.paper_rows, bool(options.intervals))
            runs = load_runs(options.folders, options.beside)
            print(write_paper_tables(options.tables, runs, options.out, shown))
        else:
            from modstruct.reporting.report import write_report  # after the parsing: --help needs no torch

            print(write_report(options.folders, options.out, options.intervals is not False, options.beside))

    if is_first_process():
        run(write)
