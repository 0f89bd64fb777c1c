"""Three runs that were measured once for all tests of this folder; they are only read."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_folders import write_run

from modstruct.reporting.report import ReportFiles, write_report


@pytest.fixture(scope="session")
def run_folders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("evaluations")
    return [
        write_run(folder / "clip", "clip", noise=0.6, gap=0.9, skill=0.45, seed=1),
        write_run(folder / "clip_sep", "clip_sep", noise=0.52, gap=0.7, skill=0.5, seed=2),
        write_run(folder / "clip_gc", "clip_gc", noise=0.42, gap=0.3, skill=0.65, seed=3),
    ]


@pytest.fixture(scope="session")
def report(run_folders, tmp_path_factory) -> ReportFiles:
    return write_report(run_folders, tmp_path_factory.mktemp("report") / "report.html")
