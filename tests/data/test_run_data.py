"""The data of a run: found by the recipe, labels and class file compared at once, no more captions read than wanted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from crafted_shards import config, sample, write_shards, write_tar

from modstruct.config import Recipe, Source
from modstruct.data import run_data
from modstruct.data.classification import labelled_shards
from modstruct.data.classification.class_files import ZeroShotClasses
from modstruct.data.shards.index import index_file_name, index_tar
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_samples


def test_a_tokenizer_learns_from_as_many_captions_as_its_trainer_wants(tmp_path, monkeypatch):
    recipe = Recipe()
    recipe.data.train = write_shards(tmp_path / "shards", [20])
    recipe.data.validation = recipe.data.eval = recipe.data.zero_shot = None
    recipe.data.cache = str(tmp_path / "cache")
    learned = []
    monkeypatch.setattr(run_data, "TRAINING_CAPTIONS", 4)

    def build(config, captions, *_):
        learned.extend(captions())
        return SimpleNamespace(model=b"")

    monkeypatch.setattr(run_data, "build_tokenizer", build)
    run_data.open_run_data(recipe, 8)
    assert learned == ["thing 0", "thing 5", "thing 10", "thing 15"]


def labelled(path: Path, labels: list[object]) -> str:
    """A shard with these values of the field `colour`, None for a sample without it."""
    about = [{} if label is None else {"colour": label} for label in labels]
    members = [m for n, fields in enumerate(about) for m in sample(n, json=json.dumps(fields | {"x": 1}).encode())]
    return str(write_tar(path, members))


@pytest.fixture
def opened(tmp_path):
    """Opens the evaluation data of a recipe with these labels in data.eval and a class file of red, blue and 3."""

    def run(labels: list[object], label="colour", validation: list[object] | None = None, training=True, blue="blue"):
        classes = tmp_path / "classes.yaml"
        classes.write_text(f"label: {label}\ntemplates: ['a {{}}']\nclasses: {{red: red, blue: {blue}, 3: three}}")
        recipe = Recipe()
        recipe.data.cache, recipe.data.workers = str(tmp_path / "cache"), 0
        recipe.data.train, recipe.data.zero_shot = write_shards(tmp_path / "shards", [5]), str(classes)
        recipe.data.eval = labelled(tmp_path / "eval.tar", labels)
        recipe.data.validation = validation and labelled(tmp_path / "validation.tar", validation)
        tokenizer = SimpleNamespace(model=b"")
        if training:
            return run_data.open_run_data(recipe, 8, tokenizer)
        return run_data.open_evaluation_data(recipe, 8, tokenizer)

    return run


@pytest.mark.parametrize("training", [True, False])
def test_labels_that_the_class_file_lacks_are_refused_before_the_work(opened, training):
    with pytest.raises(
        ValueError, match=r"data.eval: of 3 samples .* 2 have a label colour .* red, blue, 3 \('green': .*"
    ):
        opened(["red", "green", "green"], training=training)


@pytest.mark.parametrize("training", [True, False])
def test_a_class_file_whose_label_no_sample_has_is_refused(opened, training):
    message = r"data\.zero_shot = .*none of 2 samples of data\.eval has a label 'colr' .* fields are colour, x"
    with pytest.raises(ValueError, match=message):
        opened(["red", "blue"], label="colr", training=training)


def test_a_source_without_labels_beside_one_with_them_is_named(opened, caplog):
    opened(["red", 3, "blue"], validation=[None, None])
    assert caplog.messages == [
        "zero-shot classification is left out: none of 2 samples of data.validation has a label 'colour' in its "
        "KEY.json (its fields are x)"
    ]


def test_of_samples_that_were_not_looked_at_nothing_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(labelled_shards, "LABELS_CHECKED", 2)
    path = labelled(tmp_path / "x.tar", [None, "red", None, None])
    command, data = f"pipe:cat {path}", config(tmp_path, allow_pipe=True)
    (tmp_path / "index").mkdir()
    index_tar(path).save(tmp_path / "index" / index_file_name(command))
    samples = open_samples([Source(command, index=str(tmp_path / "index"))], data, "data.eval")
    classes = ZeroShotClasses("colour", ("a {}",), {"red": "red", "blue": "blue"})
    assert labelled_shards.check_labels(classes, samples, data, "data.eval", thorough=False) is None
    assert "none of 2 samples of data.eval has a label 'colour'" in caplog.text


def test_a_class_file_that_nothing_is_measured_with_is_named(tmp_path, caplog):
    recipe = Recipe()
    recipe.data.cache, recipe.data.zero_shot = str(tmp_path / "cache"), str(tmp_path / "classes.yaml")
    recipe.data.train, recipe.data.eval, recipe.data.validation = write_shards(tmp_path / "shards", [5]), None, None
    (tmp_path / "classes.yaml").write_text("label: x\ntemplates: ['a {}']\nclasses: {a: a, b: b}")
    run_data.open_run_data(recipe, 8, SimpleNamespace(model=b""))
    assert "classes.yaml', and data.validation and data.eval are null" in caplog.text


def test_classes_without_a_sample_are_named(opened, caplog):
    opened(["red", "red", None])
    assert caplog.messages == ["data.eval: no sample is of these classes, which chance counts: blue, 3"]


def test_classes_of_one_name_are_named(opened, caplog):
    opened(["red", "blue", 3], blue="red")
    assert caplog.messages == ["data.eval: no prompt tells classes of one name apart: red"]


def test_of_many_samples_only_some_are_looked_at(opened, monkeypatch):
    read = []
    metadata = ShardReader.metadata
    monkeypatch.setattr(ShardReader, "metadata", lambda self, number: read.append(number) or metadata(self, number))
    monkeypatch.setattr(labelled_shards, "LABELS_CHECKED", 4)
    opened([None, "red", *[None] * 6], label="colour")
    assert read == [0, 2, 4, 6, *range(8)]  # none of those evenly spaced has a label
    read.clear()
    opened(["red"] * 8)
    assert read == [0, 2, 4, 6]
