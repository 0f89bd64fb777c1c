"""A user's set by a YAML file: folders, tables and shards give the labels that the file names."""

from __future__ import annotations

import json
import os

import published_layouts as layouts
import pytest

from modstruct.config import DataConfig
from modstruct.data.classification.published import PAPER_TEMPLATE
from modstruct.data.classification.registry import open_labelled, set_splits
from modstruct.data.faults import BadSample
from modstruct.data.shards.members import OTHER


@pytest.fixture
def config(tmp_path):
    return DataConfig(workers=0, cache=str(tmp_path / "cache"))


def described(folder, text):
    return layouts.put(folder / "birds.yaml", "name: birds\n" + text)


def class_folders(folder, names="blue_tit jay"):
    for number, name in enumerate(names.split()):
        for copy in range(2):
            layouts.put(folder / name / f"{copy}.png", layouts.image(10 * number + copy))
    return folder


def read(images):
    return [(layouts.number_of(s.image), s.metadata["label"]) for s in map(images.__getitem__, range(len(images)))]


def test_a_folder_of_class_folders_names_its_classes(tmp_path, config):
    class_folders(tmp_path / "images")
    layouts.put(tmp_path / "images/jay/notes.txt", "no image")
    layouts.put(tmp_path / "images/.hidden/0.png", layouts.image(1))
    images = open_labelled(str(described(tmp_path, "images: images")), config)
    assert images.name == "birds"
    assert images.classes == ("blue tit", "jay")
    assert images.templates == (PAPER_TEMPLATE,)
    assert read(images) == [(0, 0), (1, 0), (10, 1), (11, 1)]
    assert images[2].metadata["key"] == "jay/0.png"
    same = open_labelled(f"folder@{tmp_path / 'images'}", config)
    assert (same.name, same.fingerprint) == ("images", images.fingerprint)


def test_folders_in_class_folders_are_read_too(tmp_path, config):
    class_folders(tmp_path / "images")
    layouts.put(tmp_path / "images/blue_tit/more/9.png", layouts.image(9))
    layouts.put(tmp_path / "images/blue_tit/.cache/8.png", layouts.image(8))
    images = open_labelled(str(described(tmp_path, "images: images")), config)
    assert read(images) == [(0, 0), (1, 0), (9, 0), (10, 1), (11, 1)]
    assert images[2].metadata["key"] == "blue_tit/more/9.png"


def test_classes_give_order_and_names_and_may_lack_images(tmp_path, config):
    class_folders(tmp_path / "images")
    text = 'images: images\ntemplates: ["a {} bird"]\nclasses: {jay: Eurasian jay, owl: owl, blue_tit: blue tit}'
    images = open_labelled(str(described(tmp_path, text)), config)
    assert images.classes == ("Eurasian jay", "owl", "blue tit")
    assert images.templates == ("a {} bird",)
    assert read(images) == [(10, 0), (11, 0), (0, 2), (1, 2)]


def test_what_is_left_out_of_class_folders_is_named(tmp_path, config, caplog):
    class_folders(tmp_path / "images")
    layouts.put(tmp_path / "images/jay/0.heic", b"x")
    layouts.put(tmp_path / "images/lonely.png", layouts.image(1))
    (tmp_path / "images/wren").mkdir()
    text = "images: images\nclasses: {jay: jay, owl: owl, blue_tit: tit, wren: wren}"
    open_labelled(str(described(tmp_path, text)), config)
    said = caplog.text
    assert "2 files in" in said
    assert "that are no images in a class folder are left out (first lonely.png, jay/0.heic)" in said
    assert "1 class folders of" in said
    assert "hold no image (first wren)" in said
    assert "1 classes have no folder in" in said
    assert "(first owl)" in said


def test_what_a_table_repeats_or_lacks_is_named(tmp_path, config, caplog):
    layouts.put(tmp_path / "0.png", layouts.image(0))
    layouts.put(tmp_path / "list.csv", "image,label\n0.png,A\n0.png,B\n")
    text = "images: list.csv\nclasses: {A: jay, B: tit, C: owl}"
    assert len(open_labelled(str(described(tmp_path, text)), config)) == 2
    assert "1 images occur in several rows of" in caplog.text
    assert "1 classes have no image in" in caplog.text
    layouts.put(tmp_path / "list.csv", "image,label\n0.png,A,B\n")
    with pytest.raises(ValueError, match=r"list\.csv: 3 values in 2 columns \(0\.png,A,B\); quote one"):
        open_labelled(str(described(tmp_path, text)), config)


