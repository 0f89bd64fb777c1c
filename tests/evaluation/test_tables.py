"""The table says what was measured, and the file of results is never half written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from modstruct.evaluation.result import Result, Value, from_json, share
from modstruct.evaluation.tables import save_results, scalars, table

RETRIEVAL = Result(
    "retrieval",
    "eval",
    {
        "text_to_image/recall_at_1": share(0.25, chance=0.001, label="R@1", low=0.2, high=0.31),
        "text_to_image/recall_at_10": share(0.75, chance=0.01, label="R@10"),
        "image_to_text/recall_at_1": share(0.35, chance=0.002, label="R@1"),
        "image_to_text/recall_at_10": share(0.8, chance=0.02, label="R@10"),
    },
    "Image-text retrieval",
    groups={"text_to_image": "Text → image", "image_to_text": "Image → text"},
    settings={"left_out": {"undecodable image": 2}},
    rows={"image": 1000, "text": 990},
    seconds=3.5,
)
ZERO_SHOT = Result("zero_shot", "eval", {"top_1": share(0.5, chance=0.125)}, "Zero-shot classification")
STRUCTURE = Result("structure", "eval", {"modality_gap": Value(0.75, "modality gap"), "alignment": Value(0.5)})
ALL = [RETRIEVAL, ZERO_SHOT, STRUCTURE]


def test_the_table_sets_every_share_beside_chance_and_its_interval():
    head, rule, *rows = table(ALL).split("\n\n")[0].splitlines()
    assert head.split("  ")[0] == "task"
    cells = [row.split() for row in rows]
    assert cells[0] == ["Text", "->", "image", "R@1", "25.00", "20.00", "to", "31.00", "0.10", "250.0"]
    assert cells[3] == ["Image", "->", "text", "R@10", "80.00", "2.00", "40.0"]
    assert cells[4] == ["Zero-shot", "classification", "top", "1", "50.00", "12.50", "4.0"]
    assert len({len(line) for line in (head, rule, *rows)}) == 1  # numbers are flush right: all lines end together


def test_the_table_shows_structure_sizes_and_what_was_left_out():
    text = table(ALL)
    assert ["modality", "gap", "0.7500"] in [line.split() for line in text.splitlines()]
    assert "1,000 images, 990 captions" in text
    assert "left out: 2 undecodable image" in text
    assert "3.5 s" in text


def test_columns_and_tables_without_content_are_left_out():
    text = table([replace(ZERO_SHOT, rows={"image": 5})])
    assert "interval" not in text
    assert "structure" not in text
    assert "left out" not in text


def test_scalars_keep_every_value_under_its_own_name():
    found = scalars(ALL)
    assert found["retrieval/text_to_image/recall_at_10"] == 0.75
    assert found["retrieval/text_to_image/recall_at_10_chance"] == 0.01
    assert found["structure/modality_gap"] == 0.75
    assert all(type(value) is float for value in found.values())
    assert len(found) == 2 * 5 + 2


def test_the_file_is_complete_or_what_it_was(tmp_path):
    path = tmp_path / "new" / "metrics.json"
    save_results(ALL, path)
    saved = json.loads(path.read_text())["results"]
    assert [from_json(content, path) for content in saved.values()] == ALL
    with pytest.raises(ValueError, match="JSON"):
        save_results([replace(ZERO_SHOT, values={"top_1": share(float("nan"))})], path)
    assert json.loads(path.read_text())["results"] == saved
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
