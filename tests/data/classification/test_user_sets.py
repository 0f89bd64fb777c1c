"""A user's set by a YAML file: folders, tables and shards give the labels that the file names."""

from __future__ import annotations

import json
import os

import published_layouts as layouts
import pytest

from modstruct.config import DataConfig
from modstruct.data.classification.registry import open_labelled, set_splits
from modstruct.data.classification.templates import PAPER_TEMPLATE
from modstruct.data.shards.faults import BadSample


@pytest.fixture
def config(tmp_path):
    return DataConfig(workers=0, cache=str(tmp_path / "cache"))


def described(folder, text):
    return layouts.put(folder / "birds.yaml", "name: birds\n" + text)


def class_folders(folder, names="blue_tit jay"):
    for number, name in enumerate(names.split()):
        for copy in range(2):
            layouts.put(folder / name / f"{copy}.png", layouts.picture(10 * number + copy))
    return folder


def read(pictures):
    return [
        (layouts.number_of(s.picture), s.metadata["label"]) for s in map(pictures.__getitem__, range(len(pictures)))
    ]


def test_a_folder_of_class_folders_names_its_classes(tmp_path, config):
    class_folders(tmp_path / "pictures")
    layouts.put(tmp_path / "pictures/jay/notes.txt", "no image")
    layouts.put(tmp_path / "pictures/.hidden/0.png", layouts.picture(1))
    pictures = open_labelled(str(described(tmp_path, "images: images")), config)
    assert (pictures.name, pictures.split) == ("birds", "test")
    assert pictures.classes == ("blue tit", "jay")
    assert pictures.templates == (PAPER_TEMPLATE,)
    assert read(pictures) == [(0, 0), (1, 0), (10, 1), (11, 1)]
    assert pictures[2].metadata["key"] == "jay/0.png"
    same = open_labelled(f"folder@{tmp_path / 'pictures'}", config)
    assert (same.name, same.fingerprint) == ("pictures", pictures.fingerprint)


def test_classes_give_order_and_names_and_may_lack_images(tmp_path, config):
    class_folders(tmp_path / "pictures")
    text = 'images: images\ntemplates: ["a {} bird"]\nclasses: {jay: Eurasian jay, owl: owl, blue_tit: blue tit}'
    pictures = open_labelled(str(described(tmp_path, text)), config)
    assert pictures.classes == ("Eurasian jay", "owl", "blue tit")
    assert pictures.templates == ("a {} bird",)
    assert read(pictures) == [(10, 0), (11, 0), (0, 2), (1, 2)]


def test_splits_are_places_of_their_own(tmp_path, config):
    class_folders(tmp_path / "one")
    class_folders(tmp_path / "two/deep", "jay owl")
    path = described(tmp_path, "images: {train: one, test: two/deep}\nclasses: {jay: jay, owl: owl, blue_tit: tit}")
    train, test = open_labelled(f"{path}:train", config), open_labelled(str(path), config)
    assert (train.name, train.split, test.name, test.split) == ("birds-train", "train", "birds", "test")
    assert [label for _, label in read(train)] == [0, 0, 2, 2]
    assert [label for _, label in read(test)] == [0, 0, 1, 1]
    assert set_splits(str(path)) == ("train", "test")
    with pytest.raises(ValueError, match=r"birds.yaml: images = .*: give a place for the split validation"):
        open_labelled(f"{path}:validation", config)


def test_a_table_names_images_and_labels(tmp_path, config):
    for number in range(3):
        layouts.put(tmp_path / f"table/files/{number}.png", layouts.picture(number))
    layouts.put(tmp_path / "table/list.csv", "species,picture\nB,files/2.png\nA,files/0.png\nB,files/1.png\n")
    text = "images: table/list.csv\nlabel: species\nclasses: {A: jay, B: tit}"
    assert read(open_labelled(str(described(tmp_path, text)), config)) == [(2, 1), (0, 0), (1, 1)]
    layouts.put(tmp_path / "table/list.csv", "label,picture\n1,files/2.png\n0,files/0.png\n")
    text = "images: table/list.csv\nclasses: [jay, tit]"
    assert read(open_labelled(str(described(tmp_path, text)), config)) == [(2, 1), (0, 0)]


