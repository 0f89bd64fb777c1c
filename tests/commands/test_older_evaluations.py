"""An evaluation that version 0.1.0 wrote is measured to the same numbers, and reported."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

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


def numbers(node, name: str = "") -> dict[str, float]:
    """Every number of a nested result, by its path."""
    if isinstance(node, (int, float)):
        return {name: node}
    items = node.items() if isinstance(node, dict) else enumerate(node)
    return {path: value for key, inner in items for path, value in numbers(inner, f"{name}/{key}").items()}


def test_measured_again_it_has_the_same_numbers(older, monkeypatch, capsys):
    measure(older, monkeypatch, "--again", "true")
    assert "measured before" not in capsys.readouterr().out
    for metric in METRICS:
        now, before = result(older, metric), result(WRITTEN, metric)
        assert now["command"] != before["command"]
        assert now["embeddings"] == before["embeddings"]
        for part in ("figures", "curves", "rows"):
            assert numbers(now[part]) == pytest.approx(numbers(before[part]), rel=1e-6, abs=1e-9), (metric, part)


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
