from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_tasks import SIZE, Knowing, Stubborn, tiny_task, write_files

from modstruct.data.downstream.snli_ve import ENTAILMENT_LABELS
from modstruct.tasks import Task


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def task(root) -> Task:
    return tiny_task(root, "snli_ve")


def test_a_batch_has_images_hypotheses_and_labels(task):
    entries = task.entries("train", None).entries[:5]
    batch = task.collate([task.sample(entry, Image.open, None) for entry in entries])
    assert batch["image"].shape == (5, 3, SIZE, SIZE)
    assert batch["text"].shape == (5, 16)
    assert batch["label"].tolist() == [entry.label for entry in entries]


def test_a_perfect_model_is_always_right_and_a_stubborn_one_as_often_as_its_label_occurs(task):
    entries = task.entries("test", None).entries
    right, predictions = task.measure(Knowing(3), entries)
    assert all(right.values[name].value == 1 for name in ("accuracy", *ENTAILMENT_LABELS))
    assert [p["label"] for p in predictions] == [ENTAILMENT_LABELS[entry.label] for entry in entries]
    assert [p["pairID"] for p in predictions] == [entry.pair_id for entry in entries]
    stubborn, _ = task.measure(Stubborn(3), entries)
    assert stubborn.values["accuracy"].value == pytest.approx(1 / 3)
    assert stubborn.values["accuracy"].chance == pytest.approx(1 / 3)
    assert (stubborn.values["contradiction"].value, stubborn.values["neutral"].value) == (1, 0)
    assert task.score(stubborn) == stubborn.values["accuracy"].value


def test_a_split_without_labels_gets_predictions_and_no_metrics(task):
    entries = [replace(entry, label=None) for entry in task.entries("test", None).entries]
    result, predictions = task.measure(Stubborn(3), entries)
    assert result is None
    assert {p["label"] for p in predictions} == {"contradiction"}


def test_a_missing_file_is_named(root):
    nameless = tiny_task(root, "snli_ve")
    nameless.recipe.data.train.hypotheses = None
    with pytest.raises(ValueError, match=r"data\.train\.hypotheses = None: snli_ve needs it"):
        nameless.entries("train", None)


def with_lines(root: Path, tmp_path: Path, split: str, lines: list[dict]) -> Task:
    task = tiny_task(root, "snli_ve")
    path = tmp_path / f"{split}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    getattr(task.recipe.data, split).hypotheses = str(path)
    return task


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_without_an_entry_is_refused_by_name(root, tmp_path, split):
    with pytest.raises(ValueError, match=rf"data\.{split}\.hypotheses = .*no entry"):
        with_lines(root, tmp_path, split, []).entries(split, None)


def test_labels_may_be_missing_in_the_test_split_only(root, tmp_path):
    path = tiny_task(root, "snli_ve").recipe.data.test.hypotheses
    first, second = (json.loads(line) for line in Path(path).read_text().splitlines()[:2])
    del second["gold_label"]
    for split in ("train", "validation"):
        task = with_lines(root, tmp_path, split, [first, second])
        getattr(task.recipe.data, split).images = task.recipe.data.test.images
        with pytest.raises(ValueError, match=rf"data\.{split}\.hypotheses = .*1 of its 2 entries have no label"):
            task.entries(split, None)
    assert len(with_lines(root, tmp_path, "test", [first, second]).entries("test", None).entries) == 2
