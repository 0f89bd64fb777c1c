from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_tasks import SIZE, Knowing, Stubborn, tiny_task, write_files

from modstruct.data.downstream.nlvr2 import Nlvr2Statement
from modstruct.data.transforms.augment import sample_seed
from modstruct.tasks import Task


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def task(root) -> Task:
    return tiny_task(root, "nlvr2")


def test_the_left_image_comes_first(task):
    def plain(path: Path) -> Image.Image:
        return Image.new("RGB", (50, 40), (int(path.stem), 0, 0))

    entry = Nlvr2Statement("dev-1-0-0", (Path("10.png"), Path("200.png")), "a star", True)
    for seed in (None, lambda salt: 5):
        made = task.sample(entry, plain, seed)
        assert made["image"].shape == (2, 3, SIZE, SIZE)
        assert made["image"][:, 0].unique().tolist() == [10, 200]
        assert bool((made["image"][0, 0] == 10).all())
        assert (made["text"], made["label"]) == ("a star", 1)


def test_the_two_images_are_cropped_each_for_itself(task):
    stripes = Image.linear_gradient("L").convert("RGB")
    entry = Nlvr2Statement("dev-1-0-0", (Path("a"), Path("b")), "a star", True)
    salts = []
    made = task.sample(entry, lambda path: stripes, lambda salt: salts.append(salt) or sample_seed(0, 0, 0, salt))
    assert len(set(salts)) == 2
    assert not torch.equal(*made["image"])


def test_a_batch_has_both_images_the_text_and_the_label(task):
    entries = task.entries("train", None).entries
    batch = task.collate([task.sample(entry, Image.open, None) for entry in entries[:4]])
    assert batch["image"].shape == (4, 2, 3, SIZE, SIZE)
    assert batch["image"].dtype == torch.uint8
    assert batch["text"].shape == (4, 16)
    assert batch["label"].tolist() == [int(entry.label) for entry in entries[:4]]
    unlabelled = [task.sample(replace(entry, label=None), Image.open, None) for entry in entries[:2]]
    assert "label" not in task.collate(unlabelled)


def test_a_perfect_model_is_always_right(task):
    entries = task.entries("validation", None).entries
    result, predictions = task.measure(Knowing(2), entries)
    assert result.values["accuracy"].value == result.values["consistency"].value == task.score(result) == 1
    assert result.rows == {"statements": len(entries)}
    # The words of the published files, by which lil-lab/nlvr's metrics.py compares.
    assert predictions == [{"identifier": e.identifier, "prediction": str(e.label)} for e in entries]
    assert json.loads(json.dumps(predictions)) == predictions


def test_always_one_answer_is_the_prior(task):
    entries = task.entries("validation", None).entries
    result, predictions = task.measure(Stubborn(2), entries)
    for name, share in (("accuracy", 0.5), ("consistency", 0.0)):  # each sentence is true of two of its four pairs
        assert (result.values[name].value, result.values[name].chance) == (share, share)
    assert {prediction["prediction"] for prediction in predictions} == {"False"}


def test_the_prior_is_of_the_more_frequent_label(task):
    entries = task.entries("validation", None).entries
    some = [entry for entry in entries if entry.label] + [entry for entry in entries if not entry.label][:2]
    result, _ = task.measure(Stubborn(2), some)
    assert (result.values["accuracy"].value, result.values["accuracy"].chance) == (2 / 10, 8 / 10)


def test_without_labels_there_are_predictions_alone(task):
    entries = [replace(entry, label=None) for entry in task.entries("test", None).entries]
    result, predictions = task.measure(Stubborn(2), entries)
    assert result is None
    assert len(predictions) == len(entries)


def test_an_unreadable_image_is_predicted_nothing(root):
    task = tiny_task(root, "nlvr2")
    task.recipe.data.max_bad_share = 1.0
    entries = list(task.entries("test", None).entries)
    entries[2] = replace(entries[2], images=(entries[2].images[0], root / "none.png"))
    result, predictions = task.measure(Knowing(2), entries)
    assert [number for number, p in enumerate(predictions) if p["prediction"] is None] == [2]
    assert result.values["accuracy"].value == 1
    assert result.rows == {"statements": len(entries) - 1}


def test_a_training_split_without_files_is_refused_by_name(root):
    task = tiny_task(root, "nlvr2")
    task.recipe.data.train.statements = None
    with pytest.raises(ValueError, match=r"data\.train\.statements = None: nlvr2 needs it"):
        task.entries("train", None)
