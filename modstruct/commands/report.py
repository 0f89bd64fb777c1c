"""One HTML page of one or several evaluations side by side, with its tables as CSV and LaTeX.

python launch_scripts/evaluate.py report evaluations/scenes evaluations/scenes-gc --out reports/scenes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from modstruct.cli import is_first_process, run

USAGE = "python launch_scripts/evaluate.py report EVALUATION… --out FILE"


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, usage=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, help="Folders of evaluations, measured.")
    parser.add_argument("--out", type=Path, required=True, help="Writes OUT.html, OUT.csv and OUT.tex.")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if is_first_process():
        from modstruct.reporting.report import write_report  # after the parsing: --help needs no torch

        run(lambda: print(write_report(options.folders, options.out)))