def test_splits_are_places_of_their_own(tmp_path, config):
    class_folders(tmp_path / "one")
    class_folders(tmp_path / "two/deep", "jay owl")
    path = described(tmp_path, "images: {train: one, test: two/deep}\nclasses: {jay: jay, owl: owl, blue_tit: tit}")
    train, test = open_labelled(f"{path}:train", config), open_labelled(str(path), config)
    assert (train.name, test.name) == ("birds-train", "birds")
    assert [label for _, label in read(train)] == [0, 0, 2, 2]
    assert [label for _, label in read(test)] == [0, 0, 1, 1]
    assert set_splits(str(path)) == ("train", "test")
    with pytest.raises(ValueError, match=r"birds.yaml: images = .*: give a place for the split validation"):
        open_labelled(f"{path}:validation", config)


def test_a_table_names_images_and_labels(tmp_path, config):
    for number in range(3):
        layouts.put(tmp_path / f"table/files/{number}.png", layouts.image(number))
    layouts.put(tmp_path / "table/list.csv", "species,image\nB,files/2.png\nA,files/0.png\nB,files/1.png\n")
    text = "images: table/list.csv\nlabel: species\nclasses: {A: jay, B: tit}"
    assert read(open_labelled(str(described(tmp_path, text)), config)) == [(2, 1), (0, 0), (1, 1)]
    layouts.put(tmp_path / "table/list.csv", "label,image\n1,files/2.png\n0,files/0.png\n")
    text = "images: table/list.csv\nclasses: [jay, tit]"
    assert read(open_labelled(str(described(tmp_path, text)), config)) == [(2, 1), (0, 0)]


def test_the_former_names_of_key_and_column_are_read_with_a_notice(tmp_path, config, caplog):
    for number in range(2):
        layouts.put(tmp_path / f"{number}.png", layouts.image(number))
    layouts.put(tmp_path / "list.csv", "picture,label\n1.png,0\n0.png,1\n")
    path = described(tmp_path, "pictures: list.csv\nclasses: [jay, tit]")
    assert read(open_labelled(str(path), config)) == [(1, 0), (0, 1)]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: the key 'pictures' is now called 'images'; the old name is still read",
        f"{tmp_path / 'list.csv'}: the column 'picture' is now called 'image'; the old name is still read",
    ]


def test_shards_hold_labels_in_cls_or_in_metadata(tmp_path, config):
    members = []
    for number, colour in enumerate(["red", "blue", None, "red"]):
        about = json.dumps({"colour": colour, "place": number}).encode()
        members += [(f"{number}.png", layouts.image(number)), (f"{number}.cls", b"%d" % (number % 2))]
        members += [(f"{number}.txt", b"a thing"), (f"{number}.json", about)]
    layouts.tar(tmp_path / "data/0.tar", members)
    text = "images: data/*.tar\nclasses: [even, odd]"
    assert read(open_labelled(str(described(tmp_path, text)), config)) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    text = "images: 'data/{0..0}.tar'\nlabel: colour\nclasses: {blue: blue, red: deep red}"
    images = open_labelled(str(described(tmp_path, text)), config)
    assert read(images) == [(0, 1), (1, 0), (2, -1), (3, 1)]
    assert images[3].metadata == {"colour": "red", "place": 3, "label": 1, "key": "3"}
    assert images[3].captions == ["a thing"]
    class_file = layouts.put(tmp_path / "colours.yaml", text.split("\n", 1)[1] + '\ntemplates: ["a {} thing"]')
    other = open_labelled(f"{class_file}@{tmp_path / 'data/*.tar'}", config)
    assert (other.name, other.templates, read(other)) == ("colours", ("a {} thing",), read(images))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"colour": "green"},
            r"^--sets NAME: of 1 .* 1 have a label colour that is not among the classes red, blue "
            r"\('green': .*sample 0\): add it to `classes` of FILE, or make it null",
        ),
        (
            {"color": "red"},
            r"none of 1 samples of --sets NAME has a label 'colour' in its KEY.json \(its fields are color\): "
            "correct `label` of FILE$",
        ),
    ],
)
def test_labels_that_are_no_classes_are_refused_when_the_set_is_opened(tmp_path, config, fields, message):
    about = json.dumps(fields).encode()
    layouts.tar(tmp_path / "0.tar", [("0.png", layouts.image(0)), ("0.txt", b"a thing"), ("0.json", about)])
    text = "label: colour\nclasses: {red: red, blue: blue}"
    class_file = layouts.put(tmp_path / "colours.yaml", text + '\ntemplates: ["a {} thing"]')
    own = described(tmp_path, f"images: 0.tar\n{text}")
    for name, file, word in (("birds", own, str(own)), ("colours", class_file, f"{class_file}@{tmp_path / '0.tar'}")):
        with pytest.raises(ValueError, match=message.replace("NAME", name).replace("FILE", str(file))):
            open_labelled(word, config)


