"""Which runs are marked: the best and those not shown to be worse, and nobody where nothing is shown."""

from __future__ import annotations

import numpy as np
import pytest
from evaluation_folders import measured_mean, save_model, save_result

from modstruct.reporting.comparison import compare, holm
from modstruct.reporting.loading import load_evaluations
from modstruct.reporting.vocabulary import direction

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
    return {"metrics": {"top_1": measured_mean(right)}, "outcomes": {"top_1": right}} | more


def marked(row) -> list[bool]:
    return [cell.marked for cell in row.cells]


def test_paired_runs_that_differ_little_are_distinguished_where_intervals_overlap(tmp_path):
    worse, better = DIFFICULTY < 0.50, DIFFICULTY < 0.54
    row = row_of(tmp_path, [with_outcomes(worse), with_outcomes(better)])
    low, high = row.cells
    assert low.metric.high > high.metric.low
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
    assert [cell.best for cell in row.cells] == [True, True]


def test_other_data_are_never_compared(tmp_path):
    results = [with_outcomes(DIFFICULTY < 0.9), with_outcomes(DIFFICULTY < 0.1, source_fingerprint="other")]
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
        return {"metrics": {"top_1": {"value": value} | interval}}

    row = row_of(tmp_path / "apart", [metric(0.5, 0.05), metric(0.58, 0.05), metric(0.7, 0.05)])
    assert (row.test, marked(row)) == ("intervals", [False, False, True])
    row = row_of(tmp_path / "overlap", [metric(0.5, 0.05), metric(0.58, 0.05)])
    assert (row.test, marked(row)) == ("intervals", [False, False])
    row = row_of(tmp_path / "none", [metric(0.5), metric(0.9)])
    assert (row.test, marked(row), row.best) == (None, [False, False], 1)


def test_lower_is_better_for_ranks_and_structure_has_no_better(tmp_path):
    def metric(name, value):
        return {"metrics": {name: {"value": value, "low": value - 0.1, "high": value + 0.1}}}

    row = row_of(tmp_path / "rank", [metric("median_rank", 3), metric("median_rank", 9)], "retrieval")
    assert (row.best, row.share, marked(row)) == (0, False, [True, False])
    row = row_of(tmp_path / "gap", [metric("modality_gap", 0.3), metric("modality_gap", 0.9)], "structure")
    assert (row.better, row.share, marked(row)) == (0, False, [False, False])
    row = row_of(tmp_path / "new", [metric("surprise", 0.3), metric("surprise", 0.9)], "a_new_metric")
    assert (row.better, marked(row)) == (0, [False, False])


def test_a_run_without_the_metric_leaves_its_place_empty(tmp_path):
    row = row_of(tmp_path, [with_outcomes(DIFFICULTY < 0.5), with_outcomes(DIFFICULTY < 0.9)])
    save_model(tmp_path / "empty", "empty")
    save_result(tmp_path / "empty", "scenes", "structure", {"alignment": {"value": 1}})
    sections = compare(load_evaluations([tmp_path / "run-0", tmp_path / "empty", tmp_path / "run-1"]))
    zero_shot = next(section for section in sections if section.metric == "zero_shot")
    (with_gap,) = zero_shot.rows
    assert with_gap.cells[1] is None
    assert [with_gap.cells[0], with_gap.cells[2]] == list(row.cells)


def test_holm_is_the_step_down_procedure():
    # Holm (1979): the smallest times 4, the next times 3, …, never below an earlier one.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("name", "better"),
    [("recall_at_5", 1), ("mean_reciprocal_rank", 1), ("accuracy", 1), ("queries", 0), ("accuracy_deviation", 0)]
    + [(name, -1) for name in ("median_rank", "mean_rank", "mean_log_rank", "ece", "perplexity", "cross_entropy")],
)
def test_a_metric_that_falls_as_a_model_improves_is_marked_so(name, better):
    assert direction("retrieval", (name,)) == better
