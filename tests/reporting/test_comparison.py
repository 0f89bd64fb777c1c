"""Which runs are marked: the best and those not shown to be worse, and nobody where nothing is shown."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_folders import Embeddings, measured_mean, retrieval_result, save_model, save_result

from modstruct.evaluation.result import Curve, Result, Value, share
from modstruct.reporting.comparison import compare, differing_fields, group_seeds
from modstruct.reporting.loading import Evaluation, load_evaluations

RANDOM = np.random.default_rng(0)
DIFFICULTY = RANDOM.random(400)


def row_of(tmp_path, results: list[dict], metric: str = "zero_shot"):
    """One row of runs that are given as the arguments of save_result."""
    folders = [tmp_path / f"run-{i}" for i in range(len(results))]
    for i, (folder, result) in enumerate(zip(folders, results, strict=True)):
        save_model(folder, f"run-{i}")
        save_result(folder, "shapes", metric, **result)
    ((row,),) = ([*section.rows] for section in compare(load_evaluations(folders)))
    return row


def with_outcomes(right: np.ndarray, **more) -> dict:
    return {"values": {"top_1": measured_mean(right)}, "outcomes": {"top_1": right}} | more


def marked(row) -> list[bool]:
    return [cell.marked for cell in row.cells.values()]


def test_paired_runs_that_differ_little_are_distinguished_where_intervals_overlap(tmp_path):
    worse, better = DIFFICULTY < 0.50, DIFFICULTY < 0.54
    row = row_of(tmp_path, [with_outcomes(worse), with_outcomes(better)])
    low, high = row.cells.values()
    assert low.value.high > high.value.low
    assert row.test == "paired"
    assert marked(row) == [False, True]
    assert low.lead.difference == pytest.approx(better.mean() - worse.mean())


def test_the_best_and_what_is_not_shown_to_be_worse_are_marked(tmp_path):
    near = DIFFICULTY < 0.6
    near[:2] = ~near[:2]
    row = row_of(tmp_path, [with_outcomes(DIFFICULTY < 0.6), with_outcomes(near), with_outcomes(DIFFICULTY < 0.4)])
    assert marked(row) == [True, True, False]


def test_nothing_is_marked_where_no_run_is_shown_to_be_worse(tmp_path):
    right = DIFFICULTY < 0.5
    row = row_of(tmp_path, [with_outcomes(right), with_outcomes(right)])
    assert row.test == "paired"
    assert marked(row) == [False, False]
    assert [cell.best for cell in row.cells.values()] == [True, True]


def test_other_data_are_never_compared(tmp_path):
    results = [with_outcomes(DIFFICULTY < 0.9), with_outcomes(DIFFICULTY < 0.1, fingerprint="other")]
    row = row_of(tmp_path, results)
    assert row.test is None
    assert marked(row) == [False, False]
    (section,) = compare(load_evaluations([tmp_path / "run-0", tmp_path / "run-1"]))
    assert "Not the same data" in section.groups[0].note


def test_outcomes_of_other_rows_or_another_metric_are_not_paired(tmp_path):
    first, second = DIFFICULTY < 0.9, DIFFICULTY < 0.1
    rows = np.arange(400)
    others = [
        {"outcomes": {"top_1": second, "row": rows + 1}},
        {"outcomes": {"top_1": second[:-1], "row": rows[:-1]}},
        {"outcomes": {"top_1": ~second, "row": rows}},  # the mean is not the metric
    ]
    for number, other in enumerate(others):
        good = with_outcomes(first, outcomes={"top_1": first, "row": rows})
        row = row_of(tmp_path / str(number), [good, with_outcomes(second) | other])
        assert row.test == "intervals"
        assert marked(row) == [True, False]


def test_rows_of_one_group_count_once(tmp_path):
    """Ten copies of 20 independent rows are no more evidence than the 20."""
    groups = np.repeat(np.arange(20), 10)
    worse, better = (np.repeat(np.arange(20) < n, 10) for n in (10, 13))
    alone = [with_outcomes(worse), with_outcomes(better)]
    assert marked(row_of(tmp_path / "alone", alone)) == [False, True]
    grouped = [with_outcomes(right, outcomes={"top_1": right, "group": groups}) for right in (worse, better)]
    assert marked(row_of(tmp_path / "grouped", grouped)) == [False, False]


def test_without_outcomes_intervals_decide_and_without_intervals_nothing_does(tmp_path):
    def metric(value, half=None):
        interval = {} if half is None else {"low": value - half, "high": value + half}
        return {"values": {"top_1": share(value, **interval)}}

    row = row_of(tmp_path / "apart", [metric(0.5, 0.05), metric(0.58, 0.05), metric(0.7, 0.05)])
    assert (row.test, marked(row)) == ("intervals", [False, False, True])
    row = row_of(tmp_path / "overlap", [metric(0.5, 0.05), metric(0.58, 0.05)])
    assert (row.test, marked(row)) == ("intervals", [False, False])
    row = row_of(tmp_path / "none", [metric(0.5), metric(0.9)])
    assert (row.test, marked(row), row.cells[1].best) == (None, [False, False], True)


def test_a_run_without_the_metric_leaves_its_place_empty(tmp_path):
    row = row_of(tmp_path, [with_outcomes(DIFFICULTY < 0.5), with_outcomes(DIFFICULTY < 0.9)])
    save_model(tmp_path / "empty", "empty")
    save_result(tmp_path / "empty", "scenes", "structure", {"alignment": Value(1.0)})
    sections = compare(load_evaluations([tmp_path / "run-0", tmp_path / "empty", tmp_path / "run-1"]))
    assert [section.metric for section in sections] == ["zero_shot", "structure"]
    (with_gap,) = sections[0].rows
    assert with_gap.cells == {0: row.cells[0], 2: row.cells[1]}


def test_the_direction_is_what_the_result_declares(tmp_path):
    def of(value, better):
        return {"values": {"ece": Value(value, "error", "share", better, low=value - 0.01, high=value + 0.01)}}

    for better, expected in ((False, [True, False]), (True, [False, True]), (None, [False, False])):
        row = row_of(tmp_path / str(better), [of(0.1, better), of(0.3, better)])
        assert marked(row) == expected


def seeds(tmp_path, methods: dict[str, list[np.ndarray]], **more):
    """Runs by method and seed, each with its outcomes."""
    folders = []
    for method, outcomes in methods.items():
        for seed, right in enumerate(outcomes):
            folders.append(tmp_path / f"{method}-s{seed}")
            save_model(folders[-1], f"{method}-s{seed}/step-9", seed, method)
            save_result(folders[-1], "shapes", "zero_shot", **with_outcomes(right, **more))
    return load_evaluations(folders)


def test_seeds_of_one_method_become_a_column_of_means_with_deviations(tmp_path):
    drawn = [most > DIFFICULTY for most in (0.5, 0.52, 0.54)]
    curve = {"c": Curve([1.0, 2.0], [0.1, 0.2], chosen=1.0)}
    runs = group_seeds(seeds(tmp_path, {"clip": drawn, "gc": [drawn[0]]}, curves=curve))
    assert [(run.name, [seed.name for seed in run.seeds]) for run in runs] == [
        ("clip", ["clip-s0", "clip-s1", "clip-s2"]),
        ("gc-s0", []),
    ]
    result = runs[0].results["shapes", "zero_shot"]
    value, means = result.values["top_1"], [right.mean() for right in drawn]
    assert (value.value, value.deviation) == (pytest.approx(np.mean(means)), pytest.approx(np.std(means, ddof=1)))
    assert value.low is value.high is None
    np.testing.assert_allclose(result.outcomes["top_1"], np.mean(drawn, 0))
    assert result.curves["c"].low == pytest.approx([0.1, 0.2])
    assert result.curves["c"].chosen is None


def test_the_means_of_seeds_are_compared_by_the_paired_test(tmp_path):
    methods = {"clip": [DIFFICULTY < 0.5, DIFFICULTY < 0.52], "gc": [DIFFICULTY < 0.6, DIFFICULTY < 0.62]}
    ((row,),) = ([*section.rows] for section in compare(group_seeds(seeds(tmp_path, methods))))
    assert row.test == "paired"
    assert marked(row) == [False, True]


def test_checkpoints_of_one_run_and_other_recipes_are_no_seeds(tmp_path):
    for folder, name, seed, method in (("a", "m/step-1", 0, "x"), ("b", "m/step-2", 0, "x"), ("c", "m/step-2", 1, "y")):
        save_model(tmp_path / folder, name, seed, method)
        save_result(tmp_path / folder, "shapes", "zero_shot", {"top_1": Value(0.5)})
    save_model(tmp_path / "d", "ViT-B-32", recipe=None, checkpoint=None, open_clip={"name": "ViT-B-32"})
    save_result(tmp_path / "d", "shapes", "zero_shot", {"top_1": Value(0.5)})
    runs = load_evaluations([tmp_path / folder for folder in "abcd"])
    assert group_seeds(runs) == runs


def test_what_recipes_differ_in_is_named(tmp_path):
    runs = seeds(tmp_path, {"clip": [DIFFICULTY < 0.5, DIFFICULTY < 0.52], "gc": [DIFFICULTY < 0.6]})
    save_model(tmp_path / "d", "ViT-B-32", recipe=None, checkpoint=None, open_clip={"name": "ViT-B-32"})
    save_model(tmp_path / "e", "older", recipe="output: e\nlosses: {method: gc}\n")
    for folder in "de":
        save_result(tmp_path / folder, "shapes", "zero_shot", {"top_1": Value(0.5)})
    theirs, older = load_evaluations([tmp_path / folder for folder in "de"])
    clip, gc = group_seeds(runs)
    method, seed = ("losses.method", ['"clip"', '"gc"', ""]), ("train.seed", ["0, 1", "0", ""])
    assert differing_fields([clip, gc, theirs]) == dict([method, seed])
    assert differing_fields([clip, gc, older]) == {"losses.method": ['"clip"', '"gc"', '"gc"']}
    assert differing_fields([theirs]) == differing_fields([theirs, clip]) == differing_fields([gc, older]) == {}


def test_seeds_measured_on_other_data_are_not_compared(tmp_path):
    runs = seeds(tmp_path, {"clip": [DIFFICULTY < 0.5, DIFFICULTY < 0.52], "gc": [DIFFICULTY < 0.9]})
    save_result(tmp_path / "clip-s1", "shapes", "zero_shot", **with_outcomes(DIFFICULTY < 0.52, fingerprint="other"))
    runs = load_evaluations([run.folder for run in runs])
    (section,) = compare(group_seeds(runs))
    assert "Not the same data" in section.groups[0].note


def test_results_of_equal_models_differ_nowhere(tmp_path):
    for folder in ("a", "b"):
        save_model(tmp_path / folder, folder)
        retrieval_result(tmp_path / folder, "scenes", Embeddings(60, 0.5, 0.5, seed=1))
    (section,) = compare(load_evaluations([tmp_path / "a", tmp_path / "b"]))
    assert not any(row.marked for row in section.rows)
    assert {row.test for row in section.rows} == {"paired", None}


def test_published_results_stand_beside_without_keeping_ours_from_being_compared(tmp_path):
    row = row_of(tmp_path, [with_outcomes(DIFFICULTY < 0.5), with_outcomes(DIFFICULTY < 0.6)])
    assert marked(row) == [False, True]
    published = Result("zero_shot", "shapes", {"top_1": share(0.9)})
    theirs = Evaluation(
        tmp_path, "theirs", {"name": "theirs", "published": "a.csv"}, {("shapes", "zero_shot"): published}
    )
    ours = load_evaluations([tmp_path / "run-0", tmp_path / "run-1"])
    (section,) = compare([theirs, *ours])
    (beside,) = section.rows
    assert section.groups[0].note is None
    assert (beside.test, marked(beside)) == ("paired", [False, False, True])
    assert [cell.best for cell in beside.cells.values()] == [False, False, True]