def test_of_very_many_unknown_labels_some_are_named(tmp_path, config):
    members = []
    for number in range(40):
        about = json.dumps({"colour": f"c{number}"}).encode()
        members += [(f"{number}.png", layouts.image(0)), (f"{number}.txt", b"a"), (f"{number}.json", about)]
    layouts.tar(tmp_path / "0.tar", members)
    with pytest.raises(ValueError, match=r"40 have a label colour that is not .*'c0': ") as refused:
        open_labelled(str(described(tmp_path, "images: 0.tar\nlabel: colour\nclasses: {red: red, blue: blue}")), config)
    assert OTHER not in str(refused.value)


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
        ("images: wrong.csv\nclasses: [a, b]", r"wrong.csv has no .*'image'; between ',' it has 'file', 'label'"),
        ("images: other.csv\nclasses: [a, b]", r"other.csv: the label 'x' of one/jay/0.png is none of the 2 classes"),
        ("images: away.csv\nclasses: [a, b]", r"'../../jay.png' points out of"),
        ("images: gone.csv\nclasses: [a, b]", r"1 of 1 images are not in .*, the first one/jay/7.png"),
        ("images: none-*.tar\nclasses: [a, b]", r"no file matches"),
        ("name: ../up\nimages: one", r"line 2: the key 'name' is there already"),
    ],
)
def test_a_wrong_file_is_refused_by_key_value_and_remedy(tmp_path, config, text, message):
    class_folders(tmp_path / "one")
    (tmp_path / "empty").mkdir()
    for name in ("a", "b"):
        (tmp_path / "bare" / name).mkdir(parents=True)
    layouts.put(tmp_path / "wrong.csv", "file,label\n1,a\n")
    layouts.put(tmp_path / "other.csv", "image,label\none/jay/0.png,x\n")
    layouts.put(tmp_path / "away.csv", "image,label\n../../jay.png,1\n")
    layouts.put(tmp_path / "gone.csv", "image,label\none/jay/7.png,1\n")
    with pytest.raises(ValueError, match=message):
        open_labelled(str(described(tmp_path, text)), config)


def test_a_name_is_no_path(tmp_path, config):
    class_folders(tmp_path / "one")
    with pytest.raises(ValueError, match=r"name = '../up': give a plain file name"):
        open_labelled(str(layouts.put(tmp_path / "birds.yaml", "name: ../up\nimages: one")), config)


def test_a_missing_file_is_named(tmp_path, config):
    with pytest.raises(FileNotFoundError, match=r"none.yaml: there is no such file"):
        open_labelled(str(tmp_path / "none.yaml"), config)


def test_an_image_without_permission_is_a_bad_sample(tmp_path, config):
    class_folders(tmp_path / "images")
    images = open_labelled(str(described(tmp_path, "images: images")), config)
    os.unlink(tmp_path / "images/jay/0.png")
    with pytest.raises(BadSample, match=r"unreadable image: .*jay/0.png"):
        images[2]
