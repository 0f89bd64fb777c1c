"""Evaluation folders are read whole or refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from evaluation_folders import save_model, save_result

from modstruct.reporting.loading import load_evaluation, load_evaluations
from modstruct.reporting.report import report


def test_metrics_are_read_by_their_names(tmp_path):
    save_model(tmp_path, "clip")
    metrics = {
        "first": {"top_1": {"value": 0.5, "chance": 0.1, "low": 0.4, "high": 0.6, "rows": 7}},
        "gap": {"value": -1},
    }
    save_result(tmp_path, "shapes", "zero_shot", metrics, {"first/top_1": np.array([1, 0])})
    result = load_evaluation(tmp_path).results["shapes", "zero_shot"]
    assert set(result.metrics) == {("first", "top_1"), ("gap",)}
    metric = result.metrics["first", "top_1"]
    assert (metric.value, metric.chance, metric.low, metric.high, metric.rows) == (0.5, 0.1, 0.4, 0.6, 7)
    assert result.outcomes["first/top_1"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "retrieval.json"),
        ("[1]", "list"),
        ("{}", '"figures" is missing'),
        ('{"figures": {"a": {"value": NaN}}}', "NaN"),
        ('{"figures": {"a": {"value": 1e999}}}', "value"),
        ('{"figures": {"a": {"b": 3}}}', "a/b"),
        ('{"figures": {"a": {"value": "high"}}}', "high"),
        ('{"figures": {"a": {"value": 1, "low": true}}}', "low"),
        ('{"figures": {"a": {"value": 1}}, "curves": {"x": [1, null]}}', "'x'"),
        ("[" * 100_000, "retrieval.json"),
    ],
)
def test_a_broken_result_is_refused_by_name(tmp_path, content, named):
    save_model(tmp_path, "clip")
    path = save_result(tmp_path, "scenes", "retrieval", {"a": {"value": 1}})
    path.write_text(content)
    with pytest.raises(ValueError, match="measure this set again") as refused:
        load_evaluation(tmp_path)
    assert str(path) in str(refused.value)
    assert named in str(refused.value)


def test_broken_outcomes_are_refused_by_name_and_nothing_is_written(run_folders, tmp_path):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in run_folders[:2]]
    path = folders[1] / "results/scenes/retrieval.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"retrieval\.npz"):
        report(folders, tmp_path / "out" / "report")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        load_evaluations([])
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        load_evaluations([tmp_path])
    save_model(tmp_path, "clip")
    with pytest.raises(FileNotFoundError, match="no results"):
        load_evaluations([tmp_path])
    save_result(tmp_path, "scenes", "retrieval", {"a": {"value": 1}})
    with pytest.raises(ValueError, match="named twice"):
        load_evaluations([tmp_path, tmp_path / "results" / ".."])
    (tmp_path / "model.json").write_text(json.dumps({"name": 3}))
    with pytest.raises(ValueError, match="name"):
        load_evaluations([tmp_path])


def test_models_of_one_name_are_distinguished_by_their_folders(tmp_path):
    for folder in ("a", "b"):
        save_model(tmp_path / folder, "clip")
        save_result(tmp_path / folder, "scenes", "retrieval", {"a": {"value": 1}})
    names = [run.name for run in load_evaluations([tmp_path / "a", tmp_path / "b"])]
    assert len(set(names)) == 2


def test_results_of_the_adamw_probe_are_read_by_their_former_name_too(tmp_path):
    save_model(tmp_path, "clip")
    save_result(tmp_path, "shapes", "linear_probe_sgd", {"top_1": {"value": 0.5}})
    read = load_evaluation(tmp_path).results["shapes", "linear_probe_adamw"]
    assert read.metrics["top_1",].value == 0.5
    save_result(tmp_path, "shapes", "linear_probe_adamw", {"top_1": {"value": 0.6}})
    read = load_evaluation(tmp_path).results["shapes", "linear_probe_adamw"]
    assert read.metrics["top_1",].value == 0.6
