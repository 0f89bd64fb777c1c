"""Evaluation folders are read whole or refused by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from evaluation_folders import save_model, save_older, save_result

from modstruct.evaluation.result import Value
from modstruct.reporting.loading import load_evaluation, load_evaluations, short_names, stem_of
from modstruct.reporting.report import write_report


def test_results_are_read_with_their_outcomes(tmp_path):
    save_model(tmp_path, "clip")
    values = {"first/top_1": Value(0.5, "top-1", "share", True, 0.1, 0.4, 0.6, rows=2), "gap": Value(-1.0)}
    save_result(tmp_path, "shapes", "zero_shot", values, outcomes={"first/top_1": np.array([1, 0])})
    result = load_evaluation(tmp_path).results["shapes", "zero_shot"]
    assert result.values == values
    assert result.outcomes["first/top_1"].tolist() == [1, 0]


def test_results_without_a_schema_get_units_directions_and_labels_of_todays_metrics(tmp_path):
    save_model(tmp_path, "clip")
    recall = {"recall_at_5": {"value": 0.5, "chance": 0.1, "low": 0.4, "high": 0.6, "rows": 7}}
    figures = {"text_to_image": recall | {"median_rank": {"value": 3, "chance": 50.0}}}
    curves = {"k": [1.0, 2.0], "text_to_image/recall": [0.3, 0.4]}
    save_older(tmp_path, "scenes", "retrieval", figures, curves=curves, rows={"image": 9, "used": {"a": 1}})
    top = {"top_1": {"value": 0.5, "rows": 9}, "top_1_deviation": {"value": 0.02, "rows": 3}}
    curves = {"shots": [1.0, 2.0], "top_1": [0.4, 0.5], "top_1_deviation": [0.1, 0.2], "shots_2/top_1": [0.4, 0.6]}
    save_older(tmp_path, "scenes", "few_shot", {"shots_2": top}, curves=curves)
    save_older(tmp_path, "scenes", "information", {"shape": {"gap": {"value": 0.3}}})
    save_older(tmp_path, "scenes", "linear_probe", {"top_1": {"value": 0.5}, "weight_decay": {"value": 0.1}})
    save_older(tmp_path, "scenes", "unheard_of", {"a": {"value": 0.3}})
    results = {metric: result for (_, metric), result in load_evaluation(tmp_path).results.items()}
    of = results["retrieval"]
    assert of.values["text_to_image/recall_at_5"] == Value(0.5, "R@5", "share", True, 0.1, 0.4, 0.6, rows=7)
    assert of.values["text_to_image/median_rank"] == Value(3, "median rank", "rank", False, 50.0)
    assert of.groups == {"text_to_image": "text → image"}
    assert (of.rows, of.fingerprint) == ({"image": 9}, "data-of-scenes")
    curve = of.curves["text_to_image/recall"]
    assert (curve.x, curve.y, curve.x_label, curve.unit) == ([1.0, 2.0], [0.3, 0.4], "K", "share")
    few = results["few_shot"]
    assert few.values == {"shots_2/top_1": Value(0.5, "top-1", "share", True, deviation=0.02, rows=9)}
    assert few.curves.keys() == {"top_1"}
    assert few.curves["top_1"].low == pytest.approx([0.3, 0.3])
    assert results["information"].values["shape/gap"] == Value(0.3, "gap", "nats")
    assert results["linear_probe"].values["weight_decay"] == Value(0.1, "weight decay")
    assert results["unheard_of"].values["a"] == Value(0.3, "a")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "retrieval.json"),
        ("[1]", "list"),
        ("{}", '"figures" is missing'),
        ('{"figures": {"a": {"value": NaN}}}', "NaN"),
        ('{"figures": {"a": {"value": 1e999}}}', "value"),
        ('{"figures": {"a": {"b": 3}}}', "a/b"),
        ('{"schema": 99}', "99"),
        ('{"schema": 3, "metric": "a", "set": "b", "values": {"c": {"value": "high"}}}', "values/c"),
        ('{"figures": {"a": {"value": "high"}}}', "high"),
        ('{"figures": {"a": {"value": 1, "low": true}}}', "low"),
        ('{"figures": {"a/recall": {"value": 1}}, "curves": {"a/recall": [1, null]}}', "a/recall"),
        ("[" * 100_000, "retrieval.json"),
    ],
)
def test_a_broken_result_is_refused_by_name(tmp_path, content, named):
    save_model(tmp_path, "clip")
    path = save_older(tmp_path, "scenes", "retrieval", {"a": {"value": 1}})
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
        write_report(folders, tmp_path / "out" / "report")
    assert not (tmp_path / "out").exists()


def test_files_of_a_report_begin_with_out_or_lie_in_the_folder_that_is_there(tmp_path):
    assert stem_of(tmp_path / "mine") == stem_of(tmp_path / "mine.html") == tmp_path / "mine"
    assert stem_of(f"{tmp_path}/") == tmp_path / "report"


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        load_evaluations([])
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        load_evaluations([tmp_path])
    save_model(tmp_path, "clip")
    with pytest.raises(FileNotFoundError, match="no results"):
        load_evaluations([tmp_path])
    save_older(tmp_path, "scenes", "retrieval", {"a": {"value": 1}})
    with pytest.raises(ValueError, match="named twice"):
        load_evaluations([tmp_path, tmp_path / "results" / ".."])
    (tmp_path / "model.json").write_text(json.dumps({"name": 3}))
    with pytest.raises(ValueError, match="name"):
        load_evaluations([tmp_path])


def test_models_of_one_name_are_distinguished_by_their_folders(tmp_path):
    for folder in ("a", "b"):
        save_model(tmp_path / folder, "clip")
        save_older(tmp_path / folder, "scenes", "retrieval", {"a": {"value": 1}})
    assert [run.name for run in load_evaluations([tmp_path / "a", tmp_path / "b"])] == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["clip/step-00000220", "clip_gc/step-00000220"], ["clip", "clip_gc"]),
        (["clip/step-00000110", "clip/step-00000220"], ["step-00000110", "step-00000220"]),
        (["scenes-clip-s0/step-1", "scenes-cyclip-s0/step-1"], ["clip", "cyclip"]),
        (["clip/step-110", "gc/step-220"], ["clip", "gc"]),
        (["alone/step-1"], ["alone"]),
        (["same", "same"], ["same", "same"]),
    ],
)
def test_short_names_leave_out_what_all_have_in_common(names, short):
    assert short_names(names) == short


def test_results_of_the_adamw_probe_are_read_by_their_former_name_too(tmp_path):
    save_model(tmp_path, "clip")
    save_older(tmp_path, "shapes", "linear_probe_sgd", {"top_1": {"value": 0.5}})
    read = load_evaluation(tmp_path).results["shapes", "linear_probe_adamw"]
    assert read.values["top_1"].value == 0.5
    save_result(tmp_path, "shapes", "linear_probe_adamw", {"top_1": Value(0.6)})
    read = load_evaluation(tmp_path).results["shapes", "linear_probe_adamw"]
    assert read.values["top_1"].value == 0.6
