"""The report says what was measured, and its file is never half written."""

from __future__ import annotations

import json

import pytest

from modstruct.evaluation.tables import flatten, save_metrics, table, validation_recall_at_1

METRICS = {
    "retrieval": {
        "text_to_image": {
            "recall_at_1": {"value": 0.25, "chance": 0.001},
            "recall_at_10": {"value": 0.75, "chance": 0.01},
        },
        "image_to_text": {
            "recall_at_1": {"value": 0.35, "chance": 0.002},
            "recall_at_10": {"value": 0.8, "chance": 0.02},
        },
    },
    "zero_shot": {"top_1": {"value": 0.5, "chance": 0.125}, "mean_per_class": {"value": 0.45, "chance": 0.125}},
    "structure": {"alignment": 0.5, "uniformity_image": -2.5, "uniformity_text": -2.25, "modality_gap": 0.75},
    "sizes": {"images": 1000, "texts": 990, "pairs": 1000},
    "skipped": {"undecodable image": 2},
    "seconds": {"embedding": 2.0, "total": 3.5},
}


def test_the_table_sets_every_metric_beside_chance():
    head, rule, *rows = table(METRICS).split("\n\n")[0].splitlines()
    assert head.split("  ")[0] == "task"
    cells = [row.split() for row in rows]
    assert cells[0] == ["text", "->", "image", "R@1", "25.00", "0.10", "250.0"]
    assert cells[3] == ["image", "->", "text", "R@10", "80.00", "2.00", "40.0"]
    assert cells[4] == ["zero-shot", "top-1", "50.00", "12.50", "4.0"]
    assert len({len(line) for line in (head, rule, *rows)}) == 1  # numbers are flush right: all lines end together


def test_the_table_shows_structure_sizes_and_what_was_left_out():
    text = table(METRICS)
    assert ["modality", "gap", "0.7500"] in [line.split() for line in text.splitlines()]
    assert "1,000 images, 990 texts" in text
    assert "left out: 2 undecodable image" in text
    assert "3.5 s" in text


def test_the_table_does_without_zero_shot_and_skipped_samples():
    text = table({name: value for name, value in METRICS.items() if name != "zero_shot"} | {"skipped": {}})
    assert "zero-shot" not in text
    assert "left out" not in text


def test_the_table_says_where_zero_shot_is_left_out():
    sizes = METRICS["sizes"] | {"classes": 8.0, "images_with_label": 0.0}
    text = table({name: value for name, value in METRICS.items() if name != "zero_shot"} | {"sizes": sizes})
    assert "zero-shot: left out, since no image has a label of the class file" in text


def test_flat_scalars_keep_every_metric_under_its_own_name():
    flat = flatten(METRICS)
    assert flat["retrieval/text_to_image/recall_at_10"] == 0.75
    assert flat["retrieval/text_to_image/recall_at_10_chance"] == 0.01
    assert flat["structure/modality_gap"] == 0.75
    assert flat["sizes/images"] == 1000
    assert all(type(value) is float for value in flat.values())
    assert len(flat) == 2 * 6 + 4 + 3 + 1 + 2


def test_the_best_checkpoint_is_chosen_by_the_mean_of_both_directions():
    assert validation_recall_at_1(METRICS) == pytest.approx(0.3)


def test_the_file_is_complete_or_what_it_was(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    save_metrics(METRICS, path)
    assert json.loads(path.read_text()) == METRICS
    with pytest.raises(ValueError, match="JSON"):
        save_metrics(METRICS | {"zero_shot": {"top_1": float("nan")}}, path)
    assert json.loads(path.read_text()) == METRICS
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
