"""An evaluation that version 0.1.0 wrote is measured to the same numbers, and reported."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from modstruct.evaluation.result import Result
from modstruct.reporting.report import write_report

SCRIPT = Path(__file__).parents[2] / "launch_scripts" / "evaluate.py"
WRITTEN = Path(__file__).parent / "written_by_0.1.0" / "evaluation"
METRICS = ("retrieval", "zero_shot", "structure")


@pytest.fixture
def older(tmp_path, monkeypatch) -> Path:
    """A copy of the evaluation; its set is made again in tmp_path/cache, as its recipe says."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(WRITTEN, tmp_path / "evaluation"))


def measure(folder: Path, monkeypatch, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "measure", str(folder), "--metrics", *METRICS, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def result(folder: Path, metric: str) -> dict:
    return json.loads((folder / "results" / "scenes_colour" / f"{metric}.json").read_text())


def test_measured_again_it_has_the_same_numbers(older, monkeypatch, capsys):
    measure(older, monkeypatch, "--again", "true")
    assert "measured before" not in capsys.readouterr().out
    for metric in METRICS:
        now, before = (
            Result.load(folder / "results" / "scenes_colour" / f"{metric}.json") for folder in (older, WRITTEN)
        )
        assert now.command != before.command
        assert (now.embeddings, now.fingerprint) == (before.embeddings, before.fingerprint)
        assert now.rows.items() >= {name: now.rows.get(name) for name in before.rows.keys() & now.rows.keys()}.items()
        for name, value in before.values.items():
            for kind in ("value", "chance"):
                if (number := getattr(value, kind)) is not None:
                    assert getattr(now.values[name], kind) == pytest.approx(number, rel=1e-6, abs=1e-9), (metric, name)
            if value.low is not None and value.low < value.high:  # intervals may be found in another way
                width = value.high - value.low
                assert now.values[name].low == pytest.approx(value.low, abs=0.3 * width), (metric, name)
                assert now.values[name].high == pytest.approx(value.high, abs=0.3 * width), (metric, name)
        for name, curve in before.curves.items():
            assert now.curves[name].y == pytest.approx(curve.y, rel=1e-6, abs=1e-9), (metric, name)


def test_its_results_count_as_measured(older, monkeypatch, capsys):
    measure(older, monkeypatch)
    assert capsys.readouterr().out.count("measured before") == len(METRICS)
    assert all(result(older, metric) == result(WRITTEN, metric) for metric in METRICS)


def test_it_is_reported(older, tmp_path):
    write_report([older], tmp_path / "report")
    page = (tmp_path / "report.html").read_text()
    assert "scenes_colour" in page
    assert "data:image/jpeg" in page, "the retrieved examples are missing"
    with (tmp_path / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} >= {*METRICS, "information"}