def test_shards_hold_labels_in_cls_or_in_metadata(tmp_path, config):
    members = []
    for number, colour in enumerate(["red", "blue", None, "red"]):
        about = json.dumps({"colour": colour, "place": number}).encode()
        members += [(f"{number}.png", layouts.picture(number)), (f"{number}.cls", b"%d" % (number % 2))]
        members += [(f"{number}.txt", b"a thing"), (f"{number}.json", about)]
    layouts.tar(tmp_path / "data/0.tar", members)
    text = "images: data/*.tar\nclasses: [even, odd]"
    assert read(open_labelled(str(described(tmp_path, text)), config)) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    text = "images: 'data/{0..0}.tar'\nlabel: colour\nclasses: {blue: blue, red: deep red}"
    pictures = open_labelled(str(described(tmp_path, text)), config)
    assert read(pictures) == [(0, 1), (1, 0), (2, -1), (3, 1)]
    assert pictures[3].metadata == {"colour": "red", "place": 3, "label": 1, "key": "3"}
    assert pictures[3].captions == ["a thing"]
    class_file = layouts.put(tmp_path / "colours.yaml", text.split("\n", 1)[1] + '\ntemplates: ["a {} thing"]')
    other = open_labelled(f"{class_file}@{tmp_path / 'data/*.tar'}", config)
    assert (other.name, other.templates, read(other)) == ("colours", ("a {} thing",), read(pictures))


def test_a_label_that_is_no_class_is_refused_when_it_is_read(tmp_path, config):
    about = json.dumps({"colour": "green"}).encode()
    layouts.tar(tmp_path / "0.tar", [("0.png", layouts.picture(0)), ("0.txt", b"a thing"), ("0.json", about)])
    pictures = open_labelled(
        str(described(tmp_path, "images: 0.tar\nlabel: colour\nclasses: {red: red, blue: blue}")), config
    )
    with pytest.raises(ValueError, match=r"colour = 'green' of a sample is not among the classes red, blue"):
        pictures[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"images = None: give a folder, a CSV file or a pattern"),
        ("images: [a]", r"images = \['a'\]: give a folder"),
        ("images: {extra: a}", r"images.extra = 'a': give only the splits train, validation, test"),
        ("images: one\nlabel: 3", r"label = 3: give the name of a CSV column"),
        ("images: one\nclasses: [a]", r"classes = \{0: 'a'\}: give a mapping of at least two"),
        ("images: one\nclasses: [a, 4]", r"classes.1 = 4: give a readable name"),
        ("images: one\ntemplates: [a]", r"templates = 'a': give a text with exactly one"),
        ("images: one\nprompt: a {}", r"unknown key 'prompt'; the keys are name, images, label, classes and templ"),
        ("images: one\nclasses: {jay: jay, owl: owl}", r"the folder .*blue_tit is none of the 2 classes"),
        ("images: empty", r"empty has 0 class folders, where there must be at least two"),
        ("images: bare", r"there is no image \(.jpg, .*\) in the folders of .*bare"),
        ("images: none.csv", r"classes = None: give a mapping or a list of them; only a folder"),
        ("images: none.csv\nclasses: [a, b]", r"birds@.*there is no file .*none.csv; correct `images`"),
        ("images: wrong.csv\nclasses: [a, b]", r"wrong.csv has no column 'image'"),
        ("images: other.csv\nclasses: [a, b]", r"the label 'x' is none of the 2 classes"),
        ("images: away.csv\nclasses: [a, b]", r"'../../jay.png', which points out of"),
        ("images: gone.csv\nclasses: [a, b]", r"1 of 1 images are not in .*, the first one/jay/7.png"),
        ("images: none-*.tar\nclasses: [a, b]", r"no file matches"),
        ("name: ../up\nimages: one", r"not a YAML file|name = '../up': give a plain file name"),
    ],
)
def test_a_wrong_file_is_refused_by_key_value_and_remedy(tmp_path, config, text, message):
    class_folders(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    for name in ("a", "b"):
        (tmp_path / "bare" / name).mkdir(parents=True)
    layouts.put(tmp_path / "wrong.csv", "file,label\n1,a\n")
    layouts.put(tmp_path / "other.csv", "picture,label\none/jay/0.png,x\n")
    layouts.put(tmp_path / "away.csv", "picture,label\n../../jay.png,1\n")
    layouts.put(tmp_path / "gone.csv", "picture,label\none/jay/7.png,1\n")
    with pytest.raises(ValueError, match=message):
        open_labelled(str(described(tmp_path, text)), config)


def test_a_missing_file_is_named(tmp_path, config):
    with pytest.raises(FileNotFoundError, match=r"none.yaml: there is no such file"):
        open_labelled(str(tmp_path / "none.yaml"), config)


def test_a_image_without_permission_is_a_bad_sample(tmp_path, config):
    class_folders(tmp_path / "pictures")
    pictures = open_labelled(str(described(tmp_path, "images: images")), config)
    os.unlink(tmp_path / "pictures/jay/0.png")
    with pytest.raises(BadSample, match=r"unreadable image: .*jay/0.png"):
        pictures[2]
