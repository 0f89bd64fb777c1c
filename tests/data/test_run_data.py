"""The data of a run: found by the recipe, labels and class file compared at once, no more captions read than wanted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from crafted_shards import config, sample, write_shards, write_tar

from modstruct.config import Recipe, ScenesConfig, Source, ViewsConfig
from modstruct.data import run_data
from modstruct.data.classification import labelled_shards
from modstruct.data.classification.class_files import ZeroShotClasses
from modstruct.data.shards import sample_table
from modstruct.data.shards.index import index_file_name, index_tar
from modstruct.data.shards.reader import ShardReader
from modstruct.data.shards.samples import open_samples


def test_a_tokenizer_learns_from_as_many_captions_as_its_trainer_wants(tmp_path, monkeypatch):
    recipe = Recipe()
    recipe.data.train = write_shards(tmp_path / "shards", [20])
    recipe.data.validation = recipe.data.eval = recipe.data.zero_shot = None
    recipe.data.cache = str(tmp_path / "cache")
    learned, keys = [], []
    monkeypatch.setattr(run_data, "TRAINING_CAPTIONS", 4)

    def build(config, captions, cache, key):
        learned.extend(captions())
        keys.append(key)
        return SimpleNamespace(model=b"")

    monkeypatch.setattr(run_data, "build_tokenizer", build)
    run_data.open_run_data(recipe, 8)
    assert learned == ["thing 0", "thing 5", "thing 10", "thing 15"]
    for weight in (0.0, 0.5):  # which learn from other texts, and share no tokenizer
        recipe.data.caption_fields = {"txt": 0.5, "blip": weight}
        run_data.open_run_data(recipe, 8)
    assert len({*keys}) == 3


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


@pytest.fixture
def checked(tmp_path):
    """Checks sources, one for each list of what its samples have in `retold`, against views.text."""

    def run(*sources: list[object], text: str = "field:retold", **fields):
        recipe = Recipe(data=config(tmp_path, **fields), views=ViewsConfig(text=text))
        recipe.data.train = []
        for number, values in enumerate(sources):
            about = [json.dumps({"retold": value, "url": "u", "x": 1}).encode() for value in values]
            members = [m for n, content in enumerate(about) for m in sample(n, json=content)]
            recipe.data.train.append(Source(str(write_tar(tmp_path / f"{number}.tar", members))))
        samples = open_samples(recipe.data.train, recipe.data, "data.train")
        run_data.check_text_field(samples, recipe)
        run_data.check_caption_fields(samples, recipe)

    return run


def test_sources_with_the_texts_of_augmented_captions_pass(checked, caplog):
    checked(["a", ["b", ""], " c "], [["d"]])
    checked([None], text="eda")
    assert caplog.messages == []


@pytest.mark.parametrize("lacking", [None, "", " ", [], ["", 3], 3, {"a": "b"}])
def test_a_source_without_the_texts_of_augmented_captions_is_refused_by_name(checked, lacking):
    message = (
        r"views\.text = 'field:retold': 2 of 2 samples looked at in .*1\.tar have no text in 'retold' of KEY\.json "
    )
    with pytest.raises(ValueError, match=message + r"\(texts are in url\): give eda, or field:NAME"):
        checked(["a"], [lacking, lacking])


def test_a_caption_field_that_no_sample_has_is_refused_and_what_lacks_one_is_named(checked, caplog):
    fields = {"txt": 0.5, "retold": 0.5}
    checked([None, "a"], [None], text="eda", caption_fields=fields)
    assert [re.sub(r"/\S+/", "", message) for message in caplog.messages] == [
        f"data.caption_fields: 1 of {count} samples looked at in {number}.tar have no text in 'retold' of KEY.json "
        f"(first {number}.tar: sample 0): KEY.txt stands in"
        for number, count in enumerate((2, 1))
    ]
    with pytest.raises(ValueError, match=r"^data\.caption_fields = .*: no sample that .* 'retold' .*texts are in url"):
        checked([None], [3], text="eda", caption_fields=fields)
    checked([None], text="eda", caption_fields={"txt": 1.0, "retold": 0.0})


def test_reworded_is_refused_for_sources_that_do_not_have_it(checked):
    with pytest.raises(
        ValueError, match=r"views\.text = 'reworded': .* no text in 'reworded' .*texts are in retold, url"
    ):
        checked(["a"], text="reworded")


def test_a_few_samples_without_the_text_are_named(checked, caplog):
    checked([None, *["a"] * 9])
    (said,) = caplog.messages
    assert said.startswith("views.text: 1 of 10 samples looked at in ")
    assert "0.tar: sample 0): others will replace them" in said
    with pytest.raises(ValueError, match="1 of 10"):
        checked([None, *["a"] * 9], max_bad_share=0.05)


def test_of_each_source_some_are_looked_at(checked, monkeypatch):
    monkeypatch.setattr(sample_table, "LOOKED_AT", 3)
    read = []
    metadata = ShardReader.metadata
    monkeypatch.setattr(ShardReader, "metadata", lambda self, number: read.append(number) or metadata(self, number))
    checked(["a"] * 9, ["a"] * 2)
    assert read == [0, 3, 6, 9, 10]


@pytest.mark.parametrize("text", ["eda", "reworded"])
def test_scenes_have_another_wording_where_it_is_wanted(tmp_path, text):
    recipe = Recipe(data=config(tmp_path, scenes=ScenesConfig(6, 2, 2)), views=ViewsConfig(text=text))
    data = run_data.open_run_data(recipe, 16, SimpleNamespace(model=b""))
    reader = ShardReader(data.train, recipe.data)
    assert ["reworded" in reader.metadata(number) for number in range(6)] == [text == "reworded"] * 6
    run_data.check_text_field(data.train, recipe)
    folder = run_data.open_evaluation_data(recipe, 16, data.tokenizer).eval.samples.shards
    assert list(folder) == list(data.eval.samples.shards)  # nothing is drawn twice


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
